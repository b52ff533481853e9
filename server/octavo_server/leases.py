"""Leases: which sessions nobody has used for as long as they may be left alone. Time is the caller's."""

from __future__ import annotations

import heapq
from itertools import count
from typing import NamedTuple

from octavo_server.session import Session

_MIN_COMPACTED = 64


class _Watch(NamedTuple):
    due: float
    watch_idx: int
    session: Session


class Leases:
    """Sessions by when their leases may end.

    Using a session costs it nothing but a note of the time: a session is looked at when its lease would have ended, and
    goes back with its new end where it was used since.
    """

    def __init__(self) -> None:
        self._watches: list[_Watch] = []
        self._watch_idx = count()

    def add(self, session: Session) -> bool:
        """Watch a session that is open.

        Returns:
            Whether its lease is now the first to end.
        """
        watch = _Watch(session.lease_ends_at, next(self._watch_idx), session)
        heapq.heappush(self._watches, watch)
        return self._watches[0] is watch

    def forget_closed(self, num_open: int) -> None:
        """Drop closed sessions where they outnumber the open ones; call it after a close."""
        if len(self._watches) > 2 * num_open + _MIN_COMPACTED:
            self._watches = [watch for watch in self._watches if not watch.session.is_closed]
            heapq.heapify(self._watches)

    @property
    def next_due(self) -> float | None:
        """When to look again; None while nothing is watched."""
        return self._watches[0].due if self._watches else None

    def take_ended(self, now: float, at_most: int) -> list[Session]:
        """Look at some of the sessions that are due; return those that have ended, which are watched no more."""
        ended = []
        for _ in range(at_most):
            if not self._watches or self._watches[0].due > now:
                break
            session = heapq.heappop(self._watches).session
            if session.is_closed:
                continue
            if session.lease_ends_at <= now:
                ended.append(session)
            else:
                self.add(session)
        return ended
