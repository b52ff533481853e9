"""A pipeline's order of work, and its ends: tasks by hand, futures that a test answers when it likes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_client import BatchResult, Step, Steps, micro_batches
from octavo_client._pipeline import Action, Receive, Settle, Submit, run, schedule, settle_async


def step(name: str) -> Step:
    """Return a step that is known by its q."""
    return Step([], name)


class FakeClient:
    """Performs actions and logs them; answers a step, "A0" with "a0", when it is waited for, or as told.

    Attributes:
        log: What happened, in order.
        on_submit: Run with a step's name before it is sent; may raise.
        answers: By a step's name, what its future is given instead.
        early: Steps that are answered as soon as they are sent.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.on_submit: Callable[[str], None] = lambda name: None
        self.answers: dict[str, BaseException] = {}
        self.early: set[str] = set()
        self.futures: dict[str, Future[Any]] = {}

    def perform(self, action: Action) -> Any:
        if isinstance(action, Submit):
            return self._submit(action.step.q)
        if isinstance(action, Receive):
            return self._receive(action.future)
        self.log.append("settle " + " ".join(self._name(future) for future in action.futures))
        for future in action.futures:
            self._answer(future)
        return wait(action.futures)

    def pipeline(self, tasks: list[Steps[Any]]) -> list[Any]:
        return run(schedule(tasks), self.perform)

    def _submit(self, name: str) -> Future[Any]:
        self.on_submit(name)
        self.log.append(f"send {name}")
        future: Future[Any] = Future()
        self.futures[name] = future
        if name in self.early:
            self._answer(future)
        return future

    def _receive(self, future: Future[Any]) -> Any:
        name = self._name(future)
        self.log.append(f"wait {name}")
        self._answer(future)
        return future.result()

    def _answer(self, future: Future[Any]) -> None:
        name = self._name(future)
        if future.done():
            return
        answer = self.answers.get(name)
        if answer is None:
            future.set_result(name.lower())
        elif isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            raise answer

    def _name(self, future: Future[Any]) -> str:
        return next(name for name, other in self.futures.items() if other is future)


def task(client: FakeClient, name: str, num_steps: int) -> Steps[str]:
    """Yield steps A0, A1, ...; log what is computed between them and how it ends."""
    text = ""
    try:
        for idx in range(num_steps):
            client.log.append(f"compute {name}{idx}")
            text += str((yield step(f"{name}{idx}")))
    except GeneratorExit:
        client.log.append(f"close {name}")
        raise
    return text


def test_one_computes_while_the_other_s_step_is_in_flight() -> None:
    client = FakeClient()
    assert client.pipeline([task(client, "A", 2), task(client, "B", 2)]) == ["a0a1", "b0b1"]
    assert client.log == [
        *("compute A0", "send A0", "compute B0", "send B0"),
        *("wait A0", "compute A1", "send A1", "wait B0", "compute B1", "send B1"),
        *("wait A1", "wait B1"),
    ]


def test_whose_answer_is_there_goes_on_first() -> None:
    client = FakeClient()
    client.early = {"B0", "B1"}
    client.pipeline([task(client, "A", 2), task(client, "B", 2)])
    waits = [line for line in client.log if line.startswith("wait")]
    assert waits == ["wait B0", "wait B1", "wait A0", "wait A1"]


def test_tasks_of_other_lengths_and_of_none() -> None:
    client = FakeClient()
    tasks = [task(client, "A", 0), task(client, "B", 3), task(client, "C", 1)]
    assert client.pipeline(tasks) == ["", "b0b1b2", "c0"]
    assert client.pipeline([]) == []


@given(st.lists(st.integers(0, 5), max_size=5))
def test_every_step_is_sent_once_and_in_its_order(counts: list[int]) -> None:
    client = FakeClient()
    names = "ABCDE"[: len(counts)]
    tasks = [task(client, name, count) for name, count in zip(names, counts, strict=True)]
    client.pipeline(tasks)
    for name, count in zip(names, counts, strict=True):
        sent = [line for line in client.log if line.startswith(f"send {name}")]
        assert sent == [f"send {name}{idx}" for idx in range(count)]
    in_flight = most = 0
    for line in client.log:
        in_flight += line.startswith("send") - line.startswith("wait")
        most = max(most, in_flight)
    assert (in_flight, most) == (0, sum(count > 0 for count in counts))


def test_a_task_that_raises_ends_all_once_their_steps_are_settled() -> None:
    client = FakeClient()

    def failing() -> Steps[None]:
        yield step("X0")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        client.pipeline([task(client, "A", 3), failing(), task(client, "C", 1)])
    assert client.log[-4:] == ["wait X0", "settle A1 C0", "close A", "close C"]
    assert caught.value.__notes__ == ["raised in task 1 of a pipeline of 3"]
    assert all(future.done() for future in client.futures.values())


