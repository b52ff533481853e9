"""The sessions of an engine: opened, looked at, kept alive, changed, and ended by their client, lease or stream."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Condition
from typing import TypeVar

from octavo_server import errors
from octavo_server.errors import OctavoError
from octavo_server.leases import Leases
from octavo_server.logs import Throttle
from octavo_server.model_pool import ModelPool
from octavo_server.queued import QueuedChange
from octavo_server.session import Session, SessionOptions, SessionState
from octavo_server.session_store import SessionStore
from octavo_server.step import StepOrigin
from octavo_server.tenant import Tenant

log = logging.getLogger(__name__)

MAX_LINES_A_S = 20
"""Ends of leases that are logged in one second; a client may ask for leases of a millisecond."""

Result = TypeVar("Result")

MAX_ENDINGS = 32
"""Sessions that end at a time without a call: a millisecond's work."""

NUM_RENEWED = 64
"""Leases that are renewed while steps have to wait."""


class Sessions:
    """What calls other than steps do with sessions; a part of the engine, whose lock guards it all.

    Args:
        store: Where sessions are kept.
        pools: Served models by name.
        has_work: The engine's lock; notified when a session is to end before all others.
        check_accepting: Raises when the engine takes no more work; asked under the lock.
        enqueue: Queues a change of a session, under the lock.
    """

    def __init__(
        self,
        store: SessionStore,
        pools: Mapping[str, ModelPool],
        has_work: Condition,
        check_accepting: Callable[[], None],
        enqueue: Callable[[QueuedChange], None],
    ) -> None:
        self._store = store
        self._pools = pools
        self._has_work = has_work
        self.check_accepting = check_accepting
        self._enqueue = enqueue
        self._leases = Leases()
        self._expiry_lines = Throttle(log, "ends of leases")
        self._endings: list[Future[int]] = []
        self._left: deque[tuple[Session, StepOrigin]] = deque()
        self._connections: dict[StepOrigin, set[Session]] = {}
        self._num_closing = 0
        self.num_opened = 0
        self.num_expired = 0

    def __len__(self) -> int:
        return len(self._store)

    def open(
        self, model: str, tenant: Tenant, options: SessionOptions, request_id: str = ""
    ) -> SessionState:
        """Open a session, or return the one that `request_id` opened before.

        Raises:
            OctavoError: MODEL_NOT_FOUND, SESSION_LIMIT, TENANT_LIMIT, DUPLICATE_ENTRY, CONTEXT_TOO_LONG, OUT_OF_BLOCKS,
                DRAINING or DEVICE_FAILURE.
        """
        now = time.monotonic()
        with self._has_work:
            self.check_accepting()
            pool = self.pool(model)
            session = self._store.opened_by(tenant, request_id, pool.spec)
            if session is None:
                session = self._store.create(pool.spec, pool.blocks, tenant, options)
                self.add(session, request_id, now)
            state = session.state(now)
        log.debug("session %s of model %s is open", state.session_id, model)
        return state

    def pool(self, model: str) -> ModelPool:
        """Return the pool of a model.

        Raises:
            OctavoError: MODEL_NOT_FOUND.
        """
        try:
            return self._pools[model]
        except KeyError:
            raise errors.model_not_found(model) from None

    def add(self, session: Session, request_id: str, now: float) -> None:
        """Put a session that was created or restored among the open ones, with a fresh lease; under the lock."""
        session.used_at = now
        self._store.add(session, request_id)
        self.num_opened += 1
        self._num_closing += session.options.closes_on_disconnect
        self._watch(session)

    def get(self, session_id: str, tenant: Tenant) -> SessionState:
        """Return a session's state; its lease goes on.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED or SESSION_LOST.
        """
        with self._has_work:
            return self._store.by_id(session_id, tenant).state(time.monotonic())

    def get_by_handle(self, handle: int, tenant: Tenant) -> SessionState:
        """Return a session's state; raises as `get`."""
        with self._has_work:
            found = self._store.by_handle(handle, tenant)
            if isinstance(found, OctavoError):
                raise found
            return found.state(time.monotonic())

    def page(self, tenant: Tenant, after_idx: int, size: int) -> tuple[list[SessionState], int]:
        """Return a page of a tenant's sessions and where the next page starts, 0 after the last."""
        with self._has_work:
            sessions, next_idx = self._store.page(tenant, after_idx, size)
            now = time.monotonic()
            return [session.state(now) for session in sessions], next_idx

    def keep_alive(
        self, session_ids: Sequence[str], tenant: Tenant
    ) -> list[SessionState | OctavoError]:
        """Renew the leases of sessions; return each one's state, or why it has none."""
        renewed: list[SessionState | OctavoError] = []
        for start in range(0, len(session_ids), NUM_RENEWED):
            with self._has_work:
                self.check_accepting()
                now = time.monotonic()
                some = session_ids[start : start + NUM_RENEWED]
                renewed += [self._renew(session_id, tenant, now) for session_id in some]
        return renewed

    def truncate(
        self, session_id: str, tenant: Tenant, length: int, expected_lengths: Sequence[int]
    ) -> Future[SessionState]:
        """Truncate a session once the work accepted before is done, unless the future is cancelled by then.

        Returns:
            The state after it, or OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED, POSITION_MISMATCH or SHAPE_MISMATCH.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED, SESSION_LOST, DRAINING or DEVICE_FAILURE.
        """

        def truncate(session: Session) -> SessionState:
            session.truncate(length, expected_lengths)
            session.used_at = now = time.monotonic()
            return session.state(now)

        return self._submit(session_id, tenant, truncate)

    def close(self, session_id: str, tenant: Tenant) -> Future[int]:
        """Close a session once the work accepted before is done, unless the future is cancelled by then.

        Returns:
            The blocks freed by it, or OctavoError: SESSION_NOT_FOUND or SESSION_EXPIRED.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED, SESSION_LOST, DRAINING or DEVICE_FAILURE.
        """
        return self._submit(session_id, tenant, self._close)

    def find(self, handles: Sequence[int], origin: StepOrigin) -> list[Session | OctavoError]:
        """Return the session of each handle of a step, or why there is none; under the lock."""
        tenant = origin.tenant
        found = [self._store.by_handle(handle, tenant) for handle in handles]
        if self._num_closing and origin.is_stream and not origin.is_gone():
            self._connect(found, origin)
        return found

    def end_stream(self, origin: StepOrigin) -> None:
        """Close the sessions that end with a stream, unless another one carries a step of theirs before."""
        with self._has_work:
            sessions = self._connections.pop(origin, set())
            if not self._is_accepting():
                return  # The server ended the stream; they are to be there when it is back.
            self._left.extend((session, origin) for session in sessions)
            self._has_work.notify()

    @property
    def next_due(self) -> float | None:
        """When to call `end_due` again, on time.monotonic(); under the lock."""
        if len(self._endings) >= MAX_ENDINGS:
            return None
        return 0.0 if self._left else self._leases.next_due

    def end_due(self) -> None:
        """Close sessions whose leases or streams have ended, once the work accepted before is done; under the lock.

        Call it again after every turn: it closes so few at a time that no step waits long, or finds the queue full.
        """
        self._endings = [ending for ending in self._endings if not ending.done()]
        while self._left and len(self._endings) < MAX_ENDINGS:
            session, origin = self._left.popleft()
            if session.connection is origin and not session.is_closed:
                self._end(session, self._close)
        at_most = MAX_ENDINGS - len(self._endings)
        for session in self._leases.take_ended(time.monotonic(), at_most):
            self._end(session, self._expire)

    def _end(self, session: Session, change: Callable[[Session], int]) -> None:
        self._endings.append(Future())
        self._enqueue(QueuedChange(session, change, self._endings[-1]))

    def _is_accepting(self) -> bool:
        try:
            self.check_accepting()
        except OctavoError:
            return False
        return True

    def _renew(self, session_id: str, tenant: Tenant, now: float) -> SessionState | OctavoError:
        try:
            session = self._store.by_id(session_id, tenant)
        except OctavoError as error:
            return error
        session.used_at = now
        return session.state(now)

    def _submit(
        self, session_id: str, tenant: Tenant, change: Callable[[Session], Result]
    ) -> Future[Result]:
        future: Future[Result] = Future()
        with self._has_work:
            self.check_accepting()
            session = self._store.by_id(session_id, tenant)
            self._enqueue(QueuedChange(session, change, future))
        return future

    def _connect(self, found: Sequence[Session | OctavoError], origin: StepOrigin) -> None:
        for session in found:
            if isinstance(session, Session) and session.options.closes_on_disconnect:
                self._disconnect(session)
                session.connection = origin
                self._connections.setdefault(origin, set()).add(session)

    def _disconnect(self, session: Session) -> None:
        """Let the stream that carried it forget a session."""
        if isinstance(session.connection, StepOrigin):
            self._connections.get(session.connection, set()).discard(session)

    def _watch(self, session: Session) -> None:
        if self._leases.add(session):
            self._has_work.notify()

    def _expire(self, session: Session) -> int:
        """Close a session whose lease has ended, unless work accepted before has renewed it."""
        now = time.monotonic()
        if session.lease_ends_at > now:
            self._watch(session)
            return 0
        session.has_expired = True
        self.num_expired += 1
        if self._expiry_lines.passes(MAX_LINES_A_S, now):
            lease_s = session.options.lease_s
            log.info("session %s expired: unused for %g s", session.session_id, lease_s)
        return self._close(session)

    def _close(self, session: Session) -> int:
        self._store.forget(session)
        self._num_closing -= session.options.closes_on_disconnect
        self._disconnect(session)
        num_freed = session.close()
        self._leases.forget_closed(len(self._store))
        log.debug("session %s is closed at lengths %s", session.session_id, session.lengths)
        return num_freed
