"""A TCP proxy that holds every byte back for a while in each direction, as a longer way would.

    python -m octavo_client.examples.delay_proxy HOST:PORT DELAY_US

prints its own address, and ends with stdin.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

Chunk = tuple[float, bytes]
"""When bytes are due, and the bytes; none of them at the end."""

_CHUNK_BYTES = 1 << 18


@contextlib.contextmanager
def delay_proxy(target: str, delay_us: int) -> Iterator[str]:
    """Run a proxy to `target` in a process of its own; yield its address."""
    command = [sys.executable, "-m", __name__, target, str(delay_us)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def serve(target: str, delay_s: float) -> socket.socket:
    """Listen on a free loopback port, and forward what connects; return the listener."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, target, delay_s), daemon=True).start()
    return listener


def _accept(listener: socket.socket, target: str, delay_s: float) -> None:
    host, port = target.rsplit(":", 1)
    with contextlib.suppress(OSError):  # the listener was closed
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((host, int(port)))
            for source, sink in ((client, server), (server, client)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _forward(source, sink, delay_s)


def _forward(source: socket.socket, sink: socket.socket, delay_s: float) -> None:
    chunks: SimpleQueue[Chunk] = SimpleQueue()
    for target, arguments in ((_receive, (source, chunks, delay_s)), (_send, (chunks, sink))):
        threading.Thread(target=target, args=arguments, daemon=True).start()


def _receive(source: socket.socket, chunks: SimpleQueue[Chunk], delay_s: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            chunks.put((time.perf_counter() + delay_s, data))
    chunks.put((0.0, b""))


def _send(chunks: SimpleQueue[Chunk], sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while (chunk := chunks.get())[1]:
            due, data = chunk
            if (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def main() -> None:
    """Forward until stdin ends."""
    listener = serve(sys.argv[1], int(sys.argv[2]) / 1e6)
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
