"""Speaks octavo.v1 to a server in this process, message by message, with an oracle beside every session."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, cast

import grpc
import numpy as np
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from numpy.typing import NDArray

from octavo import v1
from octavo.v1.octavo_pb2_grpc import OctavoServiceStub
from octavo_client.oracle import AttentionOptions, OracleCache, check
from octavo_server.server import Server
from octavo_server.work import WorkItem
from tests.rpc.gated_backend import GatedBackend
from tests.waiting import wait_until

CALL_TIMEOUT_S = 30
NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 16
MODEL = "tiny"
WINDOWED_MODEL = "windowed"
SM_SCALE = HEAD_DIM**-0.5


@dataclass(slots=True)
class Refusal:
    """A status taken apart."""

    code: int
    reason: str
    metadata: dict[str, str]
    message: str
    has_retry: bool


@dataclass(slots=True)
class Caching:
    """An open session with the tokens that it must hold."""

    session_id: str
    handle: int
    layers: list[OracleCache] = field(
        default_factory=lambda: [OracleCache(AttentionOptions(SM_SCALE)) for _ in range(NUM_LAYERS)]
    )

    def length(self, layer: int) -> int:
        """Tokens of a layer."""
        return len(self.layers[layer])


class Wire:
    """A channel to a server, with short ways to say what the tests say."""

    def __init__(self, server: Server, backend: GatedBackend) -> None:
        self.server = server
        self.backend = backend
        self.rng = np.random.default_rng(7)
        self.address = f"127.0.0.1:{server.port}"
        self.channel = grpc.insecure_channel(self.address, OPTIONS)
        self.stub: Any = OctavoServiceStub(self.channel)  # type: ignore[no-untyped-call]

    def raw(self, kind: str, call: str, service: str = "octavo.v1.OctavoService") -> Any:
        """Return a call that takes and returns bytes; kind is unary_unary, stream_unary or stream_stream."""
        return getattr(self.channel, kind)(f"/{service}/{call}")

    def open(self, model: str = MODEL, request_id: str = "") -> Caching:
        """Open a session."""
        request = v1.OpenSessionRequest(model=model, request_id=request_id)
        session = self.stub.OpenSession(request, timeout=CALL_TIMEOUT_S).session
        return Caching(session.session_id, session.session_handle)

    def close(self, caching: Caching) -> None:
        """Close a session."""
        request = v1.CloseSessionRequest(session_id=caching.session_id)
        self.stub.CloseSession(request, timeout=CALL_TIMEOUT_S)

    def sessions(self) -> list[Caching]:
        """Return the open sessions, without what they hold."""
        listed = self.stub.ListSessions(v1.ListSessionsRequest(), timeout=CALL_TIMEOUT_S).sessions
        return [Caching(session.session_id, session.session_handle) for session in listed]

    def lengths(self, caching: Caching) -> list[int]:
        """Return what the server says it holds."""
        request = v1.GetSessionRequest(session_id=caching.session_id)
        return list(self.stub.GetSession(request, timeout=CALL_TIMEOUT_S).session.lengths)

    def num_free_blocks(self, model: str = MODEL) -> int:
        """Return the free blocks of a model."""
        info = self.stub.ServerInfo(v1.ServerInfoRequest(), timeout=CALL_TIMEOUT_S)
        return int(next(m.num_free_blocks for m in info.models if m.name == model))

    def health(self, service: str) -> str:
        """Return what grpc.health.v1 says of a service."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=CALL_TIMEOUT_S)
        return _health_name(response)

    def watch(self, service: str) -> Iterator[str]:
        """Yield what grpc.health.v1 says of a service, now and whenever that changes."""
        request = health_pb2.HealthCheckRequest(service=service)
        responses = health_pb2_grpc.HealthStub(self.channel).Watch(request, timeout=CALL_TIMEOUT_S)
        return map(_health_name, responses)

    @property
    def queue(self) -> list[WorkItem[Any]]:
        """What waits for its turn, in the order of arrival; `busy` lets it gather."""
        return self.server._engine._scheduler.items

    def wait_for_queued(self, num_items: int) -> None:
        """Wait until so much waits for its turn."""
        wait_until(lambda: len(self.queue) == num_items)

    @property
    def num_overdue(self) -> int:
        """Steps of the queue whose time has passed."""
        return sum(item.deadline <= time.monotonic() for item in self.queue)

    @property
    def num_free_streams(self) -> int:
        """Streams that the server would take now."""
        streams = self.server._service.streams
        return streams.limit - streams.num_open

    @property
    def num_free_calls(self) -> int:
        """Waiting unary calls that the server would take now."""
        calls = self.server._service._waiting_calls
        return calls.limit - calls.num_open

    def draw(self, num_tokens: int, num_heads: int) -> NDArray[np.float32]:
        """Return random rows."""
        shape = (num_tokens, num_heads, HEAD_DIM)
        return self.rng.standard_normal(shape, np.float32)

    def step(self, *entries: tuple[Caching, int, int], **changes: Any) -> v1.Step:
        """Return a step that appends (session, layer, num_tokens) entries at the ends of their layers."""
        total = sum(num_tokens for _, _, num_tokens in entries)
        step = v1.Step(
            step_id=int(self.rng.integers(1, 2**32)),
            step_key=int(self.rng.integers(1, 2**32)),
            session_handles=[caching.handle for caching, _, _ in entries],
            layers=[layer for _, layer, _ in entries],
            start_pos=[
                caching.length(layer) if layer < NUM_LAYERS else 0 for caching, layer, _ in entries
            ],
            num_tokens=[num_tokens for _, _, num_tokens in entries],
            q=tensor(self.draw(total, NUM_Q_HEADS)),
            k=tensor(self.draw(total, NUM_KV_HEADS)),
            v=tensor(self.draw(total, NUM_KV_HEADS)),
        )
        for name, value in changes.items():
            step.ClearField(name)
            if value is not None:
                step.MergeFrom(v1.Step(**{name: value}))
        return step

    def run(self, step: v1.Step) -> v1.StepResult:
        """Run a step on a stream of its own."""
        requests = iter([v1.DecodeRequest(step=step)])
        (response,) = self.stub.Decode(requests, timeout=CALL_TIMEOUT_S)
        assert response.result.step_id == step.step_id
        return response.result  # type: ignore[no-any-return]

    def append(self, caching: Caching, layer: int = 0, num_tokens: int = 3) -> None:
        """Append random tokens by a step and check the answer."""
        step = self.step((caching, layer, num_tokens))
        self.check(step, self.run(step), [(caching, layer)])

    def check(
        self, step: v1.Step, result: v1.StepResult, entries: list[tuple[Caching, int]]
    ) -> None:
        """Check every answer of an appending step against the oracle, whose caches take the step's tokens."""
        assert not result.HasField("error"), result.error.message
        assert not result.entry_errors, result.entry_errors[0].error.message
        start = 0
        for (caching, layer), num_tokens in zip(entries, step.num_tokens, strict=True):
            rows = slice(start, start + num_tokens)
            cache = caching.layers[layer]
            start_pos = len(cache)
            cache.append(array(step.k)[rows], array(step.v)[rows])
            exact = cache.attend(array(step.q)[rows], start_pos=start_pos)
            check(array(result.out)[rows], exact)
            start += num_tokens

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        """Open a Decode stream that takes steps one by one."""
        stream = Stream(self.stub)
        try:
            yield stream
        finally:
            stream.end()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Hold the engine in a launch of a session of its own."""
        caching = self.open()
        self.backend.shut()
        with self.stream() as stream:
            stream.send(self.step((caching, 0, 1)))
            assert self.backend.is_running.wait(CALL_TIMEOUT_S)
            try:
                yield
            finally:
                self.backend.open()
            stream.receive()
        self.close(caching)


class Stream:
    """A Decode stream."""

    def __init__(self, stub: Any, metadata: Any = None) -> None:
        self._requests: SimpleQueue[v1.DecodeRequest | None] = SimpleQueue()
        self.call = stub.Decode(iter(self._requests.get, None), metadata=metadata)

    def send(self, step: v1.Step) -> None:
        """Send a step."""
        self._requests.put(v1.DecodeRequest(step=step))

    def receive(self) -> v1.StepResult:
        """Return the next result."""
        return next(self.call).result  # type: ignore[no-any-return]

    def end(self) -> None:
        """Send no more."""
        self._requests.put(None)


OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

_DTYPES = {np.dtype(np.float16): v1.DATA_TYPE_FLOAT16, np.dtype(np.float32): v1.DATA_TYPE_FLOAT32}


def _health_name(response: health_pb2.HealthCheckResponse) -> str:
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def tensor(values: NDArray[Any]) -> v1.Tensor:
    """Return an array as a message."""
    return v1.Tensor(data=values.tobytes(), dtype=_DTYPES[values.dtype], shape=values.shape)


def array(message: v1.Tensor) -> NDArray[np.float32]:
    """Return a float32 tensor as an array."""
    assert message.dtype == v1.DATA_TYPE_FLOAT32
    return np.frombuffer(message.data, np.float32).reshape(message.shape)


def refusal_of(status: Any) -> Refusal:
    """Take a google.rpc.Status apart, which carries exactly one ErrorInfo."""
    infos, retries = [], []
    for detail in status.details:
        if detail.Is(ErrorInfo.DESCRIPTOR):
            infos.append(ErrorInfo.FromString(detail.value))
        if detail.Is(RetryInfo.DESCRIPTOR):
            retries.append(RetryInfo.FromString(detail.value))
    (info,) = infos
    assert info.domain == "octavo"
    metadata = dict(info.metadata)
    return Refusal(status.code, info.reason, metadata, status.message, bool(retries))


def refusal_of_call(error: grpc.RpcError) -> Refusal:
    """Take the status of a failed call apart."""
    status = rpc_status.from_call(cast(grpc.Call, error))
    assert status is not None, error
    return refusal_of(status)


def as_done(calls: list[Any]) -> Iterator[Any]:
    """Yield calls as they end, without waiting for those that do not."""
    ended: SimpleQueue[Any] = SimpleQueue()
    for call in calls:
        call.add_done_callback(ended.put)
    for _ in calls:
        yield ended.get(timeout=CALL_TIMEOUT_S)


@contextmanager
def unharmed(wire: Wire) -> Iterator[tuple[Caching, Caching]]:
    """Give a session and a neighbour with tokens in them; afterwards both go on as if nothing had been."""
    victim, neighbour = wire.open(), wire.open()
    for caching in (victim, neighbour):
        for layer in range(NUM_LAYERS):
            wire.append(caching, layer, 5)
    free = wire.num_free_blocks()
    yield victim, neighbour
    assert wire.num_free_blocks() == free
    for caching in (victim, neighbour):
        assert wire.lengths(caching) == [caching.length(layer) for layer in range(NUM_LAYERS)]
        for layer in range(NUM_LAYERS):
            wire.append(caching, layer, 2)
