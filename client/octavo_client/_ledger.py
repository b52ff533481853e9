"""Which steps may be sent when, so that sending one again is always safe. No I/O: bytes and time are the caller's.

The server remembers only the last append of each (session, layer): a step with K/V that is sent again is recognised as
a replay as long as no other append of its (session, layer) came between. So here a step with K/V is alone: it is held
until every earlier step of its (session, layer)s is answered, and every later one is held until it is. Steps without
K/V change nothing and share. (A reader-writer lock per (session, layer), granted in the order of submission.)

A step is held, then sent, and leaves when it is answered or given up. A broken connection turns what was sent into
held; the next stream is sent, in the order of submission, what may be sent. Since an earlier step never waits for a
later one, the oldest step is always sendable: nothing waits for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Payload = TypeVar("Payload")

SessionLayer = tuple[int, int]
"""A session's handle and a layer."""


@dataclass(slots=True, eq=False)
class LedgerStep(Generic[Payload]):
    """A step that has not been answered.

    Attributes:
        step_id: Number in the order of submission, from 1.
        payload: What the caller sends; the ledger never looks at it.
        keys: The (session, layer)s that it touches.
        has_kv: Whether it appends.
        deadline: When its caller gives up, on the caller's clock.
        is_sent: Whether it is on its way on the open stream.
        was_cut: Whether a connection broke while it was on its way.
    """

    step_id: int
    payload: Payload
    keys: tuple[SessionLayer, ...]
    has_kv: bool
    deadline: float
    is_sent: bool = field(default=False, init=False)
    was_cut: bool = field(default=False, init=False)

    @property
    def may_be_applied(self) -> bool:
        """Whether the server may have stored its K/V without the client knowing."""
        return self.has_kv and (self.is_sent or self.was_cut)


class Ledger(Generic[Payload]):
    """The steps of one client that are not answered; one caller at a time.

    Every method that returns steps to send returns them in the order in which they must be sent.
    """

    def __init__(self) -> None:
        self._step_ids = itertools.count(1)
        self._steps: dict[int, LedgerStep[Payload]] = {}
        self._queues: dict[SessionLayer, list[LedgerStep[Payload]]] = {}
        self._is_open = False
        self._num_sent = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def num_sent(self) -> int:
        """Steps that are on their way."""
        return self._num_sent

    @property
    def sent(self) -> list[LedgerStep[Payload]]:
        """The steps that are on their way, in the order of submission."""
        return [step for step in self._steps.values() if step.is_sent]

    @property
    def next_deadline(self) -> float:
        """When the next step is given up; infinity when there is none."""
        return min((step.deadline for step in self._steps.values()), default=float("inf"))

    def pending(self, session_handle: int) -> list[Payload]:
        """Return the payloads of a session's steps, in the order of submission."""
        return [
            step.payload
            for step in self._steps.values()
            if any(handle == session_handle for handle, _ in step.keys)
        ]

    def submit(
        self, payload: Payload, keys: Iterable[SessionLayer], *, has_kv: bool, deadline: float
    ) -> LedgerStep[Payload]:
        """Enter a step behind all others; it is to be sent now when it comes back as sent."""
        step = LedgerStep(next(self._step_ids), payload, tuple(keys), has_kv, deadline)
        self._steps[step.step_id] = step
        for key in step.keys:
            self._queues.setdefault(key, []).append(step)
        self._send([step])
        return step

    def resolve(self, step_id: int) -> tuple[LedgerStep[Payload] | None, list[LedgerStep[Payload]]]:
        """Take out a step that was answered, or that its caller gave up.

        Returns:
            The step, None when it left before; and the steps to send now.
        """
        step = self._steps.get(step_id)
        return step, [] if step is None else self._take_out([step])

    def expire(self, now: float) -> tuple[list[LedgerStep[Payload]], list[LedgerStep[Payload]]]:
        """Take out the steps whose deadline has come.

        Returns:
            Those steps, and the steps to send now.
        """
        overdue = [step for step in self._steps.values() if step.deadline <= now]
        return overdue, self._take_out(overdue)

    def hold(self, step_id: int) -> None:
        """Hold a sent step again: the server refused it unapplied, and the next stream is to take it."""
        step = self._steps.get(step_id)
        if step is not None:
            self._num_sent -= step.is_sent
            step.is_sent = False

    def on_stream_open(self) -> list[LedgerStep[Payload]]:
        """Note that a stream is open; return the steps to send on it."""
        self._is_open = True
        return self._send(self._steps.values())

    def on_stream_broken(self) -> None:
        """Note that the stream is gone: what was on its way is held, to be sent again."""
        self._is_open = False
        for step in self._steps.values():
            step.was_cut |= step.is_sent
            step.is_sent = False
        self._num_sent = 0

    def drain(self) -> list[LedgerStep[Payload]]:
        """Take out every step, in the order of submission."""
        steps = list(self._steps.values())
        self._steps.clear()
        self._queues.clear()
        self._num_sent = 0
        return steps

    def _take_out(self, leaving: Sequence[LedgerStep[Payload]]) -> list[LedgerStep[Payload]]:
        behind: dict[int, LedgerStep[Payload]] = {}
        for step in leaving:
            del self._steps[step.step_id]
            self._num_sent -= step.is_sent
            for key in step.keys:
                queue = self._queues[key]
                queue.remove(step)
                if queue:
                    behind.update((other.step_id, other) for other in queue if not other.is_sent)
                else:
                    del self._queues[key]
        if not behind:
            return []
        return self._send(behind[step_id] for step_id in sorted(behind) if step_id in self._steps)

    def _send(self, candidates: Iterable[LedgerStep[Payload]]) -> list[LedgerStep[Payload]]:
        if not self._is_open:
            return []
        to_send = [step for step in candidates if self._is_sendable(step)]
        for step in to_send:
            step.is_sent = True
        self._num_sent += len(to_send)
        return to_send

    def _is_sendable(self, step: LedgerStep[Payload]) -> bool:
        if step.has_kv:
            return all(self._queues[key][0] is step for key in step.keys)
        return not any(self._has_kv_ahead(step, key) for key in step.keys)

    def _has_kv_ahead(self, step: LedgerStep[Payload], key: SessionLayer) -> bool:
        ahead = itertools.takewhile(lambda other: other is not step, self._queues[key])
        return any(other.has_kv for other in ahead)
