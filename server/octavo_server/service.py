"""The calls of octavo.v1.OctavoService: decode a message, ask the engine, encode the answer; no logic.

Handlers take raw bytes and parse them here, so that garbage is refused with a reason too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from octavo import v1
from octavo_server import codec, status
from octavo_server.engine import Engine
from octavo_server.errors import OctavoError, Reason, limit_reached, mismatch
from octavo_server.request_reader import RequestReader
from octavo_server.shared_memory import StreamMemory
from octavo_server.stats import ServerStats
from octavo_server.step import StepAnswer, StepRequest
from octavo_server.step_stream import StepStream
from octavo_server.stream_call import Respond, stream_call
from octavo_server.traffic import Traffic

SERVICE_NAME = v1.DESCRIPTOR.services_by_name["OctavoService"].full_name
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_PAGE_TOKEN_LEN = 20
MAX_REQUEST_ID_LEN = 128

Request = TypeVar("Request", bound=Message)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes at once.

    Attributes:
        max_streams: Decode, Append and reflection streams.
        max_unary_calls: Unary calls that wait for the engine.
        max_silent_calls: Unary calls that have not sent their request.
        max_steps_in_flight: Unanswered steps of one Decode stream.
        max_message_bytes: Bytes of one message received.
        region_bytes: Memory that one Decode stream may share with its client; 0 = none.
    """

    max_streams: int
    max_unary_calls: int
    max_silent_calls: int
    max_steps_in_flight: int
    max_message_bytes: int
    region_bytes: int = 0


