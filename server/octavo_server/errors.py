"""Every reason that the service refuses for, with its canonical gRPC code and metadata: one table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RETRY_DELAY_MS = 100
"""What a refusal that waiting cures asks the client to wait."""

MAX_VALUE_LEN = 200
"""Characters of a quoted value: a refusal travels in a trailer, which gRPC limits to a few kilobytes."""


class Reason(StrEnum):
    """Stable names of refusals: the `reason` of google.rpc.ErrorInfo."""

    SESSION_NOT_FOUND = "SESSION_NOT_FOUND"
    SESSION_EXPIRED = "SESSION_EXPIRED"
    SESSION_LOST = "SESSION_LOST"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    LAYER_NOT_FOUND = "LAYER_NOT_FOUND"
    POSITION_MISMATCH = "POSITION_MISMATCH"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    OUT_OF_BLOCKS = "OUT_OF_BLOCKS"
    SESSION_LIMIT = "SESSION_LIMIT"
    STREAM_LIMIT = "STREAM_LIMIT"
    TENANT_LIMIT = "TENANT_LIMIT"
    QUEUE_FULL = "QUEUE_FULL"
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    BAD_TENSOR = "BAD_TENSOR"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    DTYPE_MISMATCH = "DTYPE_MISMATCH"
    EMPTY_STEP = "EMPTY_STEP"
    DUPLICATE_ENTRY = "DUPLICATE_ENTRY"
    NON_FINITE = "NON_FINITE"
    SCALE_OVERFLOW = "SCALE_OVERFLOW"
    STEP_EXPIRED = "STEP_EXPIRED"
    SHARED_MEMORY_UNAVAILABLE = "SHARED_MEMORY_UNAVAILABLE"
    SNAPSHOT_INVALID = "SNAPSHOT_INVALID"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    DRAINING = "DRAINING"
    DEVICE_FAILURE = "DEVICE_FAILURE"


@dataclass(frozen=True, slots=True)
class ReasonSpec:
    """A row of the table.

    Attributes:
        code: Canonical gRPC code, by name.
        metadata: Keys that every refusal of this reason carries.
        is_retryable: Whether waiting helps, so that RetryInfo goes along.
    """

    code: str
    metadata: tuple[str, ...] = ()
    is_retryable: bool = False


_MISMATCH = ReasonSpec("INVALID_ARGUMENT", ("field", "expected", "actual"))
_OFFENCE = ReasonSpec("INVALID_ARGUMENT", ("field", "token", "head"))
_LIMIT = ReasonSpec("RESOURCE_EXHAUSTED", ("limit",), is_retryable=True)

REASONS: dict[Reason, ReasonSpec] = {
    Reason.SESSION_NOT_FOUND: ReasonSpec("NOT_FOUND", ("session_id",)),
    Reason.SESSION_EXPIRED: ReasonSpec("NOT_FOUND", ("session_id", "lease_ms")),
    Reason.SESSION_LOST: ReasonSpec("DATA_LOSS", ("session_id",)),
    Reason.MODEL_NOT_FOUND: ReasonSpec("NOT_FOUND", ("model",)),
    Reason.LAYER_NOT_FOUND: ReasonSpec("INVALID_ARGUMENT", ("layer", "num_layers")),
    Reason.POSITION_MISMATCH: ReasonSpec("FAILED_PRECONDITION", ("start_pos", "length", "layer")),
    Reason.CONTEXT_TOO_LONG: ReasonSpec("OUT_OF_RANGE", ("max_context", "requested")),
    Reason.OUT_OF_BLOCKS: ReasonSpec(
        "RESOURCE_EXHAUSTED", ("required_blocks", "free_blocks"), is_retryable=True
    ),
    Reason.SESSION_LIMIT: _LIMIT,
    Reason.STREAM_LIMIT: _LIMIT,
    Reason.TENANT_LIMIT: _LIMIT,
    Reason.QUEUE_FULL: _LIMIT,
    Reason.MALFORMED_MESSAGE: _MISMATCH,
    Reason.BAD_TENSOR: _MISMATCH,
    Reason.SHAPE_MISMATCH: _MISMATCH,
    Reason.DTYPE_MISMATCH: _MISMATCH,
    Reason.EMPTY_STEP: _MISMATCH,
    Reason.DUPLICATE_ENTRY: _MISMATCH,
    Reason.NON_FINITE: _OFFENCE,
    Reason.SCALE_OVERFLOW: _OFFENCE,
    Reason.STEP_EXPIRED: ReasonSpec("DEADLINE_EXCEEDED", ("timeout_ms",)),
    Reason.SHARED_MEMORY_UNAVAILABLE: ReasonSpec("FAILED_PRECONDITION", ("cause",)),
    Reason.SNAPSHOT_INVALID: ReasonSpec("FAILED_PRECONDITION", ("session_id", "cause")),
    Reason.UNAUTHENTICATED: ReasonSpec("UNAUTHENTICATED"),
    Reason.DRAINING: ReasonSpec("UNAVAILABLE", is_retryable=True),
    Reason.DEVICE_FAILURE: ReasonSpec("INTERNAL"),
}


class OctavoError(Exception):
    """A refusal with its reason; the service turns it into a status, the engine only raises and carries it.

    Args:
        reason: Row of the table.
        message: What was refused, what was expected, and what to do; every value also in metadata.
        metadata: Exactly the keys of the reason's row.
    """

    def __init__(self, reason: Reason, message: str, **metadata: object) -> None:
        super().__init__(_shorten(message, 4 * MAX_VALUE_LEN))
        expected = REASONS[reason].metadata
        if set(metadata) != set(expected):
            raise TypeError(f"{reason} carries {expected}, got {tuple(metadata)}")
        self.reason = reason
        self.metadata = {
            key: _shorten(str(value), MAX_VALUE_LEN) for key, value in metadata.items()
        }


def mismatch(reason: Reason, field: str, expected: object, actual: object) -> OctavoError:
    """Return a refusal of a field that is not what it must be."""
    shown = _shorten(str(actual), MAX_VALUE_LEN)
    message = f"{field} must be {expected}, got {shown}"
    return OctavoError(reason, message, field=field, expected=expected, actual=shown)


def session_not_found(session_id: str) -> OctavoError:
    """Return the refusal of a session id that names no open session, or of a handle in decimal."""
    shown = _shorten(session_id, MAX_VALUE_LEN)
    message = f"no open session {shown!r}: it was closed or never opened; open a new one"
    return OctavoError(Reason.SESSION_NOT_FOUND, message, session_id=shown)


def session_expired(session_id: str, lease_ms: int) -> OctavoError:
    """Return the refusal of a session whose lease ended; the session's id, or its handle in decimal."""
    message = (
        f"session {session_id!r} was closed after {lease_ms} ms without use, its lease; "
        "open a new one, and keep it alive with KeepAlive or a longer lease"
    )
    return OctavoError(Reason.SESSION_EXPIRED, message, session_id=session_id, lease_ms=lease_ms)


