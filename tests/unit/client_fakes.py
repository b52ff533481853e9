"""A server that does what a test tells it to: the position rules without a cache, and planted faults."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from octavo.v1 import octavo_pb2 as pb
from octavo_client import Model, SessionState
from octavo_client._mirror import Mirror

NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 8
HANDLE = 11
SESSION_ID = "run1-session"

Step = Any
Fault = Callable[[Step], "pb.StepResult | None"]


def model(name: str = "tiny") -> Model:
    """Return a model of 2 layers with 4 / 2 heads of 8."""
    return Model(
        name=name,
        num_layers=NUM_LAYERS,
        num_q_heads=NUM_Q_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=16,
        max_context=96,
        num_blocks=12,
        num_free_blocks=12,
        sm_scale=(0.35,) * NUM_LAYERS,
        window=(0,) * NUM_LAYERS,
        soft_cap=(0.0,) * NUM_LAYERS,
        sinks=None,
        deterministic=False,
    )


def mirror(*lengths: int, handle: int = HANDLE) -> Mirror:
    """Return the mirror of a session that the server reported with these lengths."""
    return Mirror(SessionState(SESSION_ID, handle, "tiny", lengths or (0, 0), 0), model())


def status(reason: str, code: str, retry_after_s: float = 0, **metadata: object) -> Any:
    """Return a refusal as the server sends it."""
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain="octavo", metadata={k: str(v) for k, v in metadata.items()}
    )
    refusal = status_pb2.Status(code=code_pb2.Code.Value(code), message=f"planted {reason}")
    refusal.details.add().Pack(info)
    if retry_after_s:
        delay = Duration(nanos=int(retry_after_s * 1e9))
        refusal.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return refusal


class FakeServer:
    """One session's lengths and last appends; every rpc counted; faults run before a call or a step is served.

    Attributes:
        calls: How often each rpc was called.
        before: By rpc, run at the start of a call; may abort it.
        after: By rpc, run once a unary call or an Append has taken effect; may abort it.
        on_step: Run before a step is served; returns a result to send instead, or None.
        steps: Every step received.
        opens: Every request for a session.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.before: dict[str, Callable[[grpc.ServicerContext], None]] = {}
        self.after: dict[str, Callable[[grpc.ServicerContext], None]] = {}
        self.on_step: Fault = lambda step: None
        self.steps: list[Any] = []
        self.appends: list[Any] = []
        self.opens: list[Any] = []
        self.lengths = [0] * NUM_LAYERS
        self.last_appends: dict[int, tuple[int, int, int]] = {}
        self.is_open = True
        self.max_message_bytes = 1 << 20
        self.streams: set[queue.SimpleQueue[pb.StepResult | None]] = set()
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(16)
        self._server = grpc.server(self._executor, options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self._handler(),))
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        """End every call and listen no more."""
        self._server.stop(None).wait()
        self._executor.shutdown()

    def store(self, layer: int, start_pos: int, num_tokens: int, step_key: int) -> Any:
        """Apply an append or a replay; return its refusal otherwise."""
        with self._lock:
            record = (start_pos, num_tokens, step_key)
            if start_pos == self.lengths[layer]:
                self.lengths[layer] += num_tokens
                self.last_appends[layer] = record
                return None
            if self.last_appends.get(layer) == record:
                return None
            values = {"start_pos": start_pos, "length": self.lengths[layer], "layer": layer}
        return status("POSITION_MISMATCH", "FAILED_PRECONDITION", **values)

    def serve(self, step: Any) -> pb.StepResult:
        """Answer a step: what it has for q, and its lse all zeros."""
        result = pb.StepResult(step_id=step.step_id, out=step.q)
        rows = zip(step.layers, step.start_pos, step.num_tokens, strict=True)
        for entry_idx, (layer, start_pos, num_tokens) in enumerate(rows):
            refusal = step.HasField("k") and self.store(layer, start_pos, num_tokens, step.step_key)
            if refusal:
                result.entry_errors.add(entry_idx=entry_idx, error=refusal)
        return result

    def session(self) -> pb.Session:
        """Return the session as calls report it."""
        return pb.Session(
            session_id=SESSION_ID, session_handle=HANDLE, model="tiny", lengths=self.lengths
        )

    def end_streams(self) -> None:
        """End every Decode stream, as a broken connection would."""
        for results in list(self.streams):
            results.put(None)

    def _handler(self) -> Any:
        unary: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            "ServerInfo": (pb.ServerInfoRequest, self._server_info),
            "OpenSession": (pb.OpenSessionRequest, self._open),
            "GetSession": (pb.GetSessionRequest, self._get),
            "TruncateSession": (pb.TruncateSessionRequest, self._truncate),
            "CloseSession": (pb.CloseSessionRequest, self._close),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._around(name, act),
                kind.FromString,
                _encode,
            )
            for name, (kind, act) in unary.items()
        }
        handlers["Append"] = grpc.stream_unary_rpc_method_handler(
            self._around("Append", self._append),
            pb.AppendRequest.FromString,
            _encode,
        )
        handlers["Decode"] = grpc.stream_stream_rpc_method_handler(
            self._decode,
            pb.DecodeRequest.FromString,
            _encode,
        )
        return grpc.method_handlers_generic_handler("octavo.v1.OctavoService", handlers)

    def _around(self, name: str, act: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls[name] += 1
            self.before.get(name, _pass)(context)
            response = act(request)
            if isinstance(response, status_pb2.Status):
                _abort(context, response)
            self.after.get(name, _pass)(context)
            return response

        return handle

    def _server_info(self, _request: Any) -> Any:
        tiny = model()
        described = pb.Model(
            name=tiny.name,
            num_layers=NUM_LAYERS,
            num_q_heads=NUM_Q_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
        )
        return pb.ServerInfoResponse(
            incarnation="run1", models=[described], max_message_bytes=self.max_message_bytes
        )

    def _open(self, request: Any) -> Any:
        self.opens.append(request)
        return pb.OpenSessionResponse(session=self.session())

    def _get(self, _request: Any) -> Any:
        return pb.GetSessionResponse(session=self.session())

    def _truncate(self, request: Any) -> Any:
        self.lengths = [min(length, request.length) for length in self.lengths]
        return pb.TruncateSessionResponse(session=self.session())

    def _close(self, _request: Any) -> Any:
        if not self.is_open:
            return status("SESSION_NOT_FOUND", "NOT_FOUND", session_id=SESSION_ID)
        self.is_open = False
        return pb.CloseSessionResponse()

    def _append(self, requests: Iterator[Any]) -> Any:
        num_messages = 0
        for message in requests:
            self.appends.append(message)
            refusal = self.store(
                message.layer, message.start_pos, message.num_tokens, message.step_key
            )
            if refusal:
                return refusal
            num_messages += 1
            if self.on_step(message) is not None:
                return status_pb2.Status(code=code_pb2.UNAVAILABLE, message="planted break")
        return pb.AppendResponse(num_messages=num_messages, session=self.session())

    def _decode(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        self.calls["Decode"] += 1
        self.before.get("Decode", _pass)(context)
        results: queue.SimpleQueue[pb.StepResult | None] = queue.SimpleQueue()
        self.streams.add(results)
        threading.Thread(target=self._read, args=(requests, results), daemon=True).start()
        while (result := results.get()) is not None:
            yield pb.DecodeResponse(result=result)
        self.streams.discard(results)
        context.abort(grpc.StatusCode.UNAVAILABLE, "planted break")

    def _read(self, requests: Iterator[Any], results: Any) -> None:
        try:
            for request in requests:
                self.steps.append(request.step)
                result = self.on_step(request.step) or self.serve(request.step)
                if result.step_id:
                    results.put(result)
        except grpc.RpcError:
            results.put(None)


def _pass(_context: grpc.ServicerContext) -> None:
    return None


def _abort(context: grpc.ServicerContext, refusal: Any) -> None:
    context.abort_with_status(rpc_status.to_status(refusal))


def _encode(response: Message) -> bytes:
    return response.SerializeToString()


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Run a fake server."""
    server = FakeServer()
    try:
        yield server
    finally:
        server.end_streams()
        server.stop()


def aborting(code: grpc.StatusCode, *, times: int = 1) -> Callable[[grpc.ServicerContext], None]:
    """Return a fault that ends the first `times` calls with a bare code, as a broken connection does."""
    left = [times]

    def act(context: grpc.ServicerContext) -> None:
        if left[0] > 0:
            left[0] -= 1
            context.abort(code, "planted break")

    return act


def refusing(refusal: Any, *, times: int = 1) -> Callable[[grpc.ServicerContext], None]:
    """Return a fault that ends the first `times` calls with a refusal."""
    left = [times]

    def act(context: grpc.ServicerContext) -> None:
        if left[0] > 0:
            left[0] -= 1
            _abort(context, refusal)

    return act
