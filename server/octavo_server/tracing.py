"""OpenTelemetry traces of calls and steps. A step costs nothing here unless it is sampled.

A sampled step takes a note of what its stages cost; its spans are made from that afterwards, on a thread of their own,
with the times that the stages had. Who decides is the client's span where there is one, else `trace_sample_ratio`.
"""

from __future__ import annotations

import functools
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from octavo import v1
from octavo_server.backends.base import UnsupportedError
from octavo_server.config_keys import ServerConfig
from octavo_server.step import StepAnswer, StepRequest

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

MAX_NOTES = 1024
"""Sampled steps whose spans are not made yet; further ones are not traced."""

EXPORT_S = 2.0
"""Time that one export has; at the end of the server it is what a collector that is away may cost."""

_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACE_PARENT_LEN = 128
_STAGES = ("queue", "copy_in", "kernel", "copy_out")

Answer = Callable[[StepAnswer], None]


class TraceParent(NamedTuple):
    """A span of the client's, as W3C's traceparent names it."""

    trace_id: int
    span_id: int
    is_sampled: bool


def parse_trace_parent(text: str) -> TraceParent | None:
    """Return the span that a traceparent names; None when it names none."""
    if len(text) > _MAX_TRACE_PARENT_LEN:
        return None
    match = _TRACE_PARENT.fullmatch(text)
    if match is None or text.startswith("ff"):
        return None
    trace_id, span_id, flags = (int(match[group], 16) for group in (1, 2, 3))
    return TraceParent(trace_id, span_id, bool(flags & 1)) if trace_id and span_id else None


class _Note(NamedTuple):
    """What the spans of a step are made from; times in nanoseconds since the epoch."""

    parent: TraceParent | None
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    answer: StepAnswer


