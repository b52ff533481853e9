"""Traces of a real server, as a collector receives them: calls and steps, below the client's spans or on their own."""

from __future__ import annotations

import asyncio
import builtins
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider

import octavo_client as oc
from octavo import v1
from octavo_client._tracing import trace_metadata, trace_parent
from octavo_server.backends.base import UnsupportedError
from octavo_server.tracing import parse_trace_parent
from tests.rpc.checked_session import draw_prompt, draw_step
from tests.rpc.conftest import serving
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Caching, Wire

STAGES = ["octavo.queue", "octavo.copy_in", "octavo.kernel", "octavo.copy_out"]


class Collector:
    """Keeps the spans that are sent to it, and the attributes of who sent them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self.url = ""

    def export(self, request: Any, _context: grpc.ServicerContext) -> Any:
        """Take a batch."""
        for resource_spans in request.resource_spans:
            attributes = resource_spans.resource.attributes
            self.resource |= {pair.key: pair.value.string_value for pair in attributes}
            for scope_spans in resource_spans.scope_spans:
                self.spans += scope_spans.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """Return the spans of a name, in the order of their start."""
        found = [span for span in self.spans if span.name == name]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    export = grpc.unary_unary_rpc_method_handler(
        collector.export,
        trace_service_pb2.ExportTraceServiceRequest.FromString,
        trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    handler = grpc.method_handlers_generic_handler(service, {"Export": export})
    server.add_generic_rpc_handlers((handler,))
    collector.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collector
    server.stop(0).wait()


@contextmanager
def traced(collector: Any, ratio: float) -> Iterator[tuple[Wire, oc.Client]]:
    """Run a server; when this is left, all its spans are with the collector."""
    with (
        serving(otlp_endpoint=collector.url, trace_sample_ratio=ratio) as wire,
        oc.Client(wire.address) as client,
    ):
        yield wire, client


def attributes_of(span: Span) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, str(pair.value.WhichOneof("value")))
        for pair in span.attributes
    }


def test_steps_and_calls_have_spans_with_their_stages_below(collector: Collector) -> None:
    with traced(collector, 1.0) as (_, client):
        session = client.open_session(MODEL)
        session.append(*draw_prompt(20))
        result = session.decode(0, *draw_step())
        assert result.stage_times is None, "the client did not ask for them"
        with pytest.raises(oc.PositionMismatch):
            session.decode(0, *draw_step(), start_pos=3)
        with pytest.raises(oc.ModelNotFound):
            client.open_session("other")
    assert collector.resource["service.name"] == "octavo-server"
    good, refused = collector.named("octavo.step")
    assert not good.parent_span_id
    assert good.kind == Span.SPAN_KIND_SERVER
    assert attributes_of(good)["octavo.num_tokens"] == 1
    assert attributes_of(good)["octavo.batch_size"] == 1
    stages = [span for span in collector.spans if span.parent_span_id == good.span_id]
    stages.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    assert [span.name for span in stages] == STAGES
    assert stages[0].start_time_unix_nano == good.start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= good.end_time_unix_nano + 2000
    assert all(span.trace_id == good.trace_id for span in stages)
    assert attributes_of(refused)["error.type"] == "POSITION_MISMATCH"
    opened, not_found = collector.named("OpenSession")
    assert (opened.status.code, not_found.status.code) == (0, 2)
    assert attributes_of(not_found)["error.type"] == "NOT_FOUND"
    assert len(collector.named("Append")) == 1


def test_the_clients_span_decides_and_is_the_parent(collector: Collector) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    tracer = provider.get_tracer("test")

    async def ask(wire: Wire) -> None:
        async with oc.AsyncClient(wire.address) as other:
            await other.server_stats()

    with traced(collector, 0.0) as (wire, client):
        session = client.open_session(MODEL)
        session.decode(0, *draw_step())
        with tracer.start_as_current_span("token") as span:
            session.decode(0, *draw_step())
            session.append(*draw_prompt(3))
            client.server_info()
            asyncio.run(ask(wire))
            session.decode(1, draw_step()[0], timeout=5)
        session.decode(0, *draw_step())
    context = span.get_span_context()
    steps = collector.named("octavo.step")
    assert len(steps) == 2
    calls = [collector.named(name) for name in ("Append", "ServerInfo", "ServerStats")]
    assert [len(spans) for spans in calls] == [1, 1, 1]
    for below in (*steps, *chain(*calls)):
        assert int.from_bytes(below.trace_id) == context.trace_id
        assert int.from_bytes(below.parent_span_id) == context.span_id
    assert not collector.named("OpenSession")
    provider.shutdown()


def test_a_parent_that_is_not_sampled_is_obeyed(collector: Collector) -> None:
    unsampled, sampled = (f"00-{'1' * 32}-{'2' * 16}-0{flag}" for flag in "01")
    with traced(collector, 1.0) as (wire, client):
        handle = client.open_session(MODEL)._mirror.handle
        for start_pos, parent in enumerate((unsampled, sampled)):
            step = wire.step((Caching("", handle), 0, 1), start_pos=[start_pos])
            step.trace_parent = parent
            wire.run(step)
            metadata = [("traceparent", parent)]
            wire.stub.ServerInfo(v1.ServerInfoRequest(), metadata=metadata, timeout=CALL_TIMEOUT_S)
    (step_span,) = collector.named("octavo.step")
    (call_span,) = (span for span in collector.named("ServerInfo") if span.parent_span_id)
    for span in (step_span, call_span):
        assert span.trace_id.hex() == "1" * 32
        assert span.parent_span_id.hex() == "2" * 16


def test_a_span_that_does_not_record_is_not_told_of() -> None:
    assert (trace_parent(), trace_metadata()) == ("", ())
    context = trace.SpanContext(1, 2, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert trace_parent() == ""


def test_without_opentelemetry_there_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("test").start_as_current_span("x"):
        assert trace_parent().startswith("00-")
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        assert trace_parent() == ""
    provider.shutdown()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00-" + "0" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 32 + "-" + "0" * 16 + "-01",
        "ff-" + "1" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "A" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 31 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 32 + "-" + "1" * 16 + "-01-" + "x" * 200,
        "\x00",
    ],
)
def test_what_names_no_span_is_no_parent(text: str) -> None:
    assert parse_trace_parent(text) is None


def test_a_parent_says_whether_it_is_sampled() -> None:
    text = "00-" + "1" * 32 + "-" + "2" * 16
    for flags, is_sampled in (("00", False), ("01", True), ("03", True)):
        parent = parse_trace_parent(f"{text}-{flags}")
        assert parent == (int("1" * 32, 16), int("2" * 16, 16), is_sampled)


def test_a_collector_that_is_away_does_not_matter() -> None:
    with (
        serving(otlp_endpoint="http://127.0.0.1:1", trace_sample_ratio=1.0) as wire,
        oc.Client(wire.address) as client,
    ):
        client.open_session(MODEL).decode(0, *draw_step())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with (
        pytest.raises(UnsupportedError, match=r"pip install \"octavo\[otel\]\""),
        serving(otlp_endpoint="http://127.0.0.1:1"),
    ):
        pass
