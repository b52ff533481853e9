"""The scheduler: which queued work runs next, and what may share a launch with it.

Order comes first. Work on one (session, layer) keeps its order and never shares a launch with work on the same
(session, layer). Work on a whole session (truncate, close) waits for everything before it that touches the session, and
everything after waits for it. Of the rest, which could run at once:

- A launch is of one batch key and one kind, decode steps or prompts, so that no decode step waits in its launch for the
  tokens of a prompt.
- Truncates and closes, which take no launch, run together, and count as a batch key.
- Decode steps go before prompts. When both wait, prompts have the launch after every MAX_PASSED_OVER of decode steps.
- Batch keys take turns.
- Within a batch key clients take turns: a launch goes round them, one piece of work of each, until nothing is left or
  the next is over the launch's tokens. The next launch goes on where this one stopped. Work of one client is first
  come, first served, so a flood of one client delays the others by one piece of its work a round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple

from octavo_server.work import Payload, QueuedWork, WorkItem, WorkKey
from octavo_server.work_lanes import WorkLanes
from octavo_server.work_order import Deadlines, WorkOrder

MAX_PASSED_OVER = 3
"""Launches of decode steps that run while a prompt waits, before prompts have theirs."""


class Turn(NamedTuple, Generic[Payload]):
    """What the engine is to do next.

    Attributes:
        batch: Payloads that share the next launch; empty when nothing is left to run.
        expired: Payloads whose deadline passed in the queue.
    """

    batch: list[Payload]
    expired: list[Payload]


class Scheduler(Generic[Payload]):
    """A queue of work and the choice of the next launch; one caller at a time, no clock of its own.

    A turn costs time by what it takes and by the clients and batch keys that wait, not by what else is queued.

    Args:
        max_batch_tokens: Rows after which a launch of decode steps takes no further work; work larger than this runs
            alone.
        max_prompt_tokens: The same for a launch of prompts, which a decode step that comes just after has to wait for.
    """

    def __init__(self, max_batch_tokens: int, max_prompt_tokens: int) -> None:
        self._decodes: WorkLanes[Payload] = WorkLanes(max_batch_tokens)
        self._prompts: WorkLanes[Payload] = WorkLanes(max_prompt_tokens)
        self._order: WorkOrder[Payload] = WorkOrder()
        self._deadlines: Deadlines[Payload] = Deadlines()
        # Not looked at yet, and looked at: both in the order of arrival.
        self._arrived: list[WorkItem[Payload]] = []
        self._queued: dict[int, QueuedWork[Payload]] = {}
        self._num_arrived = 0
        self._num_passed_over = 0

    def __len__(self) -> int:
        return len(self._arrived) + len(self._queued)

    @property
    def items(self) -> list[WorkItem[Payload]]:
        """Everything queued, in the order of arrival."""
        return [*(work.item for work in self._queued.values()), *self._arrived]

    def submit(self, item: WorkItem[Payload]) -> None:
        """Queue a piece of work."""
        self._arrived.append(item)

    def clear(self) -> list[Payload]:
        """Take everything off the queue, unrun, in the order of arrival."""
        payloads = [item.payload for item in self.items]
        for work in list(self._queued.values()):
            self._leave(work)
        self._arrived.clear()
        return payloads

    def next_turn(self, now: float) -> Turn[Payload]:
        """Take the work of the next launch, and what has expired, off the queue.

        The caller runs the batch to its end before it asks again. Cancelled work is dropped when its turn comes.
        """
        if not self._queued and self._can_share():
            arrived, self._arrived = self._arrived, []
            return _turn_of(arrived, now)
        for item in self._arrived:
            self._enter(item)
        self._arrived.clear()
        expired = [work.item.payload for work in self._expire(now)]
        taken = self._take()
        for work in taken:
            self._leave(work)
        return Turn([work.item.payload for work in taken], expired)

    def _can_share(self) -> bool:
        """Whether all that has arrived can run in one launch, so that nothing of it need be kept: the common case."""
        if len(self._arrived) <= 1:
            return True
        first = self._arrived[0]
        room = (self._prompts if first.is_prompt else self._decodes).max_tokens
        touched: set[WorkKey] = set()
        num_keys = 0
        for item in self._arrived:
            room -= item.num_tokens
            if room < 0 or item.batch_key != first.batch_key or item.is_prompt != first.is_prompt:
                return False
            touched |= item.keys
            num_keys += len(item.keys)
        return first.batch_key is not None and num_keys == len(touched)

    def _enter(self, item: WorkItem[Payload]) -> None:
        self._num_arrived += 1
        work = QueuedWork(item, self._num_arrived)
        self._queued[work.arrival] = work
        self._deadlines.add(work, len(self._queued))
        self._order.enter(work)
        if work.num_blockers == 0:
            self._make_ready([work])

    def _expire(self, now: float) -> Iterable[QueuedWork[Payload]]:
        for work in self._deadlines.passed(now):
            self._leave(work)
            if not work.item.is_cancelled():
                yield work

    def _take(self) -> list[QueuedWork[Payload]]:
        kinds = [self._decodes, self._prompts]
        if self._num_passed_over >= MAX_PASSED_OVER:
            kinds.reverse()
        # Cancelled work of one kind may have held back work of the other, so that both may have to be asked again.
        while any(kind.has_work for kind in kinds):
            for kind in kinds:
                taken = self._take_of(kind)
                if taken:
                    has_passed_over = kind is self._decodes and self._prompts.has_work
                    self._num_passed_over = self._num_passed_over + 1 if has_passed_over else 0
                    return taken
        return []

    def _take_of(self, kind: WorkLanes[Payload]) -> list[QueuedWork[Payload]]:
        """Take a launch of one kind; what the cancelled work in its way held back may be part of it."""
        while kind.has_work:
            taken, cancelled = kind.take()
            for work in cancelled:
                self._leave(work)
            if taken:
                return taken
        return []

    def _leave(self, work: QueuedWork[Payload]) -> None:
        """Note that work is queued no more, and that what waited for it may run."""
        del self._queued[work.arrival]
        work.is_queued = False
        self._make_ready(self._order.leave(work))

    def _make_ready(self, ready: Iterable[QueuedWork[Payload]]) -> None:
        for work in ready:
            (self._prompts if work.item.is_prompt else self._decodes).add(work)


def _turn_of(items: Iterable[WorkItem[Payload]], now: float) -> Turn[Payload]:
    """Return the turn of work that runs together, unless it expired or was cancelled."""
    turn: Turn[Payload] = Turn([], [])
    for item in items:
        if not item.is_cancelled():
            (turn.expired if item.deadline <= now else turn.batch).append(item.payload)
    return turn
