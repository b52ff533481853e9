"""A small HTTP server for metrics: GET /metrics and GET /healthz, on one thread, whatever clients send or hold back.

Prometheus needs one request a few times a minute. So every connection serves one request, has a few seconds for all of
it, and gives way to newer ones when there are too many; an answer is made at most ten times a second. Steps share the
process with this, and must not feel it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

from octavo_server.backends.base import UnsupportedError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""Open at once; the oldest is closed for the next."""

REQUEST_S = 5.0
"""From when a connection is open to when its answer is out."""

MAX_HEAD_BYTES = 8 * 2**10
"""Request line and headers."""

MIN_AGE_S = 0.1
"""Metrics are read again no sooner; until then they are sent once more."""

_PLAIN = "text/plain; charset=utf-8"
_END_OF_HEAD = b"\r\n\r\n"


class MetricsServer:
    """Serves on a thread of its own until `close`.

    Args:
        address: HOST:PORT to listen on; port 0 takes a free one.
        render: Returns the metrics.
        content_type: What it returns.

    Attributes:
        url: Where the metrics are.

    Raises:
        UnsupportedError: The address cannot be listened on.
    """

    def __init__(self, address: str, render: Callable[[], bytes], content_type: str) -> None:
        self._socket = _listen(address)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        self._render = render
        self._content_type = content_type
        self._rendered = b""
        self._rendered_at = float("-inf")
        self._connections: dict[asyncio.Task[None], None] = {}
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="octavo-metrics", daemon=True)

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._is_over.set)
            self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        except Exception:
            log.exception("metrics are served no more")
        finally:
            self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(
            self._accept, sock=self._socket, limit=MAX_HEAD_BYTES, backlog=MAX_CONNECTIONS
        )
        await self._is_over.wait()
        server.close()
        open_now = list(self._connections)
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) == MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[task] = None
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.CancelledError):
            pass  # Too slow, gone, or in the way of a newer one; TimeoutError is an OSError.
        except Exception:
            log.exception("a request for metrics could not be answered")
        finally:
            self._connections.pop(task, None)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(_END_OF_HEAD)
        except asyncio.LimitOverrunError:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except asyncio.IncompleteReadError:
            return _response(HTTPStatus.BAD_REQUEST)
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST)
        return self._respond_to(words[0], words[1].split(b"?", 1)[0])

    def _respond_to(self, method: bytes, path: bytes) -> bytes:
        if path not in {b"/metrics", b"/healthz"}:
            return _response(HTTPStatus.NOT_FOUND)
        if method != b"GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        if path == b"/healthz":
            return _response(HTTPStatus.OK)
        return _response(HTTPStatus.OK, self._metrics(), self._content_type)

    def _metrics(self) -> bytes:
        if time.monotonic() - self._rendered_at >= MIN_AGE_S:
            self._rendered = self._render()
            self._rendered_at = time.monotonic()
        return self._rendered


def _response(status: HTTPStatus, body: bytes = b"", content_type: str = _PLAIN) -> bytes:
    title = f"{status.value} {status.phrase}"
    body = body or f"{title}\n".encode()
    head = (
        f"HTTP/1.1 {title}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise UnsupportedError(
            f"cannot listen on metrics_address {address}: {error}; choose another one, or stop what listens there"
        ) from None
