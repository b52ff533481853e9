"""Sessions in a running engine: their ends by lease and by stream, renewal, and tenants apart."""

import logging
import threading
import time

import numpy as np
import pytest

from octavo_server import sessions
from octavo_server.errors import OctavoError, Reason
from octavo_server.session import SessionOptions
from octavo_server.step import StepOrigin
from tests.unit.test_engine import WAIT_S, Bench, bench, step
from tests.waiting import wait_until

__all__ = ["bench"]

SHORT_S, LONG_S = 0.05, 3600.0


def reason_of(bench: Bench, handle: int) -> Reason:
    answer = bench.run(step((handle, 0, 0, 1)))
    return answer.entry_errors[0].reason


def send(bench: Bench, handle: int, start_pos: int, origin: StepOrigin) -> None:
    """Run a step of one token."""
    done = threading.Event()
    bench.engine.submit(step((handle, 0, start_pos, 1)), lambda _: done.set(), origin)
    assert done.wait(WAIT_S)


def is_open(bench: Bench, session_id: str) -> bool:
    return any(session.session_id == session_id for session in bench.store.sessions)


def test_a_session_ends_with_its_lease_and_later_steps_are_told(bench: Bench) -> None:
    kept, left = bench.open_session(lease_s=LONG_S), bench.open_session(lease_s=SHORT_S)
    wait_until(lambda: not is_open(bench, left.session_id))
    assert is_open(bench, kept.session_id)
    assert reason_of(bench, left.handle) is Reason.SESSION_EXPIRED
    with pytest.raises(OctavoError) as refused:
        bench.engine.sessions.get(left.session_id, bench.tenant)
    assert refused.value.reason is Reason.SESSION_EXPIRED
    stats = bench.engine.stats()
    assert (stats.num_sessions, stats.num_opened_sessions, stats.num_expired_sessions) == (1, 2, 1)


def test_leases_that_end_do_not_fill_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_LINES_A_S", 0)
    with caplog.at_level(logging.INFO, sessions.__name__):
        session_id = bench.open_session(lease_s=0.001).session_id
        wait_until(lambda: not is_open(bench, session_id))
    assert caplog.records == []


def test_an_expired_sessions_blocks_are_free(bench: Bench) -> None:
    session = bench.open_session(lease_s=0.3)
    assert not bench.run(step((session.handle, 0, 0, 40))).entry_errors
    assert bench.pool.num_free == 7
    wait_until(lambda: bench.pool.num_free == 10)
    assert bench.tenant.num_tokens == 0


def test_a_session_that_is_used_in_the_queue_does_not_end(bench: Bench) -> None:
    session = bench.open_session(lease_s=0.2)
    bench.hold()
    answer = bench.submit(step((session.handle, 0, 0, 1)))
    wait_until(lambda: bench.state(session.handle).lease_remaining_s == 0)
    bench.backend.may_run.set()
    assert not answer.get(timeout=WAIT_S).entry_errors
    wait_until(lambda: len(bench.engine._scheduler) == 0)
    assert bench.state(session.handle).lengths == (1, 0)
    wait_until(lambda: not is_open(bench, session.session_id))


def test_leases_end_also_while_the_engine_is_never_idle(bench: Bench) -> None:
    busy, left = bench.open_session(), bench.open_session(lease_s=SHORT_S)
    stop = threading.Event()

    def go_on(_answer: object) -> None:
        if not stop.is_set():  # Before this turn ends, so that the next one follows at once.
            bench.engine.submit(step((busy.handle, 0, 0, 1)), go_on, bench.origin)

    go_on(None)
    try:
        wait_until(lambda: not is_open(bench, left.session_id))
    finally:
        stop.set()


def test_many_leases_that_end_at_once_are_ended_few_at_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_ENDINGS", 2)
    bench.hold()
    left = [bench.open_session(lease_s=SHORT_S) for _ in range(3)]
    wait_until(lambda: bench.state(left[-1].handle).lease_remaining_s == 0)
    with bench.engine._lock:
        for _ in range(3):
            bench.engine.sessions.end_due()
        assert len(bench.engine._scheduler) == 2
        assert bench.engine.sessions.next_due is None
    bench.backend.may_run.set()
    wait_until(lambda: bench.engine.sessions.num_expired == 3)


