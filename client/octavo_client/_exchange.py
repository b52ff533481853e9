"""A Decode stream without the stream: what to send now, and who is answered. The sync and the asyncio driver are thin.

No I/O: bytes go out and results come in through the caller, and so does time.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from octavo_client._encoding import Result
from octavo_client._errors import (
    ConnectionLost,
    Draining,
    InterruptedCall,
    MessageTooLarge,
    OctavoError,
    QueueFull,
    RefusedError,
    StepExpired,
)
from octavo_client._ledger import Ledger, LedgerStep
from octavo_client._log import log_failure, log_sent_again
from octavo_client._shared_memory import SharedMemory
from octavo_client._status import error_from_status
from octavo_client._steps import Draft, timed_out

_QUEUE_SHARE = 0.9
"""The share of the time left that a step may queue at the server; in the rest its refusal can arrive."""

_MAX_TIMEOUT_MS = 2**32 - 1
"""What the field holds: 49 days. The client's own clock still gives a step up when its caller asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A step and who waits for it.

    Attributes:
        draft: The step.
        future: A concurrent.futures.Future or asyncio.Future.
        is_single: Whether the waiter wants the answer to the only entry rather than to the batch.
    """

    draft: Draft
    future: Any
    is_single: bool


class Outcome(NamedTuple):
    """What a future is to be given: a value, or an error."""

    future: Any
    value: Any
    error: OctavoError | None


class Turn(NamedTuple):
    """What a driver is to do: give futures their outcome, send messages in this order, and maybe leave the stream."""

    outcomes: list[Outcome]
    to_send: list[bytes]
    is_drained: bool = False


_Step = LedgerStep[Job]


class Exchange:
    """The steps of one client and their way over any number of streams; one caller at a time.

    Args:
        memory: What the client may share with the server.
    """

    def __init__(self, memory: SharedMemory | None = None) -> None:
        self._memory = memory
        self._ledger: Ledger[Job] = Ledger()
        self._draining: Draining | None = None
        self._broke_by: OctavoError | None = None

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def next_deadline(self) -> float:
        """When the next step is given up; infinity when there is none."""
        return self._ledger.next_deadline

    @property
    def is_drained(self) -> bool:
        """Whether the server refuses new work, and has answered all that it took: time for another stream."""
        return self._draining is not None and self._ledger.num_sent == 0

    def ended(self) -> OctavoError:
        """Return why a stream is over that ended without an error."""
        return self._draining or ConnectionLost("the server ended the stream", may_be_applied=True)

    def futures(self, session_handle: int) -> list[Any]:
        """Return the futures of a session's steps."""
        return [job.future for job in self._ledger.pending(session_handle)]

    def submit(self, job: Job, now: float) -> tuple[int, list[bytes]]:
        """Place a step and enter it.

        Returns:
            Its step_id, and the messages to send now.

        Raises:
            ClientClosed, ValueError: It cannot be placed; nothing changed.
        """
        draft = job.draft
        draft.place()
        step = self._ledger.submit(
            job, draft.keys, has_kv=draft.has_kv, deadline=now + draft.timeout_s
        )
        if step.is_sent:
            return step.step_id, _encode([step], now)
        draft.keep()
        return step.step_id, []

    def on_result(self, result: Result, now: float) -> Turn:
        """Take a result, or where the memory is that the server shares; that of a step given up is dropped."""
        head = result.head
        self._broke_by = None
        if self._memory is not None:
            if result.region is not None:
                self._memory.on_answer(result.region)
                return Turn([], [])
            self._memory.on_result(head.step_id)
        refusal = error_from_status(head.error) if head.HasField("error") else None
        if isinstance(refusal, Draining):
            self._draining = refusal
            self._ledger.hold(head.step_id)
            return Turn([], [], self.is_drained)
        step, to_send = self._ledger.resolve(head.step_id)
        outcomes = [] if step is None else [_outcome(step, result, refusal)]
        return Turn(outcomes, _encode(to_send, now), self.is_drained)

    def give_up(self, step_id: int, now: float) -> list[bytes]:
        """Drop a step that its caller no longer waits for; return the messages to send now."""
        step, to_send = self._ledger.resolve(step_id)
        if step is not None:
            step.payload.draft.fail(timed_out(step.payload.draft, step.may_be_applied))
        return _encode(to_send, now)

    def expire(self, now: float) -> Turn:
        """Give up the steps whose time has passed."""
        overdue, to_send = self._ledger.expire(now)
        outcomes = []
        for step in overdue:
            error = timed_out(step.payload.draft, step.may_be_applied)
            error.__cause__ = self._broke_by
            outcomes.append(_failed(step, error))
        return Turn(outcomes, _encode(to_send, now))

    def on_open(self, now: float) -> list[bytes]:
        """Note that a stream is open; return the messages to send on it."""
        self._draining = None
        first = [] if self._memory is None else [self._memory.request()]
        to_send = self._ledger.on_stream_open()
        for step in to_send:
            if step.was_cut:
                log_sent_again(step.step_id, step.payload.draft.header.step_key)
        return first + _encode(to_send, now)

    def on_broken(self, error: OctavoError | None = None) -> None:
        """Note that the stream is gone, and why: the cause of what times out until there is an answer again."""
        self._broke_by = error
        if self._memory is not None:
            self._memory.forget()
        self._ledger.on_stream_broken()

    def fail_too_large(self, error: MessageTooLarge) -> list[Outcome]:
        """Give up the steps of the open stream that the server ended it for; the others may go over the next.

        Returns:
            Their outcomes; none when no step is over the limit, and then `error` is about something else.
        """
        sent = self._ledger.sent if error.limit_bytes >= 0 else []
        too_large = [step for step in sent if step.payload.draft.sent_bytes > error.limit_bytes]
        for step in too_large:
            self._ledger.hold(step.step_id)  # the server never took it whole
        self.on_broken()
        for step in too_large:
            self._ledger.resolve(step.step_id)
        return [_failed(step, _error_for(step, error)) for step in too_large]

    def fail_all(self, error: OctavoError) -> list[Outcome]:
        """Give up every step because of `error`."""
        return [_failed(step, _error_for(step, error)) for step in self._ledger.drain()]


