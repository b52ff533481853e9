"""Work that could run at once, and the turns that batch keys and clients take with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic

from octavo_server.work import Payload, QueuedWork


class WorkLanes(Generic[Payload]):
    """A lane of work for every client, in a ring of clients for every batch key; rings and lanes take turns.

    No two pieces of work in here conflict.

    Args:
        max_tokens: Rows after which a launch takes no further work; the first piece may be larger.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        # The next ring, and in it the next client, come first.
        self._rings: dict[Hashable, dict[Hashable, deque[QueuedWork[Payload]]]] = {}

    @property
    def has_work(self) -> bool:
        """Whether there is any, be it cancelled or expired."""
        return bool(self._rings)

    def add(self, work: QueuedWork[Payload]) -> None:
        """Put work behind the other work of its client."""
        ring = self._rings.setdefault(work.item.batch_key, {})
        ring.setdefault(work.item.client, deque()).append(work)

    def take(self) -> tuple[list[QueuedWork[Payload]], list[QueuedWork[Payload]]]:
        """Take one launch out of the next ring.

        Returns:
            The work of the launch, and the cancelled work that was in its way. The former is empty only when the whole
            ring was cancelled.
        """
        batch_key = next(iter(self._rings))
        round_ = deque(self._rings.pop(batch_key).items())
        taken: list[QueuedWork[Payload]] = []
        cancelled: list[QueuedWork[Payload]] = []
        left = {}
        room = self.max_tokens
        while round_:
            client, lane = round_.popleft()
            cancelled += _drop_cancelled(lane)
            if not lane:
                continue
            if taken and lane[0].item.num_tokens > room:
                left[client] = lane
                continue
            taken.append(lane.popleft())
            room -= taken[-1].item.num_tokens
            round_.append((client, lane))
        if left:
            self._rings[batch_key] = left
        return taken, cancelled


def _drop_cancelled(lane: deque[QueuedWork[Payload]]) -> list[QueuedWork[Payload]]:
    """Take cancelled and expired work off the head of a lane; return the cancelled."""
    cancelled = []
    while lane and (not lane[0].is_queued or lane[0].item.is_cancelled()):
        work = lane.popleft()
        if work.is_queued:
            cancelled.append(work)
    return cancelled
