"""A TCP proxy that cuts, delays and corrupts what goes through it."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time

_CHUNK_BYTES = 1 << 16


class FaultyProxy:
    """Forwards connections to `address`, whether a server listens there at the moment or not.

    Args:
        address: Of the server, "host:port".
        seed: Of what is drawn: which bit is flipped.

    Attributes:
        target: Where clients connect.
    """

    def __init__(self, address: str, seed: int) -> None:
        host, port = address.rsplit(":", 1)
        self._upstream = host, int(port)
        self._rng = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._delay_s = 0.0
        self._num_flips = 0
        self._has_flipped = threading.Event()
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection, wherever in a message that is."""
        with self._lock:
            sockets = list(self._sockets)
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def delay(self, seconds: float) -> None:
        """Hold every piece of data back for so long from now on; 0 = no longer."""
        self._delay_s = seconds

    def corrupt(self, timeout_s: float) -> bool:
        """Flip one bit of the next data, in either direction; return whether any passed in time."""
        self._has_flipped.clear()
        with self._lock:
            self._num_flips = 1
        has_flipped = self._has_flipped.wait(timeout_s)
        with self._lock:
            self._num_flips = 0
        return has_flipped

    def close(self) -> None:
        """Cut everything and accept no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                client.close()  # nobody listens; the client tries again
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            both = (client, server)
            left = threading.Semaphore(1)
            for source, sink in (both, both[::-1]):
                threading.Thread(
                    target=self._forward, args=(source, sink, left), daemon=True
                ).start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, left: threading.Semaphore
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                if self._delay_s:
                    time.sleep(self._delay_s)
                sink.sendall(self._flipped(data) if self._num_flips else data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if not left.acquire(blocking=False):  # the other direction has ended before
            with self._lock:
                self._sockets -= {source, sink}
            source.close()
            sink.close()

    def _flipped(self, data: bytes) -> bytes:
        with self._lock:
            if not self._num_flips:
                return data
            self._num_flips -= 1
            bit = self._rng.randrange(8 * len(data))
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        self._has_flipped.set()
        return bytes(broken)
