"""When the load test sends: closed loop, and the open loop's due times, which a stalled server cannot hide."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_client.load.pace import NS_PER_S, ClosedPace, OpenPace, Span, due_times

MS = NS_PER_S // 1000


class VirtualTime:
    """A clock that moves only when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 0

    def clock(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> bool:
        self.now += max(round(seconds * NS_PER_S), 1)
        return False


def span_of(seconds: float, warm_up_s: float = 0, max_steps: int | None = None) -> Span:
    measure_ns = int(warm_up_s * NS_PER_S)
    return Span(0, measure_ns, measure_ns + int(seconds * NS_PER_S), max_steps)


def stalled_run(time: VirtualTime, pace: OpenPace | ClosedPace) -> tuple[list[int], list[int]]:
    """Send to a server that takes 1 ms, but 1 s for the step after 50; return latencies from due and from sent."""
    from_due: list[int] = []
    from_sent: list[int] = []
    while (turn := pace.next_turn()) is not None:
        sent = time.now
        time.now += NS_PER_S if len(from_sent) == 50 else MS
        from_sent.append(time.now - sent)
        from_due.append(time.now - (sent if turn.due_ns is None else turn.due_ns))
    return from_due, from_sent


def test_a_stall_shows_in_every_step_that_was_due_in_it() -> None:
    """At 200 a second some 200 steps are due in the stall; a load test that waits for answers would count one."""
    time = VirtualTime()
    pace = OpenPace(span_of(3), 200, 1, time.clock, time.sleep)
    from_due, from_sent = stalled_run(time, pace)
    assert sum(latency > 100 * MS for latency in from_sent) == 1
    assert sum(latency > 100 * MS for latency in from_due) > 150
    assert len(from_due) == len(list(due_times(200, span_of(3), random.Random(1))))
    assert pace.num_unsent == 0


def test_turns_say_whether_a_lane_was_free() -> None:
    time = VirtualTime()
    pace = OpenPace(span_of(1), 100, 3, time.clock, time.sleep)
    first = pace.next_turn()
    assert first is not None
    assert (first.due_ns, first.was_free) == (time.now, True)
    time.now += NS_PER_S // 2
    second = pace.next_turn()
    assert second is not None
    assert not second.was_free
    assert time.now == (first.due_ns or 0) + NS_PER_S // 2, "what is overdue is sent at once"


def test_what_a_server_cannot_take_in_time_is_counted_as_unsent() -> None:
    time = VirtualTime()
    pace = OpenPace(span_of(1, warm_up_s=1), 100, 5, time.clock, time.sleep, drain_s=1)
    num_sent = 0
    while pace.next_turn() is not None:
        time.now += 100 * MS
        num_sent += 1
    due = list(due_times(100, span_of(1, warm_up_s=1), random.Random(5)))
    measured = [at for at in due if at >= NS_PER_S]
    assert num_sent == pytest.approx(30, abs=2)
    assert pace.num_unsent == sum(at >= NS_PER_S for at in due[num_sent:])
    assert 0 < pace.num_unsent <= len(measured)
    assert pace.is_over()


def test_a_stopped_pace_gives_no_turn() -> None:
    time = VirtualTime()
    pace = OpenPace(span_of(10), 1, 0, time.clock, lambda _: True)
    assert pace.next_turn() is None, "the sleep was interrupted"
    closed = ClosedPace(span_of(10), time.clock)
    closed.stop()
    assert closed.next_turn() is None


@given(st.floats(20, 2000), st.integers(0, 2**32))
def test_arrivals_are_a_poisson_process(rate: float, seed: int) -> None:
    """Gaps have the mean 1 / rate and as large a deviation; times ascend and stay within the span."""
    span = span_of(2000 / rate)
    times = list(due_times(rate, span, random.Random(seed)))
    gaps = [b - a for a, b in zip([0, *times], times, strict=False)]
    assert all(gap >= 0 for gap in gaps)
    assert times[-1] < span.end_ns
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(NS_PER_S / rate, rel=0.15)
    assert statistics.pstdev(gaps) == pytest.approx(mean, rel=0.25)


def test_the_same_seed_gives_the_same_times() -> None:
    first, again, other = (list(due_times(50, span_of(5), random.Random(s))) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_the_warm_up_is_not_measured_and_steps_are_counted_after_it(kind: str) -> None:
    time = VirtualTime()
    span = span_of(100, warm_up_s=1, max_steps=20)
    pace: ClosedPace | OpenPace = ClosedPace(span, time.clock)
    if kind == "open":
        pace = OpenPace(span, 100, 0, time.clock, time.sleep)
    turns = []
    while (turn := pace.next_turn()) is not None:
        turns.append((turn.is_measured, time.now >= NS_PER_S))
        time.now += 5 * MS
    assert sum(is_measured for is_measured, _ in turns) == 20
    assert not turns[0][0]
    if kind == "closed":
        assert all(is_measured == is_after for is_measured, is_after in turns)


def test_a_closed_loop_ends_with_its_time() -> None:
    time = VirtualTime()
    pace = ClosedPace(span_of(1), time.clock)
    from_due, from_sent = stalled_run(time, pace)
    assert from_due == from_sent
    assert len(from_sent) == 51, "50 steps of 1 ms, and the one of 1 s"