def unexpected(error: Exception) -> InterruptedCall:
    """Return what steps fail with when the client itself failed; better said than waited for."""
    failure = InterruptedCall(f"the client failed: {error!r}", may_be_applied=True)
    failure.__cause__ = error
    return failure


def deliver(outcomes: Iterable[Outcome]) -> None:
    """Give futures their outcome; one that was cancelled meanwhile stays so."""
    for future, value, error in outcomes:
        if future.cancelled():
            continue
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def _encode(steps: Iterable[_Step], now: float) -> list[bytes]:
    return [_encode_one(step, now) for step in steps]


def _encode_one(step: _Step, now: float) -> bytes:
    queue_ms = (step.deadline - now) * 1000 * _QUEUE_SHARE
    timeout_ms = int(min(max(queue_ms, 1), _MAX_TIMEOUT_MS))
    return step.payload.draft.encode(step.step_id, timeout_ms)


def _outcome(step: _Step, result: Result, refusal: RefusedError | None) -> Outcome:
    job = step.payload
    if isinstance(refusal, (StepExpired, QueueFull)) and step.has_kv and step.was_cut:
        # Only this sending was refused; the one that the connection cut off may have run.
        return _failed(step, _unknown_fate(job, refusal))
    if refusal is not None:
        return _failed(step, refusal)
    try:
        batch = job.draft.read(result)
        if job.is_single:
            return Outcome(job.future, batch[0], None)
        for entry_idx, refused in batch.errors.items():
            log_failure(step.step_id, job.draft.header.step_key, refused, entry_idx)
        return Outcome(job.future, batch, None)
    except Exception as error:
        own = error if isinstance(error, OctavoError) else _error_for(step, unexpected(error))
        return _failed(step, own)


def _unknown_fate(job: Job, refusal: RefusedError) -> OctavoError:
    if isinstance(refusal, StepExpired):
        return timed_out(job.draft, may_be_applied=True)
    error = ConnectionLost("the connection broke, and then the queue was full", may_be_applied=True)
    error.__cause__ = refusal
    return error


def _failed(step: _Step, error: OctavoError) -> Outcome:
    draft = step.payload.draft
    log_failure(step.step_id, draft.header.step_key, error)
    draft.fail(error)
    return Outcome(step.payload.future, None, error)


def _error_for(step: _Step, error: OctavoError) -> OctavoError:
    """Return an instance of its own for each waiter: a raised exception carries its traceback."""
    if isinstance(error, InterruptedCall):
        own: OctavoError = type(error)(error.message, step.may_be_applied)
    elif isinstance(error, RefusedError) and step.may_be_applied:
        # What was refused is the stream; the step may have come home before, on this one or an earlier one.
        own = ConnectionLost(f"the server ended the stream: {error}", may_be_applied=True)
        own.__cause__ = error
        return own
    else:
        own = copy(error)
    own.__cause__ = error.__cause__
    return own
