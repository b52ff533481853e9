"""A TCP proxy between a client and a server that cuts its connections when told to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class CuttingProxy:
    """Forwards connections to `address`.

    Attributes:
        target: Where clients connect.
        num_connections: Connections accepted so far.
        cut_after_bytes: Bytes from a client after which its connection is cut, often in the middle of a message.
        num_cuts_left: How often that is still to happen.
    """

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._upstream = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_deaf = False
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        self.cut_after_bytes = 0
        self.num_cuts_left = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection, in both directions at once."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def drop_answers(self) -> None:
        """Throw away what the server says from now on, until the next connection."""
        self._is_deaf = True

    def close(self) -> None:
        """Cut everything and accept no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _is_due(self, num_bytes: int) -> bool:
        with self._lock:
            is_due = self.num_cuts_left > 0 and num_bytes >= self.cut_after_bytes
            self.num_cuts_left -= is_due
        return is_due

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
            except OSError:
                return
            with self._lock:
                self._sockets += [client, server]
                self._is_deaf = False
                self.num_connections += 1
            for source, sink in ((client, server), (server, client)):
                is_answer = source is server
                threading.Thread(
                    target=self._forward, args=(source, sink, is_answer), daemon=True
                ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 10):
                if not (is_answer and self._is_deaf):
                    sink.sendall(data)
                num_bytes += len(data)
                if not is_answer and self._is_due(num_bytes):
                    self.cut()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def cutting_proxy(address: str) -> Iterator[CuttingProxy]:
    """Run a proxy to a server."""
    proxy = CuttingProxy(address)
    try:
        yield proxy
    finally:
        proxy.close()
