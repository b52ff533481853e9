"""When steps are sent: in a closed loop, or at the times of a Poisson process. No threads and no clock of its own.

Lanes (each has one step in flight) take turns from one pace. In the open loop a free lane takes the next due time and
sleeps until then; when none was free, the due time is past, and the step's latency counts from it all the same. So a
server that stalls cannot make the load test leave out the steps that would have met the stall (coordinated omission).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

NS_PER_S = 1_000_000_000

Clock = Callable[[], int]
"""Nanoseconds of a monotonic clock that all processes share."""

Sleep = Callable[[float], object]
"""Waits some seconds; returns something true when the run was stopped meanwhile."""


class Turn(NamedTuple):
    """Leave to send one step.

    Attributes:
        due_ns: When it is to be sent; its latency counts from then. None = whenever it is sent.
        was_free: Whether a lane was free at that time; what is late then is the load generator's own doing.
        is_measured: Whether the step counts, not being one of the warm-up.
    """

    due_ns: int | None
    was_free: bool
    is_measured: bool


class Pace(Protocol):
    """Gives turns to the lanes of one process."""

    def next_turn(self) -> Turn | None:
        """Wait for a turn; None when the run is over."""

    def is_over(self) -> bool:
        """Whether there are no more turns."""

    def stop(self) -> None:
        """Give no more turns."""


@dataclass(frozen=True, slots=True)
class Span:
    """How long a load point lasts.

    Attributes:
        start_ns: Begin of the warm-up.
        measure_ns: Begin of what is measured.
        end_ns: No step is sent, or due, from then on.
        max_steps: Most measured steps of one process; None = any number.
    """

    start_ns: int
    measure_ns: int
    end_ns: int
    max_steps: int | None = None


class ClosedPace:
    """A turn whenever it is asked for, until the time or the steps are used up."""

    def __init__(self, span: Span, clock: Clock) -> None:
        self._span = span
        self._clock = clock
        self._lock = threading.Lock()
        self._num_measured = 0
        self._is_stopped = False

    def next_turn(self) -> Turn | None:
        """Return a turn; None when the run is over."""
        with self._lock:
            if self.is_over():
                return None
            is_measured = self._clock() >= self._span.measure_ns
            self._num_measured += is_measured
            return Turn(None, True, is_measured)

    def is_over(self) -> bool:
        """Whether there are no more turns."""
        is_full = self._span.max_steps is not None and self._num_measured >= self._span.max_steps
        return self._is_stopped or is_full or self._clock() >= self._span.end_ns

    def stop(self) -> None:
        """Give no more turns."""
        self._is_stopped = True


class OpenPace:
    """Turns at the times of a Poisson process.

    Args:
        span: How long it lasts. Steps that are due within it may be sent later, until `drain_s` after its end.
        rate: Steps a second.
        seed: Of the times.
        clock: What time it is.
        sleep: Waits some seconds.
        drain_s: What is not sent by then is counted as unsent.
    """

    def __init__(
        self,
        span: Span,
        rate: float,
        seed: int,
        clock: Clock,
        sleep: Sleep,
        drain_s: float = 10.0,
    ) -> None:
        self._span = span
        self._clock = clock
        self._sleep = sleep
        self._drain_end_ns = span.end_ns + int(drain_s * NS_PER_S)
        self._due = due_times(rate, span, random.Random(seed))
        self._lock = threading.Lock()
        self._is_over = False
        self._num_unsent = 0

    @property
    def num_unsent(self) -> int:
        """Measured steps that were due and were never sent, once the run is over."""
        return self._num_unsent

    def next_turn(self) -> Turn | None:
        """Take the next due time and wait for it; None when the run is over."""
        with self._lock:
            turn = self._take()
        if turn is None or turn.due_ns is None:
            return None
        while (left_ns := turn.due_ns - self._clock()) > 0:
            if self._sleep(left_ns / NS_PER_S):
                return None
        return turn

    def is_over(self) -> bool:
        """Whether there are no more turns."""
        return self._is_over or self._clock() >= self._drain_end_ns

    def stop(self) -> None:
        """Give no more turns."""
        self._is_over = True

    def _take(self) -> Turn | None:
        if self._is_over:
            return None
        due_ns = next(self._due, None)
        now = self._clock()
        if due_ns is None or now >= self._drain_end_ns:
            self._is_over = True
            self._num_unsent = 0 if due_ns is None else self._count_unsent(due_ns)
            return None
        return Turn(due_ns, now <= due_ns, due_ns >= self._span.measure_ns)

    def _count_unsent(self, first_ns: int) -> int:
        unsent = [first_ns, *self._due]
        return sum(due_ns >= self._span.measure_ns for due_ns in unsent)


def due_times(rate: float, span: Span, rng: random.Random) -> Iterator[int]:
    """Yield the times of a Poisson process of `rate` a second, in nanoseconds, within the span."""
    due_ns = float(span.start_ns)
    num_measured = 0
    while True:
        due_ns += rng.expovariate(rate) * NS_PER_S
        num_measured += due_ns >= span.measure_ns
        if due_ns >= span.end_ns or (span.max_steps is not None and num_measured > span.max_steps):
            return
        yield int(due_ns)
