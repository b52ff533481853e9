"""Sessions out of the engine and into it, a piece at a time, between the launches of others.

An export is of the moment in which it began: what is cached below a session's lengths stays as it is until a truncate
or close, and those end the export. An import holds its blocks from the start, and is seen by nobody until it is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from octavo_server import errors
from octavo_server.backends.base import Backend
from octavo_server.errors import OctavoError
from octavo_server.model_pool import ModelPool
from octavo_server.session import Session, SessionOptions, SessionState
from octavo_server.session_file import Piece, SessionReader, pieces
from octavo_server.session_header import (
    InvalidSessionFileError,
    SavedSession,
    SessionIdentity,
    check_key,
    model_key,
)
from octavo_server.session_store import SessionStore
from octavo_server.sessions import Sessions
from octavo_server.tenant import Tenant

Result = TypeVar("Result")

Wait = Callable[[Future[Any]], Any]
"""Returns a future's result, as long as the one who wants it is there."""


class RunTask(Protocol):
    """Runs something with the turn of the engine: `Engine.run_task`."""

    def __call__(self, run: Callable[[], Result], client: Hashable, /) -> Future[Result]:
        """Queue it."""


class Export:
    """A session on its way out.

    Args:
        transfers: Reads it.
        session: The session.
        identity: By what names it is to be known again.
    """

    def __init__(
        self, transfers: Transfers, session: Session, identity: SessionIdentity | None
    ) -> None:
        self._transfers = transfers
        self._session = session
        self._num_truncates = session.num_truncates
        self.saved = SavedSession(
            session.spec.name,
            model_key(session.spec),
            tuple(session.lengths),
            session.last_appends,
            session.options,
            identity,
        )

    @property
    def session_id(self) -> str:
        """The session's."""
        return self._session.session_id

    def values(self, wait_for: Wait) -> Iterator[NDArray[Any]]:
        """Yield the values of the file's pieces, and read one piece ahead.

        Raises:
            OctavoError: POSITION_MISMATCH or SESSION_NOT_FOUND: it was truncated or closed meanwhile.
        """
        ahead: Future[NDArray[Any]] | None = None
        for piece in pieces(self.saved, self._session.spec.block_size):
            future = self._transfers.read(self, piece)
            if ahead is not None:
                yield wait_for(ahead)
            ahead = future
        if ahead is not None:
            yield wait_for(ahead)

    def block_ids(self, piece: Piece) -> NDArray[np.int64]:
        """Return a piece's blocks, as long as they hold what they held; under the lock."""
        session = self._session
        if session.is_closed:
            raise session.gone()
        if session.num_truncates != self._num_truncates:
            expected = self.saved.lengths[piece.layer]
            advice = "it was truncated while it was exported; export it again"
            raise errors.position_mismatch(
                piece.layer, expected, session.lengths[piece.layer], advice
            )
        session.used_at = time.monotonic()
        return _block_ids(session, piece)

    @property
    def model(self) -> str:
        """Name of its model."""
        return self._session.spec.name


class Import:
    """A session on its way in. Exactly one of `finish` and `abandon` ends it.

    Args:
        transfers: Stores it.
        session: With all its blocks; found by nobody yet.
        request_id: What opens it.
    """

    def __init__(self, transfers: Transfers, session: Session, request_id: str) -> None:
        self._transfers = transfers
        self._session = session
        self._request_id = request_id
        self._written: Future[None] | None = None

    def receive(self, reader: SessionReader, saved: SavedSession, wait_for: Wait) -> None:
        """Store what is read, and read one piece ahead; returns once all is stored and the checksum fits.

        Raises:
            InvalidSessionFileError: It is damaged.
        """
        for piece, values in reader.pieces(saved, self._session.spec.block_size):
            self._await(wait_for)
            self._written = self._transfers.write(self._session, piece, values)
        self._await(wait_for)

    def finish(self) -> SessionState:
        """Make the session one of the open ones.

        Raises:
            OctavoError: DRAINING or DEVICE_FAILURE; it is still to be abandoned.
        """
        return self._transfers.publish(self._session, self._request_id)

    def abandon(self) -> None:
        """Give its blocks back."""
        if self._written is not None and not self._written.cancel():
            wait([self._written])
        self._transfers.abandon(self._session)

    def _await(self, wait_for: Wait) -> None:
        if self._written is not None:
            wait_for(self._written)


@contextmanager
def abandoning(started: Import) -> Iterator[None]:
    """Give an import up when what is inside fails."""
    try:
        yield
    except BaseException:
        started.abandon()
        raise


