"""The scheduler: which queued work runs next, and what may share a launch with it.

First come, first served, with two rules. Work on one (session, layer) keeps its order and never shares a launch with
work on the same (session, layer). Work on a whole session (truncate, close) waits for everything before it that
touches the session, and everything after waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

Payload = TypeVar("Payload")

WHOLE_SESSION = -1
"""Stands for every layer in a work key."""


class WorkKey(NamedTuple):
    """What a piece of work touches: one layer of a session, or WHOLE_SESSION."""

    session_handle: int
    layer: int


def _never() -> bool:
    return False


class WorkItem(NamedTuple, Generic[Payload]):
    """One queued step, truncate or close.

    Attributes:
        payload: What the engine runs; the scheduler never looks at it.
        keys: What it touches.
        batch_key: Work of equal batch keys may share a launch; None runs alone.
        num_tokens: Rows that it adds to a launch.
        deadline: Time after which it is no longer to be started, on the caller's clock; infinity = never.
        is_cancelled: Whether its caller is gone, asked when its turn comes.
    """

    payload: Payload
    keys: frozenset[WorkKey]
    batch_key: Hashable = None
    num_tokens: int = 0
    deadline: float = float("inf")
    is_cancelled: Callable[[], bool] = _never


class Turn(NamedTuple, Generic[Payload]):
    """What the engine is to do next.

    Attributes:
        batch: Payloads that share the next launch, in the order of arrival; empty when nothing is left to run.
        expired: Payloads whose deadline passed in the queue.
    """

    batch: list[Payload]
    expired: list[Payload]


class Scheduler(Generic[Payload]):
    """A queue of work and the choice of the next launch; one caller at a time, no clock of its own.

    Args:
        max_batch_tokens: Rows after which a launch takes no further work; work larger than this runs alone.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._queue: list[WorkItem[Payload]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, item: WorkItem[Payload]) -> None:
        """Queue a piece of work behind everything that is queued."""
        self._queue.append(item)

    def clear(self) -> list[Payload]:
        """Take everything off the queue, unrun."""
        payloads = [item.payload for item in self._queue]
        self._queue = []
        return payloads

    def next_turn(self, now: float) -> Turn[Payload]:
        """Take the oldest work and all that may run with it off the queue.

        The caller runs the batch to its end before it asks again. Cancelled work is dropped.
        """
        turn: Turn[Payload] = Turn([], [])
        batch = _Batch(self._max_batch_tokens)
        waiting = []
        for item in self._queue:
            if item.is_cancelled():
                continue
            if item.deadline <= now:
                turn.expired.append(item.payload)
            elif batch.takes(item):
                turn.batch.append(item.payload)
            else:
                waiting.append(item)
        self._queue = waiting
        return turn


class _Batch:
    """The launch being put together, and what those that wait for a later one touch."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._batch_key: Hashable = None
        self._is_empty = True
        self._layers: set[WorkKey] = set()
        self._sessions: set[int] = set()
        self._whole_sessions: set[int] = set()

    def takes(self, item: WorkItem[Payload]) -> bool:
        """Add an item if it may run in this launch; either way, later items that touch the same must wait."""
        is_taken = self._fits(item) and not self._conflicts(item.keys)
        self._touch(item.keys)
        if is_taken:
            self._is_empty = False
            self._batch_key = item.batch_key
            self._num_tokens += item.num_tokens
        return is_taken

    def _fits(self, item: WorkItem[Payload]) -> bool:
        if self._is_empty:
            return True
        return (
            item.batch_key is not None
            and item.batch_key == self._batch_key
            and self._num_tokens + item.num_tokens <= self._max_tokens
        )

    def _conflicts(self, keys: Iterable[WorkKey]) -> bool:
        return any(
            key in self._layers
            or key.session_handle in self._whole_sessions
            or (key.layer == WHOLE_SESSION and key.session_handle in self._sessions)
            for key in keys
        )

    def _touch(self, keys: Iterable[WorkKey]) -> None:
        for key in keys:
            self._layers.add(key)
            self._sessions.add(key.session_handle)
            if key.layer == WHOLE_SESSION:
                self._whole_sessions.add(key.session_handle)
