"""The open sessions of a server, by id, by handle and by the request that opened them."""

from __future__ import annotations

import secrets
from itertools import count, islice
from typing import NamedTuple

from octavo_server import errors
from octavo_server.block_pool import BlockPool
from octavo_server.errors import Reason
from octavo_server.model import ModelSpec
from octavo_server.session import Session


class _Opened(NamedTuple):
    session: Session
    open_idx: int
    request_id: str


class SessionStore:
    """Opens, finds and forgets sessions; ids and handles are drawn at random and carry nothing that can be guessed.

    Args:
        incarnation: Name of this server process, the first part of every session id.
        max_sessions: Sessions that may be open at once.
    """

    def __init__(self, incarnation: str, max_sessions: int) -> None:
        self._incarnation = incarnation
        self._max_sessions = max_sessions
        self._open_idx = count(1)
        self._by_id: dict[str, _Opened] = {}
        self._by_handle: dict[int, Session] = {}
        self._by_request: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, spec: ModelSpec, pool: BlockPool, request_id: str) -> Session:
        """Open an empty session, or return the one that `request_id` opened.

        Raises:
            OctavoError: SESSION_LIMIT, or DUPLICATE_ENTRY when `request_id` opened a session of another model.
        """
        known = self._by_request.get(request_id)
        if known is not None:
            return _check_same_model(known, spec)
        if len(self) >= self._max_sessions:
            raise errors.limit_reached(Reason.SESSION_LIMIT, "open sessions", self._max_sessions)
        session = Session(self._draw_id(), self._draw_handle(), spec, pool)
        self._by_id[session.session_id] = _Opened(session, next(self._open_idx), request_id)
        self._by_handle[session.handle] = session
        if request_id:
            self._by_request[request_id] = session
        return session

    def by_id(self, session_id: str) -> Session:
        """Return an open session.

        Raises:
            OctavoError: SESSION_NOT_FOUND.
        """
        try:
            return self._by_id[session_id].session
        except KeyError:
            raise errors.session_not_found(session_id) from None

    def by_handle(self, handle: int) -> Session | None:
        """Return the open session of a handle, or None."""
        return self._by_handle.get(handle)

    def forget(self, session: Session) -> None:
        """Drop a session that was closed."""
        opened = self._by_id.pop(session.session_id)
        del self._by_handle[session.handle]
        if opened.request_id:
            del self._by_request[opened.request_id]

    def page(self, after_idx: int, size: int) -> tuple[list[Session], int]:
        """Return up to `size` sessions opened after the `after_idx`-th, in the order of opening.

        Returns:
            The sessions, and the `after_idx` of the next page; 0 when this was the last.
        """
        later = (opened for opened in self._by_id.values() if opened.open_idx > after_idx)
        found = list(islice(later, size + 1))
        next_idx = found[size - 1].open_idx if len(found) > size else 0
        return [opened.session for opened in found[:size]], next_idx

    def _draw_id(self) -> str:
        return f"{self._incarnation}-{secrets.token_hex(16)}"

    def _draw_handle(self) -> int:
        while True:
            handle = secrets.randbits(64)
            if handle and handle not in self._by_handle:
                return handle


def _check_same_model(session: Session, spec: ModelSpec) -> Session:
    if session.spec.name != spec.name:
        expected = f"a new one for a session of model {spec.name!r}"
        actual = f"the one of a session of model {session.spec.name!r}"
        raise errors.mismatch(Reason.DUPLICATE_ENTRY, "request_id", expected, actual)
    return session