class Transfers:
    """Begins exports and imports; a part of the engine, whose lock guards the sessions.

    Args:
        backend: Has the cache.
        store: Where sessions are kept.
        sessions: The engine's.
        lock: The engine's.
        run_task: The engine's.
    """

    def __init__(
        self,
        backend: Backend,
        store: SessionStore,
        sessions: Sessions,
        lock: Lock,
        run_task: RunTask,
    ) -> None:
        self._backend = backend
        self._store = store
        self._sessions = sessions
        self._lock = lock
        self._run_task = run_task

    def export(self, session_id: str, tenant: Tenant) -> Export:
        """Begin to export a session.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED or SESSION_LOST.
        """
        with self._lock:
            return Export(self, self._store.by_id(session_id, tenant), None)

    def export_all(self) -> list[Export]:
        """Begin to export every session, with its names, in the order of opening."""
        with self._lock:
            return [
                Export(self, session, self._identity(session)) for session in self._store.sessions
            ]

    def begin(
        self,
        saved: SavedSession,
        model: str,
        tenant: Tenant,
        options: SessionOptions,
        request_id: str,
    ) -> Import | SessionState:
        """Begin to import a session under a new name, or return the one that `request_id` opened before.

        Raises:
            InvalidSessionFileError: It is of another shape than the model, or attends otherwise.
            OctavoError: MODEL_NOT_FOUND, SESSION_LIMIT, TENANT_LIMIT, DUPLICATE_ENTRY, CONTEXT_TOO_LONG, OUT_OF_BLOCKS,
                DRAINING or DEVICE_FAILURE; nothing changed.
        """
        with self._lock:
            self._sessions.check_accepting()
            pool = self._checked_pool(saved, model)
            known = self._store.opened_by(tenant, request_id, pool.spec)
            if known is not None:
                return known.state(time.monotonic())
            session = self._store.create(pool.spec, pool.blocks, tenant, options)
            return self._loaded(session, saved, request_id)

    def restore(self, saved: SavedSession, tenant: Tenant) -> Import:
        """Begin to import a session under its own names; raises as `begin`."""
        identity = saved.identity
        if identity is None:
            raise InvalidSessionFileError("it has no identity: it is an export, no snapshot")
        with self._lock:
            if self._store.has(identity.session_id, identity.handle):
                raise InvalidSessionFileError("an open session has its id or its handle")
            pool = self._checked_pool(saved, saved.model)
            session = Session(
                identity.session_id,
                identity.handle,
                pool.spec,
                pool.blocks,
                tenant,
                saved.options,
            )
            self._store.restore(session)
            return self._loaded(session, saved, identity.request_id)

    def read(self, export: Export, piece: Piece) -> Future[NDArray[Any]]:
        """Read a piece of an export once its turn comes."""

        def run() -> NDArray[Any]:
            with self._lock:
                block_ids = export.block_ids(piece)
            pool = self._sessions.pool(export.model)
            values = self._backend.read_blocks(pool.cache, piece.layer, piece.field, block_ids)
            return values[: piece.stop - piece.start]

        return self._run_task(run, export)

    def write(self, session: Session, piece: Piece, values: NDArray[Any]) -> Future[None]:
        """Store a piece of a session that is not open yet once its turn comes."""
        block_ids = _block_ids(session, piece)
        pool = self._sessions.pool(session.spec.name)
        num_slots = len(block_ids) * session.spec.block_size
        if len(values) < num_slots:
            rest = np.zeros((num_slots - len(values), *values.shape[1:]), values.dtype)
            values = np.concatenate([values, rest])

        def run() -> None:
            self._backend.write_blocks(pool.cache, piece.layer, piece.field, block_ids, values)

        return self._run_task(run, session)

    def publish(self, session: Session, request_id: str) -> SessionState:
        """Put an imported session among the open ones, or give it up for one that `request_id` opened meanwhile."""
        now = time.monotonic()
        with self._lock:
            self._sessions.check_accepting()
            known = self._store.opened_by(session.tenant, request_id, session.spec)
            if known is not None:
                self._store.abandon(session)
                return known.state(now)
            self._sessions.add(session, request_id, now)
            return session.state(now)

    def abandon(self, session: Session) -> None:
        """Give back what an imported session holds."""
        with self._lock:
            self._store.abandon(session)

    def _loaded(self, session: Session, saved: SavedSession, request_id: str) -> Import:
        try:
            session.load(saved.lengths, saved.last_appends)
        except OctavoError:
            self._store.abandon(session)
            raise
        return Import(self, session, request_id)

    def _checked_pool(self, saved: SavedSession, model: str) -> ModelPool:
        pool = self._sessions.pool(model or saved.model)
        check_key(saved.key, pool.spec)
        return pool

    def _identity(self, session: Session) -> SessionIdentity:
        return SessionIdentity(
            session.session_id,
            session.handle,
            session.tenant.name,
            self._store.request_id_of(session),
        )


def _block_ids(session: Session, piece: Piece) -> NDArray[np.int64]:
    size = session.spec.block_size
    table = session.block_table[piece.start // size : -(-piece.stop // size)]
    return np.array(table, np.int64)