class Tracing:
    """The spans of one server.

    Args:
        provider: Makes and exports spans; `close` shuts it down.
        sample_ratio: Share of the calls and steps without a parent that are traced.
    """

    def __init__(self, provider: TracerProvider, sample_ratio: float) -> None:
        from opentelemetry import trace  # noqa: PLC0415

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("octavo_server")
        self._sample_ratio = sample_ratio
        self._notes: Queue[_Note | None] = Queue(MAX_NOTES)
        self._worker = threading.Thread(target=self._make_spans, name="octavo-tracing", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Make the spans that are due, and export all that there are."""
        self._notes.put(None)
        self._worker.join()
        self._provider.shutdown()

    def watch_step(
        self, step: v1.Step, request: StepRequest, arrived_at: float, answer: Answer
    ) -> tuple[StepRequest, Answer]:
        """Return a step and its answer's receiver as the engine is to take them: as they are, unless it is sampled.

        Args:
            step: The step.
            request: What it asks for.
            arrived_at: When it was read, on time.monotonic().
            answer: Takes its answer.
        """
        parent = parse_trace_parent(step.trace_parent) if step.trace_parent else None
        if not self._samples(parent):
            return request, answer

        def note(made: StepAnswer) -> None:
            self._take_note(parent, step, arrived_at, made)
            if not request.return_stage_times:
                made.stage_times = None
            answer(made)

        return request._replace(return_stage_times=True), note

    def watch_calls(
        self, handlers: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]]
    ) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        """Return handlers, by the name of their call, with a span around each call that has one response."""
        return {name: self._watch_call(name, handler) for name, handler in handlers.items()}

    def _watch_call(
        self, name: str, handler: grpc.RpcMethodHandler[bytes, bytes]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        behaviour: Any = handler.stream_unary
        if behaviour is None:
            return handler

        @functools.wraps(behaviour)
        def traced(requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            with self._call_span(name, context):
                return behaviour(requests, context)

        return grpc.stream_unary_rpc_method_handler(traced)

    @contextmanager
    def _call_span(self, name: str, context: grpc.ServicerContext) -> Iterator[None]:
        parent = _parent_in(context)
        if not self._samples(parent):
            yield
            return
        span = self._start_span(name, parent, time.time_ns(), {"rpc.system": "grpc"})
        try:
            yield
        except BaseException:
            code = context.code() or grpc.StatusCode.UNKNOWN  # type: ignore[attr-defined]
            self._set_error(span, getattr(code, "name", str(code)))
            raise
        finally:
            span.end()

    def _samples(self, parent: TraceParent | None) -> bool:
        if parent is not None:
            return parent.is_sampled
        return random.random() < self._sample_ratio

    def _take_note(
        self, parent: TraceParent | None, step: v1.Step, arrived_at: float, answer: StepAnswer
    ) -> None:
        ended_ns = time.time_ns()
        began_ns = ended_ns - round((time.monotonic() - arrived_at) * 1e9)
        attributes = {
            "octavo.step_id": step.step_id,
            "octavo.step_key": f"{step.step_key:016x}",
            "octavo.num_entries": len(step.session_handles),
            "octavo.num_tokens": sum(step.num_tokens),
        }
        # The answer goes on to be sent; what is noted of it stays as it is now.
        outcome = StepAnswer(
            entry_errors=answer.entry_errors, error=answer.error, stage_times=answer.stage_times
        )
        # A step that is late for its spans is worse than one without.
        with suppress(Full):
            self._notes.put_nowait(_Note(parent, began_ns, ended_ns, attributes, outcome))

    def _make_spans(self) -> None:
        while (note := self._notes.get()) is not None:
            try:
                self._make_step_spans(note)
            except Exception:
                log.exception("the spans of a step could not be made")

    def _make_step_spans(self, note: _Note) -> None:
        answer = note.answer
        span = self._start_span("octavo.step", note.parent, note.began_ns, note.attributes)
        times = answer.stage_times
        if times is not None:
            span.set_attribute("octavo.batch_size", times.batch_size)
            span.set_attribute("octavo.batch_tokens", times.batch_tokens)
            context = self._trace.set_span_in_context(span)
            at_ns = note.began_ns
            for stage in _STAGES:
                stage_span = self._tracer.start_span(f"octavo.{stage}", context, start_time=at_ns)
                at_ns += 1000 * getattr(times, f"{stage}_us")
                stage_span.end(at_ns)
        if answer.error is not None:
            self._set_error(span, str(answer.error.reason))
        elif answer.entry_errors:
            reasons = sorted({str(error.reason) for error in answer.entry_errors.values()})
            span.set_attribute("octavo.refused_entries", len(answer.entry_errors))
            self._set_error(span, ", ".join(reasons))
        span.end(note.ended_ns)

    def _start_span(
        self, name: str, parent: TraceParent | None, start_ns: int, attributes: dict[str, Any]
    ) -> Span:
        return self._tracer.start_span(
            name,
            self._context_of(parent),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=start_ns,
        )

    def _context_of(self, parent: TraceParent | None) -> Context:
        # Never that of the thread: a span without a parent begins a trace of its own.
        span: Span = self._trace.INVALID_SPAN
        if parent is not None:
            flags = self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED)
            context = self._trace.SpanContext(parent.trace_id, parent.span_id, True, flags)
            span = self._trace.NonRecordingSpan(context)
        return self._trace.set_span_in_context(span)

    def _set_error(self, span: Span, reason: str) -> None:
        span.set_attribute("error.type", reason)
        span.set_status(self._trace.StatusCode.ERROR, reason)


def create_tracing(config: ServerConfig, version: str, incarnation: str) -> Tracing | None:
    """Return tracing that exports to the config's otlp_endpoint by OTLP over gRPC; None when there is none.

    Args:
        config: The server's; an endpoint of https means TLS.
        version: Version of the server's software.
        incarnation: Name of the server's process.

    Raises:
        UnsupportedError: OpenTelemetry is not installed.
    """
    if not config.otlp_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"otlp_endpoint is set, and the package {error.name} is not installed; "
            'pip install "octavo[otel]", or leave otlp_endpoint empty'
        ) from None
    resource = Resource.create(
        {
            "service.name": "octavo-server",
            "service.version": version,
            "service.instance.id": incarnation,
        }
    )
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    is_plain = not config.otlp_endpoint.startswith("https:")
    exporter = OTLPSpanExporter(config.otlp_endpoint, insecure=is_plain, timeout=EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, config.trace_sample_ratio)


def _parent_in(context: grpc.ServicerContext) -> TraceParent | None:
    for key, value in context.invocation_metadata():
        if key == "traceparent":
            return parse_trace_parent(value if isinstance(value, str) else "")
    return None
