"""Queued work as the scheduler sees it: what it touches, whose it is, and what it may share a launch with."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
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
        batch_key: Work of equal batch keys may share a launch; None = takes no launch.
        num_tokens: Rows that it adds to a launch.
        deadline: Time after which it is no longer to be started, on the caller's clock; infinity = never.
        is_cancelled: Whether its caller is gone, asked when its turn comes.
        client: Whose it is; clients take turns.
        is_prompt: Whether it gives way to work that is none.
    """

    payload: Payload
    keys: frozenset[WorkKey]
    batch_key: Hashable = None
    num_tokens: int = 0
    deadline: float = float("inf")
    is_cancelled: Callable[[], bool] = _never
    client: Hashable = None
    is_prompt: bool = False


@dataclass(slots=True, eq=False)
class QueuedWork(Generic[Payload]):
    """A work item in the queue.

    Attributes:
        item: The work.
        arrival: Its number in the order of arrival.
        num_blockers: Times that it is among the followers of work before it.
        followers: Work that must wait for it, once for each key.
        is_queued: False once it was taken, expired or dropped.
    """

    item: WorkItem[Payload]
    arrival: int
    num_blockers: int = 0
    followers: list[QueuedWork[Payload]] = field(default_factory=list)
    is_queued: bool = True
