"""What the engine queues: steps and changes of sessions, as work for the scheduler, and how each is refused."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from octavo_server.errors import OctavoError, Reason
from octavo_server.model_pool import ModelPool
from octavo_server.session import Session
from octavo_server.step import StepAnswer, StepOrigin, StepRequest
from octavo_server.work import WHOLE_SESSION, WorkItem, WorkKey

MAX_DECODE_LEN = 32
"""Tokens an entry, on average, up to which a step is a decode step: as many as speculation drafts. More is a prompt."""


class QueuedStep(NamedTuple):
    """A step in the queue, with the sessions that its handles named when it arrived, or why they name none."""

    request: StepRequest
    sessions: Sequence[Session | OctavoError]
    pool: ModelPool
    answer: Callable[[StepAnswer], None]
    arrived_at: float


class QueuedChange(NamedTuple):
    """A truncate or close in the queue."""

    session: Session
    change: Callable[[Session], Any]
    future: Future[Any]


class QueuedTask(NamedTuple):
    """A short use of the backend in the queue, between the launches of steps; it sees to the order of things itself."""

    run: Callable[[], Any]
    future: Future[Any]
    client: Hashable


Queued = QueuedStep | QueuedChange | QueuedTask


def task_item(task: QueuedTask, num_tokens: int) -> WorkItem[Queued]:
    """Return a task as work for the scheduler: it goes where a prompt would, with `num_tokens` rows of a launch."""
    return WorkItem(
        task,
        frozenset(),
        batch_key=QueuedTask,
        num_tokens=num_tokens,
        is_cancelled=task.future.cancelled,
        client=task.client,
        is_prompt=True,
    )


def change_item(change: QueuedChange) -> WorkItem[Queued]:
    """Return a change of a session as work for the scheduler."""
    key = WorkKey(change.session.handle, WHOLE_SESSION)
    return WorkItem(change, frozenset([key]), is_cancelled=change.future.cancelled)


def work_item(step: QueuedStep, origin: StepOrigin) -> WorkItem[Queued]:
    """Return a step as work for the scheduler."""
    request = step.request
    tensors = request.tensors
    tensor = tensors[0][1]
    timeout_s = request.timeout_ms / 1000 if request.timeout_ms else float("inf")
    num_tokens = len(tensor)
    return WorkItem(
        payload=step,
        keys=frozenset(map(WorkKey, request.handles, request.layers)),
        batch_key=(step.pool.spec.name, tensor.dtype, tuple([name for name, _ in tensors])),
        num_tokens=num_tokens,
        deadline=step.arrived_at + timeout_s,
        is_cancelled=origin.is_gone,
        client=origin,
        is_prompt=request.q is None or num_tokens > MAX_DECODE_LEN * request.num_entries,
    )


def refuse(queued: Queued, error: OctavoError) -> None:
    """Answer a piece of work with a refusal; nothing of it was applied."""
    if isinstance(queued, QueuedStep):
        queued.answer(StepAnswer(error=error))
    elif not queued.future.done() and (
        queued.future.running() or queued.future.set_running_or_notify_cancel()
    ):
        queued.future.set_exception(error)


def expired(queued: Queued) -> OctavoError:
    """Return the refusal of a step whose deadline passed in the queue."""
    assert isinstance(queued, QueuedStep), "only steps have deadlines"
    timeout_ms = queued.request.timeout_ms
    message = f"the step waited {timeout_ms} ms in the queue and was not applied; send it again, with more time"
    return OctavoError(Reason.STEP_EXPIRED, message, timeout_ms=timeout_ms)
