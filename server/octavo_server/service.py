"""The calls of octavo.v1.OctavoService: decode a message, ask the engine, encode the answer; no logic.

Handlers take raw bytes and parse them here, so that garbage is refused with a reason too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from octavo import v1
from octavo_server import codec
from octavo_server.auth import Auth
from octavo_server.calls import Caller, Gate, refusing, responding, unary_handler
from octavo_server.engine import Engine
from octavo_server.errors import OctavoError, Reason, limit_reached, mismatch
from octavo_server.request_reader import RequestReader
from octavo_server.session import SessionOptions
from octavo_server.shared_memory import StreamMemory
from octavo_server.stats import ServerStats
from octavo_server.step import MAX_ENTRIES, StepAnswer, StepOrigin, StepRequest
from octavo_server.step_stream import StepStream
from octavo_server.step_watch import StepWatch
from octavo_server.stream_call import Respond, stream_call
from octavo_server.tracing import Tracing
from octavo_server.traffic import Traffic
from octavo_server.transfer_calls import TransferCalls

SERVICE_NAME = v1.DESCRIPTOR.services_by_name["OctavoService"].full_name
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_PAGE_TOKEN_LEN = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes at once.

    Attributes:
        max_streams: Decode, Append, export, import and reflection streams.
        max_unary_calls: Unary calls that wait for the engine.
        max_silent_calls: Unary calls that have not sent their request.
        max_steps_in_flight: Unanswered steps of one Decode stream.
        max_message_bytes: Bytes of one message received.
        max_sessions: Open sessions.
        lease_s: Lease of a session that asks for none.
        max_lease_s: Longest lease of a session.
        region_bytes: Memory that one Decode stream may share with its client; 0 = none.
    """

    max_streams: int
    max_unary_calls: int
    max_silent_calls: int
    max_steps_in_flight: int
    max_message_bytes: int
    max_sessions: int
    lease_s: float
    max_lease_s: float
    region_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says of itself."""

    version: str
    incarnation: str
    backend: str
    backend_description: str


class OctavoService:
    """Handlers of every call.

    Args:
        engine: Does the work.
        auth: Tells whose call it is.
        identity: For ServerInfo.
        limits: Of streams, steps, sessions and messages.
        tracing: Watches calls and steps, where the config asks for it.
    """

    def __init__(
        self,
        engine: Engine,
        auth: Auth,
        identity: Identity,
        limits: Limits,
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._auth = auth
        self.identity = identity
        self._limits = limits
        self._traffic = Traffic()
        self._watch = StepWatch(self._traffic, tracing)
        self._started_at = time.monotonic()
        self._waiting_calls = self._gate(
            Reason.QUEUE_FULL, "waiting unary calls", limits.max_unary_calls
        )
        self.streams = self._gate(Reason.STREAM_LIMIT, "streams", limits.max_streams)
        self._transfers = TransferCalls(
            engine, auth, self.streams, self._traffic, limits.max_lease_s
        )
        self._step_streams: set[StepStream] = set()

    def stats(self) -> ServerStats:
        """Return what the server has done since its start, and what it holds now."""
        received_bytes, sent_bytes = self._traffic.num_bytes
        return ServerStats(
            engine=self._engine.stats(),
            refusals=self._traffic.refusals,
            received_bytes=received_bytes,
            sent_bytes=sent_bytes,
            max_sessions=self._limits.max_sessions,
            num_streams=self.streams.num_open,
            max_streams=self.streams.limit,
            uptime_s=time.monotonic() - self._started_at,
        )

    def count_refusal(self, error: OctavoError) -> None:
        """Count a call that was refused before it came here."""
        self._traffic.count_refusal(error)

    def end_streams(self, error: OctavoError) -> None:
        """End every Decode stream with an error; call it once the engine has drained."""
        for stream in list(self._step_streams):
            stream.end(error)

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """Return the calls as a handler for grpc.Server."""
        unary: dict[str, Callable[[Any, grpc.ServicerContext], Message]] = {
            "ServerInfo": self._server_info,
            "ServerStats": self._server_stats,
            "OpenSession": self._open_session,
            "KeepAlive": self._keep_alive,
            "GetSession": self._get_session,
            "ListSessions": self._list_sessions,
            "TruncateSession": self._truncate_session,
            "CloseSession": self._close_session,
            "DecodeOnce": self._decode_once,
        }
        reader = RequestReader(self._limits.max_silent_calls)
        handlers = {
            name: unary_handler(getattr(v1, f"{name}Request"), call, reader, self._traffic)
            for name, call in unary.items()
        }
        handlers |= self._transfers.handlers(reader)
        handlers["Append"] = grpc.stream_unary_rpc_method_handler(self._append)
        if self._watch.tracing is not None:
            handlers = self._watch.tracing.watch_calls(handlers)
        handlers["Decode"] = grpc.stream_stream_rpc_method_handler(responding(self._decode))
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def _server_info(
        self, _request: v1.ServerInfoRequest, _context: grpc.ServicerContext
    ) -> v1.ServerInfoResponse:
        return v1.ServerInfoResponse(
            version=self.identity.version,
            incarnation=self.identity.incarnation,
            backend=self.identity.backend,
            backend_description=self.identity.backend_description,
            models=[codec.write_model(pool) for pool in self._engine.pools.values()],
            max_message_bytes=self._limits.max_message_bytes,
            max_steps_in_flight=self._limits.max_steps_in_flight,
            num_sessions=len(self._engine.sessions),
            max_sessions=self._limits.max_sessions,
            default_lease_ms=round(self._limits.lease_s * 1000),
            max_lease_ms=round(self._limits.max_lease_s * 1000),
        )

    def _server_stats(
        self, _request: v1.ServerStatsRequest, _context: grpc.ServicerContext
    ) -> v1.ServerStatsResponse:
        return codec.write_stats(self.stats())

    def _open_session(
        self, request: v1.OpenSessionRequest, context: grpc.ServicerContext
    ) -> v1.OpenSessionResponse:
        codec.check_request_id(request.request_id)
        state = self._engine.sessions.open(
            request.model, self._auth.tenant(context), self._options(request), request.request_id
        )
        return v1.OpenSessionResponse(session=codec.write_session(state))

    def _options(self, request: v1.OpenSessionRequest) -> SessionOptions:
        asked = codec.read_options(request)
        lease_s = min(asked.lease_s or self._limits.lease_s, self._limits.max_lease_s)
        return asked._replace(lease_s=lease_s)

    def _keep_alive(
        self, request: v1.KeepAliveRequest, context: grpc.ServicerContext
    ) -> v1.KeepAliveResponse:
        session_ids = request.session_ids
        if len(session_ids) > MAX_ENTRIES:
            expected = f"at most {MAX_ENTRIES} ids"
            raise mismatch(Reason.MALFORMED_MESSAGE, "session_ids", expected, len(session_ids))
        renewed = self._engine.sessions.keep_alive(session_ids, self._auth.tenant(context))
        leases = map(codec.write_lease, session_ids, renewed)
        return v1.KeepAliveResponse(leases=leases)

    def _get_session(
        self, request: v1.GetSessionRequest, context: grpc.ServicerContext
    ) -> v1.GetSessionResponse:
        state = self._engine.sessions.get(request.session_id, self._auth.tenant(context))
        return v1.GetSessionResponse(session=codec.write_session(state))

    def _list_sessions(
        self, request: v1.ListSessionsRequest, context: grpc.ServicerContext
    ) -> v1.ListSessionsResponse:
        token = request.page_token or "0"
        if len(token) > MAX_PAGE_TOKEN_LEN or not (token.isascii() and token.isdecimal()):
            expected = "a next_page_token of ListSessions"
            raise mismatch(Reason.MALFORMED_MESSAGE, "page_token", expected, repr(token))
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        tenant = self._auth.tenant(context)
        states, next_idx = self._engine.sessions.page(tenant, int(token), size)
        return v1.ListSessionsResponse(
            sessions=map(codec.write_session, states),
            next_page_token=str(next_idx) if next_idx else "",
        )

    def _truncate_session(
        self, request: v1.TruncateSessionRequest, context: grpc.ServicerContext
    ) -> v1.TruncateSessionResponse:
        with self._waiting_calls.open(context):
            tenant = self._auth.tenant(context)
            future = self._engine.sessions.truncate(
                request.session_id, tenant, request.length, request.expected_lengths
            )
            state = Caller(context).wait(future)
        return v1.TruncateSessionResponse(session=codec.write_session(state))

    def _close_session(
        self, request: v1.CloseSessionRequest, context: grpc.ServicerContext
    ) -> v1.CloseSessionResponse:
        with self._waiting_calls.open(context):
            tenant = self._auth.tenant(context)
            future = self._engine.sessions.close(request.session_id, tenant)
            num_freed = Caller(context).wait(future)
        return v1.CloseSessionResponse(num_freed_blocks=num_freed)

    def _decode_once(
        self, request: v1.DecodeOnceRequest, context: grpc.ServicerContext
    ) -> v1.DecodeOnceResponse:
        with self._waiting_calls.open(context):
            step = request.step
            caller = Caller(context)
            origin = StepOrigin(self._auth.tenant(context), lambda: caller.has_left)
            with self._watch.unary(step.step_id, step.step_key):
                step_request = codec.read_step(step, codec.step_tensors(step))
                answer = self._run_step(step_request, caller, origin)
            self._watch.on_answer(step.step_id, step.step_key, answer)
        return v1.DecodeOnceResponse(result=codec.write_result(step.step_id, answer))

    def _append(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        stored = v1.AppendResponse()
        removals: list[OctavoError] = []
        with (
            self.streams.open(context),
            self._traffic.stream() as traffic,
            refusing(context, self._traffic, stored),
            self._auth.holding(context, removals.append),
        ):
            caller = Caller(context)
            origin = StepOrigin(self._auth.tenant(context), lambda: caller.has_left)
            for data in traffic.receiving(requests):
                for removal in removals:
                    raise removal
                request = codec.read_append(data)
                with self._watch.unary(stored.num_messages, request.step_key):
                    answer = self._run_step(request, caller, origin)
                    for error in answer.entry_errors.values():
                        raise error
                stored.num_messages += 1
                self._write_session(stored.session, request.handles[0], origin)
            response = stored.SerializeToString()
            traffic.sent_bytes += len(response)
        return response

    def _decode(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, respond: Respond
    ) -> None:
        with (
            refusing(context, self._traffic),
            self.streams.open(context),
            self._traffic.stream() as traffic,
            StreamMemory(self._limits.region_bytes) as memory,
        ):
            stream = StepStream(
                self._engine,
                self._auth.tenant(context),
                stream_call(requests, context, respond),
                self._limits.max_steps_in_flight,
                self._watch,
                memory,
                traffic,
            )
            self._step_streams.add(stream)
            try:
                with self._auth.holding(context, stream.end):
                    stream.run()
            finally:
                self._step_streams.discard(stream)

    def _gate(self, reason: Reason, what: str, limit: int) -> Gate:
        return Gate(limit_reached(reason, what, limit), limit, self._traffic)

    def _write_session(self, session: v1.Session, handle: int, origin: StepOrigin) -> None:
        state = self._engine.sessions.get_by_handle(handle, origin.tenant)
        session.CopyFrom(codec.write_session(state))

    def _run_step(self, request: StepRequest, caller: Caller, origin: StepOrigin) -> StepAnswer:
        """Run a step and wait for its answer; raises its error, or CancelledError when the client has gone."""
        future: Future[StepAnswer] = Future()
        self._engine.submit(
            request,
            lambda answer: _resolve(future, answer),
            origin,
            lead_s=math.inf,
        )
        answer = caller.wait(future)
        if answer.error is not None:
            raise answer.error
        return answer


def _resolve(future: Future[StepAnswer], answer: StepAnswer) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(answer)
