"""Several steps in flight from straight-line code: the order of a pipeline's work, without I/O.

`schedule` is a generator of what to do next; `run` and `run_async` do it. Why generators, and not a function for each
part of a layer: what a micro-batch carries from layer to layer stays in local variables, control flow stays the
author's (a prompt first, many tokens, a draft now and then, layers without attention), `try` and `with` mean what they
always mean, and the same code drives either client, or an attention in process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

from octavo_client._types import BatchResult, Step

T = TypeVar("T")

Steps = Generator[Step, BatchResult, T]
"""What a function returns that yields steps, receives the answer of each, and ends with a T."""


class Submit(NamedTuple):
    """Send a step; the reply is its future."""

    step: Step


class Receive(NamedTuple):
    """Wait for a future; the reply is its result."""

    future: Any


class Settle(NamedTuple):
    """Wait until every future is done, or give their steps up if what ends the pipeline cannot wait."""

    futures: list[Any]
    cause: BaseException


Action = Submit | Receive | Settle


def micro_batches(num_sessions: int, num_parts: int = 2) -> list[slice]:
    """Cut a batch into micro-batches for a pipeline: slices of nearly one size, none empty, the larger ones first.

    A slice fits whatever has a row for each session: the sessions, their tokens, their positions.

    Args:
        num_sessions: Sessions of the batch.
        num_parts: Micro-batches; fewer where there are fewer sessions.

    Raises:
        ValueError: There is nothing to cut, or it is to be cut into nothing.
    """
    if num_sessions < 1 or num_parts < 1:
        raise ValueError(
            f"num_sessions and num_parts must be 1 or more, got {num_sessions} and {num_parts}"
        )
    num_parts = min(num_sessions, num_parts)
    size, num_larger = divmod(num_sessions, num_parts)
    ends = [size * part + min(part, num_larger) for part in range(num_parts + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def schedule(tasks: Iterable[Steps[T]]) -> Generator[Action, Any, list[T]]:
    """Run tasks to their ends, one step of each in flight; see Client.pipeline.

    Yields:
        What to do; its reply, or what it raised, comes back.

    Returns:
        What the tasks returned, in their order.
    """
    lanes = [_Lane(task) for task in tasks]
    try:
        waiting: list[_Lane[T]] = []
        for lane in lanes:
            with _named(lane, lanes):
                waiting += yield from lane.start()
        while waiting:
            lane = next((lane for lane in waiting if lane.has_answer), waiting[0])
            waiting.remove(lane)
            with _named(lane, lanes):
                waiting += yield from lane.take_answer()
    except BaseException as error:
        yield from _stop(lanes, error)
        raise
    return [lane.value for lane in lanes]


class _Lane(Generic[T]):
    """A task and its step in flight. `start` and `take_answer` return the lane itself while it goes on."""

    def __init__(self, task: Steps[T]) -> None:
        self.task = task
        self.future: Any = None
        self.value: Any = None

    @property
    def has_answer(self) -> bool:
        return bool(self.future.done())

    def start(self) -> Generator[Action, Any, list[_Lane[T]]]:
        return (yield from self._advance(partial(next, self.task)))

    def take_answer(self) -> Generator[Action, Any, list[_Lane[T]]]:
        try:
            resume = partial(self.task.send, (yield Receive(self.future)))
        except Exception as error:
            resume = partial(self.task.throw, error)
        self.future = None
        return (yield from self._advance(resume))

    def _advance(self, resume: Callable[[], Step]) -> Generator[Action, Any, list[_Lane[T]]]:
        """Run the task to its next step that can be sent; one that cannot is raised where it was yielded."""
        while True:
            try:
                step = resume()
            except StopIteration as stop:
                self.value = stop.value
                return []
            try:
                self.future = yield Submit(_checked(step))
            except Exception as error:
                resume = partial(self.task.throw, error)
            else:
                return [self]


def _checked(step: Any) -> Step:
    if not isinstance(step, Step):
        raise TypeError(
            f"a task of a pipeline must yield octavo_client.Step, got {type(step).__name__}"
        )
    return step


@contextmanager
def _named(lane: _Lane[T], lanes: list[_Lane[T]]) -> Iterator[None]:
    """Say on an error which task it ended."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised in task {lanes.index(lane)} of a pipeline of {len(lanes)}")
        raise


def _stop(lanes: list[_Lane[T]], cause: BaseException) -> Generator[Action, Any, None]:
    """Settle every step in flight, then close every task, whatever happens."""
    in_flight = {idx: lane.future for idx, lane in enumerate(lanes) if lane.future is not None}
    try:
        if in_flight:
            yield Settle(list(in_flight.values()), cause)
        for idx, future in in_flight.items():
            if not future.cancelled() and future.exception() is not None:
                cause.add_note(f"the step of task {idx} failed as well: {future.exception()!r}")
    finally:
        for idx, lane in enumerate(lanes):
            try:
                lane.task.close()
            except Exception as error:
                cause.add_note(f"closing task {idx} failed as well: {error!r}")


def run(actions: Generator[Action, Any, T], perform: Callable[[Action], Any]) -> T:
    """Perform actions one after the other; return what they come to."""
    resume = partial(next, actions)
    while True:
        try:
            action = resume()
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            resume = partial(actions.send, perform(action))
        except BaseException as error:
            resume = partial(actions.throw, error)


async def run_async(
    actions: Generator[Action, Any, T], perform: Callable[[Action], Awaitable[Any]]
) -> T:
    """Perform actions one after the other, as `run`."""
    resume = partial(next, actions)
    while True:
        try:
            action = resume()
        except StopIteration as stop:
            value: T = stop.value
            return value
        try:
            resume = partial(actions.send, await perform(action))
        except BaseException as error:
            resume = partial(actions.throw, error)


async def settle_async(futures: list[asyncio.Future[Any]], cause: BaseException) -> None:
    """Wait for futures, unless the task was cancelled: then, or when it is cancelled now, give them up."""
    try:
        if not isinstance(cause, asyncio.CancelledError):
            await asyncio.wait(futures)
    finally:
        for future in futures:
            future.cancel()
