"""When a call is repeated, and after how long."""

from __future__ import annotations

import pytest

import octavo_client as oc
from octavo_client import _retry
from octavo_client._retry import Attempts, Backoff, CallRule

LOST = oc.ConnectionLost("gone", may_be_applied=True)
DRAINING = oc.Draining("DRAINING", "no", retry_after_s=3.0)
QUEUE_FULL = oc.QueueFull("QUEUE_FULL", "no", retry_after_s=0.1)
FULL = oc.OutOfBlocks("OUT_OF_BLOCKS", "no", retry_after_s=0.1)
GONE = oc.SessionNotFound("SESSION_NOT_FOUND", "no")
LOST_SESSION = oc.SessionLost("SESSION_LOST", "no")


def test_delays_double_up_to_the_longest_then_end() -> None:
    backoff = Backoff(oc.Retry(max_attempts=6, initial_backoff_s=1.0, max_backoff_s=5.0))
    delays = [backoff.next_delay(LOST) for _ in range(6)]
    assert delays[5] is None
    for delay, longest in zip(delays, (1.0, 2.0, 4.0, 5.0, 5.0), strict=False):
        assert delay is not None
        assert longest / 2 <= delay <= longest


def test_a_success_starts_over() -> None:
    backoff = Backoff(oc.Retry(max_attempts=2))
    assert backoff.next_delay(LOST) is not None
    backoff.reset()
    assert backoff.next_delay(LOST) is not None
    assert backoff.next_delay(LOST) is None


def test_the_defaults_leave_the_end_to_the_timeouts() -> None:
    """A server that restarts is tried for as long as a step waits, often enough to notice that it is back."""
    backoff, least_s = Backoff(oc.Retry()), 0.0
    while least_s < oc.Timeout().step_s:
        delay = backoff.next_delay(LOST)
        assert delay is not None
        assert delay <= 1.0
        least_s += delay / 2
    assert backoff.next_delay(LOST) is not None


def test_every_wait_fits_the_clocks() -> None:
    week = 7 * 86_400.0
    backoff = Backoff(oc.Retry(max_attempts=3000, initial_backoff_s=1.0, max_backoff_s=1e300))
    delays = [backoff.next_delay(LOST) or 0 for _ in range(2000)]
    assert max(delays) == week
    assert Attempts(oc.Retry(), deadline=1e300).remaining(0.0) == week


def test_the_server_may_ask_for_longer() -> None:
    assert Backoff(oc.Retry()).next_delay(DRAINING) == 3.0


@pytest.mark.parametrize(
    ("rule", "error", "is_repeated"),
    [
        (_retry.GET_SESSION, LOST, True),
        (_retry.OPEN_SESSION, LOST, True),
        (_retry.TRUNCATE, LOST, True),
        (_retry.TRUNCATE_GUARDED, LOST, False),
        (_retry.TRUNCATE_GUARDED, DRAINING, True),
        (_retry.TRUNCATE_GUARDED, QUEUE_FULL, True),
        (_retry.GET_SESSION, FULL, False),
        (_retry.CLOSE_SESSION, GONE, False),
        (_retry.GET_SESSION, LOST_SESSION, False),
        (_retry.GET_SESSION, oc.CallTimeout("late", may_be_applied=False), False),
    ],
)
def test_only_what_is_safe_is_repeated(
    rule: CallRule, error: oc.OctavoError, is_repeated: bool
) -> None:
    attempts = Attempts(oc.Retry(), deadline=100.0)
    if is_repeated:
        assert attempts.delay_by_rule(rule, error, 0.0) is not None
    else:
        with pytest.raises(type(error)):
            attempts.delay_by_rule(rule, error, 0.0)


def test_a_close_that_may_have_worked_is_settled_by_not_found() -> None:
    attempts = Attempts(oc.Retry(), deadline=100.0)
    assert attempts.delay_by_rule(_retry.CLOSE_SESSION, LOST, 0.0) is not None
    assert attempts.delay_by_rule(_retry.CLOSE_SESSION, GONE, 1.0) is None
    assert attempts.delay_by_rule(_retry.CLOSE_SESSION, LOST_SESSION, 1.0) is None


def test_no_attempt_begins_after_the_deadline() -> None:
    attempts = Attempts(oc.Retry(initial_backoff_s=1.0), deadline=10.0)
    assert attempts.remaining(4.0) == 6.0
    with pytest.raises(oc.ConnectionLost):
        attempts.delay_by_rule(_retry.GET_SESSION, LOST, 9.9)