class Gate:
    """Counts what is open of something limited, and refuses the next.

    Args:
        refusal: Of the next.
        limit: Most that may be open at once.
        traffic: Counts the refusals.
    """

    def __init__(self, refusal: OctavoError, limit: int, traffic: Traffic) -> None:
        self.limit = limit
        self._refusal = refusal
        self._traffic = traffic
        self._lock = threading.Lock()
        self.num_open = 0

    @contextmanager
    def open(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold a place while a call runs; end the call when none is left."""
        with self._lock:
            is_full = self.num_open == self.limit
            self.num_open += not is_full
        if is_full:
            self._traffic.count_refusal(self._refusal)
            status.abort(context, self._refusal)
        try:
            yield
        finally:
            with self._lock:
                self.num_open -= 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says of itself."""

    version: str
    incarnation: str
    backend: str
    backend_description: str
    max_sessions: int


class OctavoService:
    """Handlers of every call.

    Args:
        engine: Does the work.
        identity: For ServerInfo.
        limits: Of streams, steps and messages.
    """

    def __init__(self, engine: Engine, identity: Identity, limits: Limits) -> None:
        self._engine = engine
        self._identity = identity
        self._limits = limits
        self._traffic = Traffic()
        self._waiting_calls = self._gate(
            Reason.QUEUE_FULL, "waiting unary calls", limits.max_unary_calls
        )
        self.streams = self._gate(Reason.STREAM_LIMIT, "streams", limits.max_streams)
        self._step_streams: set[StepStream] = set()

    def stats(self) -> ServerStats:
        """Return what the server has done since its start, and what it holds now."""
        received_bytes, sent_bytes = self._traffic.num_bytes
        return ServerStats(
            engine=self._engine.stats(),
            refusals=self._traffic.refusals,
            received_bytes=received_bytes,
            sent_bytes=sent_bytes,
            num_streams=self.streams.num_open,
            max_streams=self.streams.limit,
        )

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
        handlers["Append"] = grpc.stream_unary_rpc_method_handler(self._append)
        handlers["Decode"] = grpc.stream_stream_rpc_method_handler(responding(self._decode))
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    def _server_info(
        self, _request: v1.ServerInfoRequest, _context: grpc.ServicerContext
    ) -> v1.ServerInfoResponse:
        return v1.ServerInfoResponse(
            version=self._identity.version,
            incarnation=self._identity.incarnation,
            backend=self._identity.backend,
            backend_description=self._identity.backend_description,
            models=[codec.write_model(pool) for pool in self._engine.pools.values()],
            max_message_bytes=self._limits.max_message_bytes,
            max_steps_in_flight=self._limits.max_steps_in_flight,
            num_sessions=self._engine.num_sessions,
            max_sessions=self._identity.max_sessions,
        )

    def _server_stats(
        self, _request: v1.ServerStatsRequest, _context: grpc.ServicerContext
    ) -> v1.ServerStatsResponse:
        return codec.write_stats(self.stats())

    def _open_session(
        self, request: v1.OpenSessionRequest, _context: grpc.ServicerContext
    ) -> v1.OpenSessionResponse:
        if len(request.request_id) > MAX_REQUEST_ID_LEN:
            expected = f"at most {MAX_REQUEST_ID_LEN} characters"
            actual = f"{len(request.request_id)} characters"
            raise mismatch(Reason.MALFORMED_MESSAGE, "request_id", expected, actual)
        state = self._engine.open_session(request.model, request.request_id)
        return v1.OpenSessionResponse(session=codec.write_session(state))

    def _get_session(
        self, request: v1.GetSessionRequest, _context: grpc.ServicerContext
    ) -> v1.GetSessionResponse:
        state = self._engine.get_session(request.session_id)
        return v1.GetSessionResponse(session=codec.write_session(state))

    def _list_sessions(
        self, request: v1.ListSessionsRequest, _context: grpc.ServicerContext
    ) -> v1.ListSessionsResponse:
        token = request.page_token or "0"
        if len(token) > MAX_PAGE_TOKEN_LEN or not (token.isascii() and token.isdecimal()):
            expected = "a next_page_token of ListSessions"
            raise mismatch(Reason.MALFORMED_MESSAGE, "page_token", expected, repr(token))
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        states, next_idx = self._engine.list_sessions(int(token), size)
        return v1.ListSessionsResponse(
            sessions=map(codec.write_session, states),
            next_page_token=str(next_idx) if next_idx else "",
        )

    def _truncate_session(
        self, request: v1.TruncateSessionRequest, context: grpc.ServicerContext
    ) -> v1.TruncateSessionResponse:
        with self._waiting_calls.open(context):
            future = self._engine.truncate_session(
                request.session_id, request.length, request.expected_lengths
            )
            state = _Caller(context).wait(future)
        return v1.TruncateSessionResponse(session=codec.write_session(state))

    def _close_session(
        self, request: v1.CloseSessionRequest, context: grpc.ServicerContext
    ) -> v1.CloseSessionResponse:
        with self._waiting_calls.open(context):
            future = self._engine.close_session(request.session_id)
            num_freed = _Caller(context).wait(future)
        return v1.CloseSessionResponse(num_freed_blocks=num_freed)

    def _decode_once(
        self, request: v1.DecodeOnceRequest, context: grpc.ServicerContext
    ) -> v1.DecodeOnceResponse:
        with self._waiting_calls.open(context):
            step = request.step
            step_request = codec.read_step(step, codec.step_tensors(step))
            answer = self._run_step(step_request, _Caller(context))
            self._count_refusals(answer)
        return v1.DecodeOnceResponse(result=codec.write_result(step.step_id, answer))

    def _append(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        stored = v1.AppendResponse()
        with (
            self.streams.open(context),
            self._traffic.stream() as traffic,
            refusing(context, self._traffic, stored),
        ):
            caller = _Caller(context)
            for data in traffic.receiving(requests):
                request = codec.read_append(data)
                answer = self._run_step(request, caller)
                for error in answer.entry_errors.values():
                    raise error
                stored.num_messages += 1
                self._write_session(stored.session, request.handles[0])
            response = stored.SerializeToString()
            traffic.sent_bytes += len(response)
        return response

    def _decode(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, respond: Respond
    ) -> None:
        with (
            self.streams.open(context),
            self._traffic.stream() as traffic,
            StreamMemory(self._limits.region_bytes) as memory,
        ):
            stream = StepStream(
                self._engine,
                stream_call(requests, context, respond),
                self._limits.max_steps_in_flight,
                self._count_refusals,
                memory,
                traffic,
            )
            self._step_streams.add(stream)
            try:
                stream.run()
            finally:
                self._step_streams.discard(stream)

    def _gate(self, reason: Reason, what: str, limit: int) -> Gate:
        return Gate(limit_reached(reason, what, limit), limit, self._traffic)

    def _count_refusals(self, answer: StepAnswer) -> None:
        if answer.error is not None:
            self._traffic.count_refusal(answer.error)
        for error in answer.entry_errors.values():
            self._traffic.count_refusal(error)

    def _write_session(self, session: v1.Session, handle: int) -> None:
        state = self._engine.get_session_by_handle(handle)
        session.CopyFrom(codec.write_session(state))

    def _run_step(self, request: StepRequest, caller: _Caller) -> StepAnswer:
        """Run a step and wait for its answer; raises its error, or CancelledError when the client has gone."""
        future: Future[StepAnswer] = Future()
        self._engine.submit(
            request,
            lambda answer: _resolve(future, answer),
            future.cancelled,
            client=caller,
            lead_s=math.inf,
        )
        answer = caller.wait(future)
        if answer.error is not None:
            raise answer.error
        return answer


def _resolve(future: Future[StepAnswer], answer: StepAnswer) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(answer)


class _Caller:
    """The client of one call, who waits for the engine's futures one after the other; its leaving cancels them."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._future: Future[Any] | None = None
        self._has_left = not context.add_callback(self._leave)

    def wait(self, future: Future[Result]) -> Result:
        """Return a future's result; raises CancelledError when the client has gone before it was begun."""
        self._future = future
        if self._has_left:
            future.cancel()
        return future.result()

    def _leave(self) -> None:
        self._has_left = True
        if self._future is not None:
            self._future.cancel()


@contextmanager
def refusing(context: grpc.ServicerContext, traffic: Traffic, *details: Message) -> Iterator[None]:
    """End the call with the status of a refusal raised inside, and `details` beside the ErrorInfo; count it."""
    try:
        yield
    except OctavoError as error:
        traffic.count_refusal(error)
        status.abort(context, error, *details)
    except CancelledError:
        context.abort(grpc.StatusCode.CANCELLED, "the client cancelled the call")


def unary_handler(
    request_type: type[Request],
    call: Callable[[Request, grpc.ServicerContext], Message],
    reader: RequestReader,
    traffic: Traffic,
    threads: ThreadPoolExecutor | None = None,
) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return the handler of a unary call.

    Args:
        request_type: What the call takes.
        call: Answers it.
        reader: Reads the request.
        traffic: Counts its messages and refusals.
        threads: Where the call runs, if not in the server's own pool.
    """

    def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        data = reader.read(requests, context)
        traffic.count_call(len(data), 0)
        with refusing(context, traffic):
            response = call(codec.parse(request_type, data), context).SerializeToString()
        traffic.count_call(0, len(response))
        return response

    return grpc.stream_unary_rpc_method_handler(run_in(threads, handle))


def responding(behaviour: Callable[[Any, grpc.ServicerContext, Any], None]) -> Any:
    """Return a behaviour to which gRPC hands the function that sends responses, rather than iterate over them."""

    def respond_to(requests: Any, context: grpc.ServicerContext, respond: Any) -> None:
        behaviour(requests, context, respond)

    respond_to.experimental_non_blocking = True  # type: ignore[attr-defined]
    return respond_to


def run_in(threads: ThreadPoolExecutor | None, behaviour: Any) -> Any:
    """Return a behaviour that gRPC runs in a pool of its own, where there is one."""
    behaviour.experimental_thread_pool = threads
    return behaviour