def test_keeping_alive_renews_and_tells_what_cannot_be_renewed(bench: Bench) -> None:
    session = bench.open_session(lease_s=LONG_S)
    gone = "feed-" + 32 * "0"
    time.sleep(0.002)
    before = bench.engine.sessions.get(session.session_id, bench.tenant).lease_remaining_s
    renewed, error = bench.engine.sessions.keep_alive([session.session_id, gone], bench.tenant)
    assert not isinstance(renewed, OctavoError)
    assert renewed.lease_remaining_s == pytest.approx(LONG_S, abs=1e-6)
    assert renewed.lease_remaining_s > before
    assert isinstance(error, OctavoError)
    assert error.reason is Reason.SESSION_NOT_FOUND


def test_looking_at_a_session_does_not_renew_it(bench: Bench) -> None:
    session = bench.open_session(lease_s=SHORT_S)

    def is_gone() -> bool:
        bench.engine.sessions.page(bench.tenant, 0, 10)
        return not is_open(bench, session.session_id)

    wait_until(is_gone)


def test_a_stream_takes_the_sessions_with_it_that_asked_for_it(bench: Bench) -> None:
    closing = bench.open_session(closes_on_disconnect=True)
    keeping = bench.open_session()
    stream = StepOrigin(bench.tenant, is_stream=True)
    done = threading.Event()
    request = step((closing.handle, 0, 0, 20), (keeping.handle, 0, 0, 1))
    bench.engine.submit(request, lambda _: done.set(), stream)
    assert done.wait(WAIT_S)
    bench.engine.sessions.end_stream(stream)
    wait_until(lambda: not is_open(bench, closing.session_id))
    assert is_open(bench, keeping.session_id)
    assert reason_of(bench, closing.handle) is Reason.SESSION_NOT_FOUND


def test_many_sessions_that_end_with_a_stream_leave_room_in_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "MAX_ENDINGS", 1)
    bench = Bench(max_queued_steps=2)
    closing = [bench.open_session(closes_on_disconnect=True) for _ in range(3)]
    stream = StepOrigin(bench.tenant, is_stream=True)
    for session in closing:
        send(bench, session.handle, 0, stream)
    bench.hold()
    bench.engine.sessions.end_stream(stream)
    with bench.engine._lock:
        bench.engine.sessions.end_due()
    answer = bench.submit(step((closing[2].handle, 0, 1, 1)))
    bench.backend.may_run.set()
    assert answer.get(timeout=WAIT_S).error is None
    wait_until(lambda: bench.pool.num_free == 10)
    bench.engine.stop()


def test_only_the_stream_that_carried_its_last_step_takes_a_session_along(bench: Bench) -> None:
    session = bench.open_session(closes_on_disconnect=True)
    first, second = (StepOrigin(bench.tenant, is_stream=True) for _ in range(2))
    for start, origin in enumerate((first, second)):
        send(bench, session.handle, start, origin)
    connections = bench.engine.sessions._connections
    assert [len(connections[origin]) for origin in (first, second)] == [0, 1]
    bench.engine.sessions.end_stream(first)
    assert not bench.run(step((session.handle, 0, 2, 1))).entry_errors
    bench.engine.sessions.end_stream(second)
    wait_until(lambda: not is_open(bench, session.session_id))


def test_streams_that_the_server_ends_take_no_session_along(bench: Bench) -> None:
    session = bench.open_session(closes_on_disconnect=True)
    stream = StepOrigin(bench.tenant, is_stream=True)
    send(bench, session.handle, 0, stream)
    assert bench.engine.drain(WAIT_S)
    bench.engine.sessions.end_stream(stream)
    assert len(bench.engine._scheduler) == 0
    assert is_open(bench, session.session_id)


def test_another_tenants_handle_names_no_session(bench: Bench) -> None:
    session = bench.open_session()
    rival = bench.tenants.get("rival")
    answers = []
    done = threading.Event()

    def answer(given: object) -> None:
        answers.append(given)
        done.set()

    own = bench.engine.sessions.open("tiny", rival, SessionOptions(LONG_S)).handle
    request = step((own, 0, 0, 1), (session.handle, 0, 0, 1))
    bench.engine.submit(request, answer, StepOrigin(rival))
    assert done.wait(WAIT_S)
    (given,) = answers
    assert given.entry_errors[1].reason is Reason.SESSION_NOT_FOUND  # type: ignore[attr-defined]
    assert not np.any(given.out[1])  # type: ignore[attr-defined]
    assert bench.state(session.handle).lengths == (0, 0)
    for call in (bench.engine.sessions.get, bench.engine.sessions.close):
        with pytest.raises(OctavoError) as refused:
            call(session.session_id, rival)
        assert refused.value.reason is Reason.SESSION_NOT_FOUND
    (error,) = bench.engine.sessions.keep_alive([session.session_id], rival)
    assert isinstance(error, OctavoError)
