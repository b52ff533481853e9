"""What is fuzzed of calls: what handlers read by themselves, down to what they ask the engine for; and traces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from octavo import v1
from octavo_server import codec, errors
from octavo_server.errors import OctavoError
from octavo_server.service import MAX_PAGE_SIZE, Identity, Limits, OctavoService
from octavo_server.session import SessionOptions
from octavo_server.step import MAX_ENTRIES
from octavo_server.tracing import parse_trace_parent

_MAX_LEASE_S = 100.0
_LIMITS = Limits(
    max_streams=1,
    max_unary_calls=1,
    max_silent_calls=1,
    max_steps_in_flight=1,
    max_message_bytes=2**16,
    max_sessions=1,
    lease_s=10.0,
    max_lease_s=_MAX_LEASE_S,
)


class _Sessions:
    """Stands for the engine's sessions, and checks what is asked of them."""

    def open(self, model: str, _tenant: object, options: SessionOptions, request_id: str) -> Any:
        assert 0 < options.lease_s <= _MAX_LEASE_S
        assert not math.isnan(options.lease_s)
        assert len(request_id) <= codec.MAX_REQUEST_ID_LEN
        raise _refusal()

    def page(self, _tenant: object, after_idx: int, size: int) -> tuple[list[Any], int]:
        assert 0 <= after_idx < 10**20
        assert 1 <= size <= MAX_PAGE_SIZE
        return [], 0

    def keep_alive(self, session_ids: Sequence[str], _tenant: object) -> list[OctavoError]:
        assert len(session_ids) <= MAX_ENTRIES
        return [_refusal() for _ in session_ids]

    def get(self, session_id: str, _tenant: object) -> Any:
        raise _refusal()


class _Engine:
    sessions = _Sessions()


class _Auth:
    def tenant(self, _context: object) -> object:
        return None


_engine: Any = _Engine()
_auth: Any = _Auth()
_context: Any = None
_service = OctavoService(_engine, _auth, Identity("", "", "", ""), _LIMITS)


def fuzz_calls(data: bytes) -> None:
    """Unary calls that read more than protobuf does."""
    for message_type, handler in (
        (v1.OpenSessionRequest, _service._open_session),
        (v1.ListSessionsRequest, _service._list_sessions),
        (v1.KeepAliveRequest, _service._keep_alive),
        (v1.GetSessionRequest, _service._get_session),
    ):
        call: Any = handler
        try:
            call(codec.parse(message_type, data), _context)
        except OctavoError:
            continue


def fuzz_trace_parent(data: bytes) -> None:
    """The span that a step or a call says it belongs to: ignored, or one that W3C's rules allow."""
    parent = parse_trace_parent(data.decode("utf-8", "replace"))
    if parent is not None:
        assert 0 < parent.trace_id < 2**128
        assert 0 < parent.span_id < 2**64
        assert f"{parent.trace_id:032x}-{parent.span_id:016x}" in data.decode()


def _refusal() -> OctavoError:
    return errors.session_not_found("x")
