"""Which queued work must wait for which, and whose time has passed."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Generic

from octavo_server.work import WHOLE_SESSION, Payload, QueuedWork

_HEAP_SLACK = 64


class WorkOrder(Generic[Payload]):
    """Who waits for whom: each piece of work for the last before it on each of its layers.

    A piece on a whole session waits for the last on every layer, and the next on any of them waits for it.
    """

    def __init__(self) -> None:
        # Session -> layer -> the last work on it; WHOLE_SESSION among the layers, which then come after it.
        self._last: dict[int, dict[int, QueuedWork[Payload]]] = {}

    def enter(self, work: QueuedWork[Payload]) -> None:
        """Let work wait for what is there and touches the same."""
        for handle, layer in work.item.keys:
            last = self._last.setdefault(handle, {})
            if layer == WHOLE_SESSION:
                blockers = list(last.values())
                last.clear()
            else:
                blocker = last.get(layer) or last.get(WHOLE_SESSION)
                blockers = [] if blocker is None else [blocker]
            last[layer] = work
            for blocker in blockers:
                if blocker is not work:
                    blocker.followers.append(work)
                    work.num_blockers += 1

    def leave(self, work: QueuedWork[Payload]) -> Iterator[QueuedWork[Payload]]:
        """Yield the work that waits for nothing now that `work` is queued no more.

        Work that left while it still had to wait holds its place until then, so that nothing overtakes through it.
        """
        leaving = [work] if work.num_blockers == 0 else []
        while leaving:
            gone = leaving.pop()
            self._forget(gone)
            for follower in gone.followers:
                follower.num_blockers -= 1
                if follower.num_blockers == 0 and follower.is_queued:
                    yield follower
                elif follower.num_blockers == 0:
                    leaving.append(follower)

    def _forget(self, work: QueuedWork[Payload]) -> None:
        for handle, layer in work.item.keys:
            last = self._last.get(handle, {})
            if last.get(layer) is work:
                del last[layer]
                if not last:
                    del self._last[handle]


class Deadlines(Generic[Payload]):
    """Queued work by deadline, without what has none."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, QueuedWork[Payload]]] = []

    def add(self, work: QueuedWork[Payload], num_queued: int) -> None:
        """Note a piece of work; `num_queued` is how many are queued."""
        if work.item.deadline == float("inf"):
            return
        heapq.heappush(self._heap, (work.item.deadline, work.arrival, work))
        # Most work runs long before its deadline and would lie here until then.
        if len(self._heap) > 2 * num_queued + _HEAP_SLACK:
            self._heap = [entry for entry in self._heap if entry[2].is_queued]
            heapq.heapify(self._heap)

    def passed(self, now: float) -> Iterable[QueuedWork[Payload]]:
        """Yield the queued work whose deadline is not after `now`, the earliest first."""
        while self._heap and self._heap[0][0] <= now:
            work = heapq.heappop(self._heap)[2]
            if work.is_queued:
                yield work
