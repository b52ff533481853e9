"""ExportSession and ImportSession: the bytes of a session's file in messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from octavo import v1
from octavo_server import codec
from octavo_server.auth import Auth
from octavo_server.calls import Caller, Gate, refusing
from octavo_server.engine import Engine
from octavo_server.errors import Reason, mismatch, snapshot_invalid
from octavo_server.request_reader import RequestReader
from octavo_server.session import SessionOptions, SessionState
from octavo_server.session_file import SessionReader, write_session
from octavo_server.session_header import InvalidSessionFileError, SavedSession
from octavo_server.session_transfer import Import, abandoning
from octavo_server.tenant import Tenant
from octavo_server.traffic import Traffic

CHUNK_BYTES = 2**20
"""Most bytes of the file in one message."""

MAX_SILENT_S = 60.0
"""How long the client of an import, which holds blocks, may send nothing."""


class TransferCalls:
    """Handlers of the two calls.

    Args:
        engine: Has the sessions.
        auth: Tells whose call it is.
        streams: Counts them among the streams.
        traffic: Counts their messages and refusals.
        max_lease_s: Longest lease of a session.
    """

    def __init__(
        self, engine: Engine, auth: Auth, streams: Gate, traffic: Traffic, max_lease_s: float
    ) -> None:
        self._engine = engine
        self._auth = auth
        self._streams = streams
        self._traffic = traffic
        self._max_lease_s = max_lease_s

    def handlers(self, reader: RequestReader) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """Return the calls by name.

        Args:
            reader: Reads the one request of an export.
        """

        def export_session(
            requests: Iterator[bytes], context: grpc.ServicerContext
        ) -> Iterator[bytes]:
            return self._export(reader.read(requests, context), context)

        return {
            "ExportSession": grpc.stream_stream_rpc_method_handler(export_session),
            "ImportSession": grpc.stream_unary_rpc_method_handler(self._import),
        }

    def _export(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with (
            self._streams.open(context),
            self._traffic.stream() as traffic,
            refusing(context, self._traffic),
            self._auth.cutting(context),
        ):
            traffic.received_bytes += len(data)
            request = codec.parse(v1.ExportSessionRequest, data)
            tenant = self._auth.tenant(context)
            export = self._engine.transfers.export(request.session_id, tenant)
            values = export.values(Caller(context).wait)
            for part in write_session(export.saved, values):
                for start in range(0, len(part), CHUNK_BYTES):
                    chunk = bytes(part[start : start + CHUNK_BYTES])
                    response = v1.ExportSessionResponse(data=chunk).SerializeToString()
                    traffic.sent_bytes += len(response)
                    yield response

    def _import(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with (
            self._streams.open(context),
            self._traffic.stream() as traffic,
            refusing(context, self._traffic),
            self._auth.cutting(context),
            _Watchdog(MAX_SILENT_S, context.cancel) as watchdog,
        ):
            source = _Messages(traffic.receiving(requests), watchdog.feed)
            state = self._run_import(source, context)
            response = v1.ImportSessionResponse(session=codec.write_session(state))
            encoded = response.SerializeToString()
            traffic.sent_bytes += len(encoded)
        return encoded

    def _run_import(self, source: _Messages, context: grpc.ServicerContext) -> SessionState:
        tenant = self._auth.tenant(context)
        codec.check_request_id(source.first.request_id)
        asked = codec.read_options(source.first)
        with _explaining(""):
            reader = SessionReader(source)
            saved = reader.header()
            started = self._begin(source.first, asked, saved, tenant)
            if isinstance(started, SessionState):
                return started
            with abandoning(started):
                started.receive(reader, saved, Caller(context).wait)
                return started.finish()

    def _begin(
        self,
        request: v1.ImportSessionRequest,
        asked: SessionOptions,
        saved: SavedSession,
        tenant: Tenant,
    ) -> Import | SessionState:
        is_asked = request.disconnect_policy != v1.DISCONNECT_POLICY_UNSPECIFIED
        policy_of = asked if is_asked else saved.options
        options = SessionOptions(
            min(asked.lease_s or saved.options.lease_s, self._max_lease_s),
            policy_of.closes_on_disconnect,
            asked.reserve_tokens or saved.options.reserve_tokens,
        )
        return self._engine.transfers.begin(
            saved, request.model, tenant, options, request.request_id
        )


@contextmanager
def _explaining(session_id: str) -> Iterator[None]:
    try:
        yield
    except InvalidSessionFileError as error:
        raise snapshot_invalid(session_id, str(error)) from error


class _Messages:
    """The bytes of an import, whatever the messages that they come in. Implements `Source`.

    Args:
        messages: What the client sends.
        on_message: Called for each.

    Raises:
        OctavoError: MALFORMED_MESSAGE.
    """

    def __init__(self, messages: Iterator[bytes], on_message: Callable[[], None]) -> None:
        self._messages = messages
        self._on_message = on_message
        first = self._next()
        if first is None:
            raise mismatch(Reason.MALFORMED_MESSAGE, "request", "at least one message", "none")
        self.first = first
        self._rest = memoryview(first.data)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill up to the whole of `buffer`; return the number of bytes, 0 at the end."""
        while not self._rest:
            message = self._next()
            if message is None:
                return 0
            self._rest = memoryview(message.data)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _next(self) -> v1.ImportSessionRequest | None:
        data = next(self._messages, None)
        self._on_message()
        return None if data is None else codec.parse(v1.ImportSessionRequest, data)


class _Watchdog:
    """Calls for help unless it is fed.

    Args:
        patience_s: How long it goes without.
        bark: Called, once, when that is over.
    """

    def __init__(self, patience_s: float, bark: Callable[[], object]) -> None:
        self._patience_s = patience_s
        self._bark = bark
        self._is_over = threading.Event()
        self._fed_at = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="octavo-watchdog", daemon=True)

    def __enter__(self) -> _Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def feed(self) -> None:
        """Make it wait again."""
        self._fed_at = time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(self._fed_at + self._patience_s - time.monotonic()):
            if time.monotonic() >= self._fed_at + self._patience_s:
                self._bark()
                return
