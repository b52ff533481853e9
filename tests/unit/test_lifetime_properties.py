"""Invariants of sessions' lives under any sequence of opening, using, waiting, closing and giving up.

No session outlives its lease, no session that is gone holds a block, and every tenant is charged for exactly what its
sessions hold, within its limits.
"""

from __future__ import annotations

from contextlib import suppress

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.leases import Leases
from octavo_server.session import AppendRecord, Session, SessionOptions
from octavo_server.session_store import SessionStore
from octavo_server.tenant import TenantLimits, Tenants
from tests.unit.conftest import make_spec

NUM_BLOCKS, MAX_SESSIONS = 12, 6
SPEC = make_spec(max_context=96)
LIMITS = TenantLimits(max_sessions=3, max_tokens=7 * SPEC.block_size)
NAMES = st.sampled_from(("acme", "other"))
REFUSALS = {
    Reason.SESSION_LIMIT,
    Reason.TENANT_LIMIT,
    Reason.OUT_OF_BLOCKS,
    Reason.CONTEXT_TOO_LONG,
}


class LifetimeMachine(RuleBasedStateMachine):
    """A store, its leases and its pool, with a clock of its own."""

    sessions = Bundle("sessions")
    created = Bundle("created")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.store = SessionStore("feedc0de", MAX_SESSIONS)
        self.tenants = Tenants(LIMITS)
        self.leases = Leases()
        self.now = 0.0
        self.held: list[Session] = []  # created, and not yet added or abandoned

    @rule(target=created, name=NAMES, lease_s=st.integers(1, 9), tokens=st.integers(0, 100))
    def create(self, name: str, lease_s: int, tokens: int) -> object:
        options = SessionOptions(float(lease_s), reserve_tokens=tokens)
        before = self.pool.num_free
        try:
            session = self.store.create(SPEC, self.pool, self.tenants.get(name), options)
        except OctavoError as error:
            reason = error.reason
        else:
            self.held.append(session)
            return session
        assert reason in REFUSALS
        assert self.pool.num_free == before
        return multiple()

    @rule(target=sessions, session=consumes(created))
    def add(self, session: Session) -> Session:
        self.held.remove(session)
        session.used_at = self.now
        self.store.add(session, "")
        self.leases.add(session)
        return session

    @rule(session=consumes(created))
    def abandon(self, session: Session) -> None:
        self.held.remove(session)
        self.store.abandon(session)

    @rule(session=sessions, num_tokens=st.integers(1, 40), is_refused=st.booleans())
    def use(self, session: Session, num_tokens: int, is_refused: bool) -> None:
        with suppress(OctavoError):
            session.admit_append(0, AppendRecord(session.lengths[0], num_tokens, 7))
            session.used_at = self.now
            session.refuse(0) if is_refused else session.confirm(0)

    @rule(session=sessions, length=st.integers(0, 40))
    def truncate(self, session: Session, length: int) -> None:
        if not session.is_closed:
            session.truncate(length)

    @rule(session=consumes(sessions))
    def close(self, session: Session) -> None:
        if not session.is_closed:
            self.end(session)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        for session in self.leases.take_ended(self.now, 99):
            assert session.lease_ends_at <= self.now
            session.has_expired = True
            self.end(session)

    def end(self, session: Session) -> None:
        self.store.forget(session)
        session.close()
        self.leases.forget_closed(len(self.store))

    @invariant()
    def no_session_outlives_its_lease(self) -> None:
        assert all(session.lease_ends_at > self.now for session in self.store.sessions)

    @invariant()
    def every_block_is_free_or_held_by_a_session_that_is_there(self) -> None:
        held = [id_ for session in self.live for id_ in session.block_table]
        assert len(set(held)) == len(held) == NUM_BLOCKS - self.pool.num_free

    @invariant()
    def tenants_are_charged_for_what_their_sessions_hold(self) -> None:
        for stats in self.tenants.stats():
            own = [session for session in self.live if session.tenant.name == stats.name]
            num_blocks = sum(len(session.block_table) for session in own)
            assert stats.num_sessions == len(own) <= LIMITS.max_sessions
            assert stats.num_tokens == num_blocks * SPEC.block_size <= LIMITS.max_tokens
            assert stats.num_bytes == num_blocks * SPEC.block_bytes
        assert len(self.live) <= MAX_SESSIONS

    @property
    def live(self) -> list[Session]:
        return [*self.store.sessions, *self.held]


TestLifetimes = LifetimeMachine.TestCase
TestLifetimes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
