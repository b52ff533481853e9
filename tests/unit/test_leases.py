"""Leases: when a session is looked at, renewed by use alone, and forgotten once it is closed."""

from octavo_server.block_pool import BlockPool
from octavo_server.leases import Leases
from octavo_server.session import Session
from tests.unit.conftest import make_session, make_spec

SPEC = make_spec()


def session_of(lease_s: float, used_at: float = 0.0) -> Session:
    session = make_session(SPEC, BlockPool(4), lease_s=lease_s)
    session.used_at = used_at
    return session


def test_the_first_to_end_is_said() -> None:
    leases = Leases()
    assert leases.next_due is None
    assert leases.add(session_of(10))
    assert not leases.add(session_of(20))
    assert leases.add(session_of(5))
    assert leases.next_due == 5


def test_a_lease_ends_when_its_time_has_passed_and_is_taken_once() -> None:
    leases, session = Leases(), session_of(10, used_at=5)
    leases.add(session)
    assert leases.take_ended(14.9, 9) == []
    assert leases.take_ended(15, 9) == [session]
    assert leases.take_ended(100, 9) == []


def test_use_moves_the_end() -> None:
    leases, session = Leases(), session_of(10)
    leases.add(session)
    session.used_at = 8
    assert leases.take_ended(10, 9) == []
    assert leases.next_due == 18
    session.used_at = 8.5
    assert leases.take_ended(18, 9) == []
    assert leases.take_ended(18.5, 9) == [session]


def test_a_lease_that_was_not_renewed_ends_at_its_first_end() -> None:
    leases, session = Leases(), session_of(18)
    leases.add(session)
    assert leases.take_ended(18, 9) == [session]


def test_leases_end_in_their_order() -> None:
    leases, late, early = Leases(), session_of(9), session_of(3)
    leases.add(late)
    leases.add(early)
    assert leases.take_ended(9, 9) == [early, late]


def test_closed_sessions_are_dropped_and_do_not_pile_up() -> None:
    leases, closed = Leases(), session_of(10)
    leases.add(closed)
    closed.close()
    assert leases.take_ended(10, 9) == []
    for _ in range(200):
        session = session_of(1000)
        leases.add(session)
        session.close()
        leases.forget_closed(num_open=0)
        assert len(leases._watches) <= 65


def test_only_so_many_are_looked_at_and_the_rest_stays_due() -> None:
    leases, used, *others = Leases(), *(session_of(end) for end in (10, 11, 12, 13))
    for session in (used, *others):
        leases.add(session)
    used.used_at = 90
    assert leases.take_ended(50, 2) == others[:1]
    assert leases.next_due == 12
    assert leases.take_ended(50, 2) == others[1:]
    assert leases.next_due == 100
