"""What the client raises, and the one table from the server's reasons to exceptions.

    OctavoError
    ├── RefusedError                the server refused; nothing of what it refused was applied
    │   ├── SessionNotFound         ├── SessionLimit         ├── EmptyStep
    │   ├── ModelNotFound           ├── StreamLimit          ├── DuplicateEntry
    │   ├── LayerNotFound           ├── QueueFull            ├── NonFinite
    │   ├── PositionMismatch        ├── MalformedMessage     ├── ScaleOverflow
    │   ├── ContextTooLong          ├── BadTensor            ├── StepExpired
    │   ├── OutOfBlocks             ├── ShapeMismatch        ├── Draining
    │   ├── MessageTooLarge         ├── DtypeMismatch        ├── DeviceFailure
    │   ├── SessionExpired          ├── SnapshotInvalid      ├── Unauthenticated
    │   ├── SessionLost             ├── TenantLimit          └── SharedMemoryUnavailable
    ├── InterruptedCall             no answer; `may_be_applied` says whether the server may have acted
    │   ├── ConnectionLost          the connection broke, and trying again did not help
    │   ├── StepTimeout             a decode step had no answer in time
    │   └── CallTimeout             a unary call or an append had no answer in time
    └── ClientClosed                the client or the session was closed before

A reason that this version does not know is a plain RefusedError. Mistakes that the client sees by itself are ValueError
and TypeError, raised before anything is sent.
"""
# Names say what happened, as the reasons on the wire do; a suffix on each would say nothing more.
# ruff: noqa: N818

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import ClassVar


class OctavoError(Exception):
    """Root of everything that this package raises by itself."""


class RefusedError(OctavoError):
    """The server refused a call, a step or an entry; nothing of it was applied.

    Attributes:
        reason: Stable name, such as "OUT_OF_BLOCKS"; empty when the server gave none.
        message: What was refused, what was expected, and what to do.
        code: Canonical gRPC code by name, such as "RESOURCE_EXHAUSTED".
        metadata: Every value of the message, as text. Typed subclasses have them as fields: what
            they annotate is what is read. A field that the server did not send is -1 or "".
        retry_after_s: Seconds after which trying again may help; None when waiting does not help.
    """

    _fields: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        cls._fields = {**cls._fields, **inspect.get_annotations(cls)}

    def __init__(
        self,
        reason: str,
        message: str,
        code: str = "UNKNOWN",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, message, code, metadata, retry_after_s)
        self.reason = reason
        self.message = message
        self.code = code
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        for name, kind in self._fields.items():
            setattr(self, name, _field(self.metadata.get(name, ""), kind))

    def __str__(self) -> str:
        return f"{self.reason or self.code}: {self.message}"


class SessionNotFound(RefusedError):
    """No open session has this id or handle: it was closed, never opened, or is another tenant's."""

    session_id: str


class SessionExpired(RefusedError):
    """The session was closed because nobody used it for as long as its lease."""

    session_id: str
    lease_ms: int


class SessionLost(RefusedError):
    """The session was of a server process that ended, and was not restored: its cache is gone."""

    session_id: str


class ModelNotFound(RefusedError):
    """The server has no model of this name."""

    model: str


class LayerNotFound(RefusedError):
    """The model has fewer layers."""

    layer: int
    num_layers: int


class PositionMismatch(RefusedError):
    """The position is neither the layer's length nor a replay of its last append."""

    start_pos: int
    length: int
    layer: int


class ContextTooLong(RefusedError):
    """The session would hold more tokens than its model or the whole pool allows; waiting never helps."""

    max_context: int
    requested: int


class OutOfBlocks(RefusedError):
    """The pool has too few free blocks at this moment; close or truncate sessions, or try again later."""

    required_blocks: int
    free_blocks: int


class _LimitReached(RefusedError):
    limit: int


class SessionLimit(_LimitReached):
    """The server keeps as many sessions as it may."""


class StreamLimit(_LimitReached):
    """The server serves as many streams as it may."""


class TenantLimit(_LimitReached):
    """The tenant has as many sessions, or as many tokens or bytes in its sessions' blocks, as it may."""


class QueueFull(_LimitReached):
    """The server's queue of steps is full, or too many unary calls wait; try again after `retry_after_s`.

    A step is not sent again by itself: nothing of it was applied, and steps sent after it may have been.
    """


class _BadRequest(RefusedError):
    field: str
    expected: str
    actual: str


class MalformedMessage(_BadRequest):
    """The bytes were not the call's request."""


class BadTensor(_BadRequest):
    """A tensor's bytes, shape and dtype do not fit each other, or it is missing."""


class ShapeMismatch(_BadRequest):
    """A tensor's shape does not fit the model, or an option does not fit the step."""


class DtypeMismatch(_BadRequest):
    """q, k and v are not of one dtype."""


class EmptyStep(_BadRequest):
    """The step has no entry, or an entry no token."""