def test_a_task_that_raises_before_the_others_began() -> None:
    client = FakeClient()

    def failing() -> Steps[None]:
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError):
        client.pipeline([task(client, "A", 1), failing(), task(client, "C", 1)])
    assert client.log == ["compute A0", "send A0", "settle A0", "close A"]


@pytest.mark.parametrize("is_caught", [False, True])
def test_a_step_s_failure_is_raised_where_it_was_yielded(is_caught: bool) -> None:
    client = FakeClient()
    client.answers = {"X0": TimeoutError("no answer")}

    def retrying() -> Steps[str]:
        with suppress(*([TimeoutError] if is_caught else [])):
            yield step("X0")
        return str((yield step("X1")))

    tasks = [retrying(), task(client, "B", 1)]
    if is_caught:
        assert client.pipeline(tasks) == ["x1", "b0"]
        return
    with pytest.raises(TimeoutError, match="no answer"):
        client.pipeline(tasks)
    assert client.log[-2:] == ["settle B0", "close B"]


def test_a_step_that_cannot_be_sent_is_raised_where_it_was_yielded() -> None:
    client = FakeClient()

    def refuse(name: str) -> None:
        if name == "X0":
            raise ValueError("q must be [1, 4, 8]")

    def trying() -> Steps[str]:
        with pytest.raises(ValueError, match="q must be"):
            yield step("X0")
        return "went on"

    client.on_submit = refuse
    assert client.pipeline([trying(), task(client, "B", 1)]) == ["went on", "b0"]


def test_what_is_no_step_is_named() -> None:
    def wrong() -> Generator[Any, BatchResult, None]:
        yield ("entries", "q")

    with pytest.raises(TypeError, match=r"must yield octavo_client\.Step, got tuple"):
        FakeClient().pipeline([wrong()])


def test_failures_beside_the_first_are_notes_of_it() -> None:
    client = FakeClient()
    client.answers = {"A0": TimeoutError("late")}

    def stubborn() -> Steps[None]:
        try:
            yield step("S0")
        finally:
            raise KeyError("clean-up")

    def failing() -> Steps[None]:
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError) as caught:
        client.pipeline([task(client, "A", 1), stubborn(), failing()])
    assert caught.value.__notes__ == [
        "raised in task 2 of a pipeline of 3",
        "the step of task 0 failed as well: TimeoutError('late')",
        "closing task 1 failed as well: KeyError('clean-up')",
    ]
    assert client.log[-1] == "close A"


def test_an_interrupt_closes_every_task_and_settles() -> None:
    client = FakeClient()
    answers = deque([KeyboardInterrupt()])

    def interrupted_once(action: Action) -> Any:
        if isinstance(action, Receive) and answers:
            raise answers.popleft()
        return client.perform(action)

    tasks = [task(client, "A", 1), task(client, "B", 1)]
    with pytest.raises(KeyboardInterrupt):
        run(schedule(tasks), interrupted_once)
    assert client.log[-3:] == ["settle A0 B0", "close A", "close B"]


def test_tasks_are_closed_even_when_settling_is_interrupted() -> None:
    client = FakeClient()

    def interrupted(action: Action) -> Any:
        if isinstance(action, (Receive, Settle)):
            raise KeyboardInterrupt
        return client.perform(action)

    with pytest.raises(KeyboardInterrupt):
        run(schedule([task(client, "A", 1), task(client, "B", 1)]), interrupted)
    assert client.log[-2:] == ["close A", "close B"]


def test_a_cancelled_pipeline_gives_steps_up_and_a_failed_one_waits() -> None:
    async def settle(cause: BaseException) -> list[bool]:
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(2)]
        loop.call_soon(_answer_all, futures)
        await settle_async(futures, cause)
        return [future.cancelled() for future in futures]

    assert asyncio.run(settle(asyncio.CancelledError())) == [True, True]
    assert asyncio.run(settle(ZeroDivisionError())) == [False, False]


def _answer_all(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


@given(st.integers(1, 200), st.integers(1, 12))
def test_micro_batches_cover_all_and_differ_by_one_at_most(
    num_sessions: int, num_parts: int
) -> None:
    parts = micro_batches(num_sessions, num_parts)
    rows = np.arange(num_sessions)
    assert np.concatenate([rows[part] for part in parts]).tolist() == rows.tolist()
    sizes = [len(rows[part]) for part in parts]
    assert len(sizes) == min(num_sessions, num_parts)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_micro_batches_of_nothing() -> None:
    assert micro_batches(5) == [slice(0, 3), slice(3, 5)]
    for num_sessions, num_parts in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"must be 1 or more"):
            micro_batches(num_sessions, num_parts)
