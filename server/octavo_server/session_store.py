"""The open sessions of a server, by id, by handle and by the request that opened them; and what became of others."""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from itertools import count, islice
from typing import NamedTuple

from octavo_server import errors
from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.model import ModelSpec
from octavo_server.session import Session, SessionOptions
from octavo_server.tenant import Tenant

MAX_ENDED = 2**16
"""Expired and lost sessions that are remembered, so that later calls are told; the oldest go first."""

_TAG_BITS, _RANDOM_BITS = 16, 48
_SESSION_ID = re.compile(r"([0-9a-f]{8})-[0-9a-f]{32}")


class _Opened(NamedTuple):
    session: Session
    open_idx: int
    request_id: str


class _Ended(NamedTuple):
    """What became of a session whose id alone does not tell: its lease, which ended, or 0 when it was closed."""

    tenant: Tenant
    lease_ms: int


class SessionStore:
    """Opens, finds and forgets sessions.

    An id is the incarnation and 128 random bits. A handle's upper 16 bits are the first of its incarnation, so that one
    of another process is told from one that was closed; its other bits are random. To a tenant the sessions of others
    are not there: it is told what it would be told of an id that nobody drew.

    Args:
        incarnation: Name of this server process, 8 hex digits, the first part of every session id that it draws.
        max_sessions: Sessions that may be open at once.
    """

    def __init__(self, incarnation: str, max_sessions: int) -> None:
        self._incarnation = incarnation
        self._max_sessions = max_sessions
        self._tag = _tag_of(incarnation)
        self._open_idx = count(1)
        self._by_id: dict[str, _Opened] = {}
        self._by_handle: dict[int, Session] = {}
        self._by_request: dict[tuple[Tenant, str], Session] = {}
        self._ended: OrderedDict[str | int, _Ended] = OrderedDict()
        self._num_created = 0
        self._restored: set[int] = set()  # handles, until they are added

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def sessions(self) -> list[Session]:
        """All open sessions, in the order of opening."""
        return [opened.session for opened in self._by_id.values()]

    def request_id_of(self, session: Session) -> str:
        """Return the request_id that opened a session."""
        return self._by_id[session.session_id].request_id

    def has(self, session_id: str, handle: int) -> bool:
        """Return whether an open session has this id or this handle, or one that was restored this handle."""
        is_named = session_id in self._by_id or handle in self._by_handle
        return is_named or handle in self._restored

    def opened_by(self, tenant: Tenant, request_id: str, spec: ModelSpec) -> Session | None:
        """Return the session that a request opened before.

        Raises:
            OctavoError: DUPLICATE_ENTRY when it opened a session of another model.
        """
        known = self._by_request.get((tenant, request_id)) if request_id else None
        return known and _check_same_model(known, spec)

    def create(
        self, spec: ModelSpec, pool: BlockPool, tenant: Tenant, options: SessionOptions
    ) -> Session:
        """Return a new session with the blocks that it reserves; it counts, and is found once it is added.

        Raises:
            OctavoError: SESSION_LIMIT, TENANT_LIMIT, CONTEXT_TOO_LONG or OUT_OF_BLOCKS; nothing changed.
        """
        return self._admit(
            Session(self._draw_id(), self._draw_handle(), spec, pool, tenant, options)
        )

    def restore(self, session: Session) -> None:
        """Count a session of an earlier process, and take the blocks that it reserves, as `create` does."""
        self._admit(session)
        self._restored.add(session.handle)

    def abandon(self, session: Session) -> None:
        """Close a session that was created or restored and is not to be added."""
        self._num_created -= 1
        self._restored.discard(session.handle)
        session.tenant.remove_session()
        session.close()

    def add(self, session: Session, request_id: str) -> None:
        """Put a session that was created or restored among the open ones."""
        self._num_created -= 1
        self._restored.discard(session.handle)
        self._by_id[session.session_id] = _Opened(session, next(self._open_idx), request_id)
        self._by_handle[session.handle] = session
        if request_id:
            self._by_request[session.tenant, request_id] = session

    def by_id(self, session_id: str, tenant: Tenant) -> Session:
        """Return an open session of a tenant.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED or SESSION_LOST.
        """
        opened = self._by_id.get(session_id)
        if opened is None or opened.session.tenant is not tenant:
            match = _SESSION_ID.fullmatch(session_id)
            is_known = match is None or match[1] == self._incarnation
            raise self._missing(session_id, session_id, tenant, is_known=is_known)
        return opened.session

    def by_handle(self, handle: int, tenant: Tenant) -> Session | OctavoError:
        """Return the open session of a tenant's handle, or the refusal of it: as `by_id` raises it."""
        session = self._by_handle.get(handle)
        if session is not None and session.tenant is tenant:
            return session
        is_known = handle >> _RANDOM_BITS == self._tag or handle == 0
        return self._missing(handle, str(handle), tenant, is_known=is_known)

    def forget(self, session: Session) -> None:
        """Drop a session that was closed; what its id would not tell of it is remembered."""
        opened = self._by_id.pop(session.session_id)
        del self._by_handle[session.handle]
        session.tenant.remove_session()
        if opened.request_id:
            del self._by_request[session.tenant, opened.request_id]
        if session.has_expired or not session.session_id.startswith(self._incarnation):
            lease_ms = session.options.lease_ms if session.has_expired else 0
            self._remember((session.session_id, session.handle), _Ended(session.tenant, lease_ms))

    def page(self, tenant: Tenant, after_idx: int, size: int) -> tuple[list[Session], int]:
        """Return up to `size` sessions of a tenant opened after the `after_idx`-th, in the order of opening.

        Returns:
            The sessions, and the `after_idx` of the next page; 0 when this was the last.
        """
        later = (
            opened
            for opened in self._by_id.values()
            if opened.open_idx > after_idx and opened.session.tenant is tenant
        )
        found = list(islice(later, size + 1))
        next_idx = found[size - 1].open_idx if len(found) > size else 0
        return [opened.session for opened in found[:size]], next_idx

    def _admit(self, session: Session) -> Session:
        if len(self) + self._num_created >= self._max_sessions:
            raise errors.limit_reached(Reason.SESSION_LIMIT, "open sessions", self._max_sessions)
        session.tenant.add_session()
        try:
            session.reserve()
        except OctavoError:
            session.tenant.remove_session()
            raise
        self._num_created += 1
        return session

    def _missing(
        self, key: str | int, shown: str, tenant: Tenant, *, is_known: bool
    ) -> OctavoError:
        ended = self._ended.get(key)
        if ended is not None and ended.tenant is tenant:
            if ended.lease_ms:
                return errors.session_expired(shown, ended.lease_ms)
            return errors.session_not_found(shown)
        return errors.session_not_found(shown) if is_known else errors.session_lost(shown)

    def _remember(self, ids: tuple[str, int], ended: _Ended) -> None:
        for key in ids:
            self._ended[key] = ended
        while len(self._ended) > 2 * MAX_ENDED:
            self._ended.popitem(last=False)

    def _draw_id(self) -> str:
        return f"{self._incarnation}-{secrets.token_hex(16)}"

    def _draw_handle(self) -> int:
        while True:
            handle = self._tag << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
            if handle and handle not in self._by_handle:
                return handle


def _tag_of(incarnation: str) -> int:
    return int(incarnation, 16) >> 4 * len(incarnation) - _TAG_BITS


def _check_same_model(session: Session, spec: ModelSpec) -> Session:
    if session.spec.name != spec.name:
        expected = f"a new one for a session of model {spec.name!r}"
        actual = f"the one of a session of model {session.spec.name!r}"
        raise errors.mismatch(Reason.DUPLICATE_ENTRY, "request_id", expected, actual)
    return session