class DuplicateEntry(_BadRequest):
    """Two entries of a step are of one (session, layer)."""


class _BadValue(RefusedError):
    field: str
    token: int
    head: int


class NonFinite(_BadValue):
    """q, k or v holds a NaN or an infinity."""


class ScaleOverflow(_BadValue):
    """A row of k or v is so large that its scale is no finite float16."""


class StepExpired(RefusedError):
    """The step's time passed while it was queued; it was not applied."""

    timeout_ms: int


class SharedMemoryUnavailable(RefusedError):
    """The server shares no memory with this client; steps go over gRPC, so this is only ever logged."""

    cause: str


class SnapshotInvalid(RefusedError):
    """What was to be imported is no exported session, is damaged, or is of another model."""

    session_id: str
    cause: str


class Unauthenticated(RefusedError):
    """The server knows no tenant with this client's token, or the client sent none."""


class Draining(RefusedError):
    """The server shuts down and takes no new work."""


class DeviceFailure(RefusedError):
    """The server's device failed; its cache can no longer be trusted."""


class MessageTooLarge(RefusedError):
    """A message is over the size that the server receives; send fewer tokens at once."""

    limit_bytes: int


class InterruptedCall(OctavoError):
    """There was no answer; as itself, because the client failed, with what failed as the cause.

    Attributes:
        may_be_applied: Whether the server may have stored or changed what was asked.
    """

    def __init__(self, message: str, may_be_applied: bool) -> None:
        super().__init__(message, may_be_applied)
        self.message = message
        self.may_be_applied = may_be_applied

    def __str__(self) -> str:
        fate = "it may have been applied" if self.may_be_applied else "nothing was applied"
        return f"{self.message}; {fate}"


class ConnectionLost(InterruptedCall):
    """The server could not be reached, or the connection broke, and trying again did not help.

    Also what a step fails with that was on its way when the server ended the stream for good; the refusal is the cause.
    """


class StepTimeout(InterruptedCall):
    """A decode step had no answer in time."""


class CallTimeout(InterruptedCall):
    """A unary call or an append had no answer in time."""


class ClientClosed(OctavoError):
    """The client or the session was closed; open a new one."""


GONE = (SessionNotFound, SessionExpired, SessionLost)
"""What the server says of a session that is not open."""

REASONS: Mapping[str, type[RefusedError]] = {
    "SESSION_NOT_FOUND": SessionNotFound,
    "SESSION_EXPIRED": SessionExpired,
    "SESSION_LOST": SessionLost,
    "MODEL_NOT_FOUND": ModelNotFound,
    "LAYER_NOT_FOUND": LayerNotFound,
    "POSITION_MISMATCH": PositionMismatch,
    "CONTEXT_TOO_LONG": ContextTooLong,
    "OUT_OF_BLOCKS": OutOfBlocks,
    "SESSION_LIMIT": SessionLimit,
    "STREAM_LIMIT": StreamLimit,
    "TENANT_LIMIT": TenantLimit,
    "QUEUE_FULL": QueueFull,
    "MALFORMED_MESSAGE": MalformedMessage,
    "BAD_TENSOR": BadTensor,
    "SHAPE_MISMATCH": ShapeMismatch,
    "DTYPE_MISMATCH": DtypeMismatch,
    "EMPTY_STEP": EmptyStep,
    "DUPLICATE_ENTRY": DuplicateEntry,
    "NON_FINITE": NonFinite,
    "SCALE_OVERFLOW": ScaleOverflow,
    "STEP_EXPIRED": StepExpired,
    "SHARED_MEMORY_UNAVAILABLE": SharedMemoryUnavailable,
    "SNAPSHOT_INVALID": SnapshotInvalid,
    "UNAUTHENTICATED": Unauthenticated,
    "DRAINING": Draining,
    "DEVICE_FAILURE": DeviceFailure,
}
"""The server's reasons; its own table is server/octavo_server/errors.py."""


def refused(
    reason: str,
    message: str,
    code: str,
    metadata: Mapping[str, str],
    retry_after_s: float | None = None,
) -> RefusedError:
    """Return the exception of a reason; a plain RefusedError for a reason that is not in the table."""
    return REASONS.get(reason, RefusedError)(reason, message, code, metadata, retry_after_s)


def message_too_large(num_bytes: int, limit_bytes: int) -> MessageTooLarge:
    """Return the refusal of a message over the server's limit."""
    message = (
        f"a message may have at most {limit_bytes} bytes, got {num_bytes}; "
        "send fewer tokens at once, or raise max_message_bytes in the server's config"
    )
    metadata = {"limit_bytes": str(limit_bytes)}
    return MessageTooLarge("MESSAGE_TOO_LARGE", message, "RESOURCE_EXHAUSTED", metadata)


def _field(text: str, kind: str) -> int | str:
    if kind == "str":
        return text
    try:
        return int(text)
    except ValueError:
        return -1