def session_lost(session_id: str) -> OctavoError:
    """Return the refusal of a session of another server process; its id, or its handle in decimal."""
    shown = _shorten(session_id, MAX_VALUE_LEN)
    message = (
        f"session {shown!r} is of another server process and was not restored here: its cache is lost; "
        "open a new one and append its tokens again"
    )
    return OctavoError(Reason.SESSION_LOST, message, session_id=shown)


def snapshot_invalid(session_id: str, cause: str) -> OctavoError:
    """Return the refusal of an exported session; its id is empty where even that cannot be read."""
    message = (
        f"not a session that can be opened here: {cause}; export it again, or append its tokens"
    )
    return OctavoError(
        Reason.SNAPSHOT_INVALID,
        message,
        session_id=session_id,
        cause=_shorten(cause, MAX_VALUE_LEN),
    )


def model_not_found(model: str) -> OctavoError:
    """Return the refusal of a name that is no model's."""
    shown = _shorten(model, MAX_VALUE_LEN)
    message = f"no model {shown!r} is served; ServerInfo lists those that are"
    return OctavoError(Reason.MODEL_NOT_FOUND, message, model=shown)


def position_mismatch(layer: int, start_pos: int, length: int, advice: str) -> OctavoError:
    """Return the refusal of a position that does not fit what a layer holds."""
    message = (
        f"start_pos {start_pos} does not fit layer {layer}, which holds {length} tokens: {advice}"
    )
    return OctavoError(
        Reason.POSITION_MISMATCH, message, start_pos=start_pos, length=length, layer=layer
    )


def limit_reached(reason: Reason, what: str, limit: int) -> OctavoError:
    """Return the refusal of one more of something that is limited."""
    return OctavoError(reason, f"the server takes at most {limit} {what}; retry later", limit=limit)


def tenant_limit(tenant: str, what: str, limit: int) -> OctavoError:
    """Return the refusal of what would take a tenant over one of its own limits."""
    message = (
        f"tenant {tenant!r} may have at most {limit} {what}; "
        "close or truncate sessions, or raise its limit in the server's config"
    )
    return OctavoError(Reason.TENANT_LIMIT, message, limit=limit)


def unauthenticated(cause: str) -> OctavoError:
    """Return the refusal of a call without a token that the server knows."""
    message = f"{cause}; send metadata `authorization: Bearer TOKEN` with a token of one of the server's tenants"
    return OctavoError(Reason.UNAUTHENTICATED, message)


def draining() -> OctavoError:
    """Return the refusal of new work by a server that shuts down."""
    return OctavoError(Reason.DRAINING, "the server is shutting down; retry on another one")


def device_failure() -> OctavoError:
    """Return the refusal of all work by a server whose device has failed."""
    message = "the server's device failed; its cache is lost, go to another server"
    return OctavoError(Reason.DEVICE_FAILURE, message)


def _shorten(text: str, max_len: int) -> str:
    return text if len(text) <= max_len else text[: max_len - 1] + "…"
