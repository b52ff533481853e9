"""The caller's OpenTelemetry span, for the server to go on from. OpenTelemetry is never imported here.

A program in whose spans steps are to appear has imported it already; in any other there is nothing to look for.
"""

from __future__ import annotations

import sys
from typing import Any


def trace_parent() -> str:
    """Return the span that records in this thread or task, as W3C's traceparent; empty when none does."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ""
    # Missing while another thread imports it.
    get_current_span = getattr(trace, "get_current_span", None)
    if get_current_span is None:
        return ""
    span = get_current_span()
    if not span.is_recording():
        return ""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that tells a call's server of that span; empty when there is none."""
    parent = trace_parent()
    return (("traceparent", parent),) if parent else ()
