"""Pipelines of both clients against a real server: the same bits as without one, and nothing left behind."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import octavo_client as oc
from octavo_server.config_keys import ModelConfig
from tests.rpc.conftest import serving, tiny_model
from tests.rpc.wire import HEAD_DIM, MODEL, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS, Wire
from tests.waiting import until

NUM_SESSIONS, NUM_TOKENS = 5, 3
SIZE = NUM_Q_HEADS * HEAD_DIM
EXACT = "exact"

Array = NDArray[np.float32]
Sessions = Sequence[oc.Session | oc.AsyncSession]

_rng = np.random.default_rng(5)
PROJECT = _rng.standard_normal((NUM_LAYERS, SIZE, SIZE + 2 * NUM_KV_HEADS * HEAD_DIM)) / 8
PROMPTS: list[Any] = [
    _rng.standard_normal((2, NUM_LAYERS, length, NUM_KV_HEADS, HEAD_DIM), np.float32)
    for length in (1, 40, 7, 16, 23)
]


@pytest.fixture(scope="module")
def exact_wire() -> Iterator[Wire]:
    """A server whose model answers in the same bits whatever shares the batch."""
    served = tiny_model(EXACT, 0)
    spec = replace(served.spec, deterministic=True)
    with serving(models=(ModelConfig(spec, num_blocks=30),), max_sessions=20) as wire:
        yield wire


def decode(sessions: Sessions, rows: slice) -> oc.Steps[Array]:
    """Decode tokens of a model whose hidden state is attention alone; row by row, so that bits can be compared."""
    x = np.linspace(-1, 1, NUM_SESSIONS * SIZE, dtype=np.float32).reshape(-1, SIZE)[rows]
    for _ in range(NUM_TOKENS):
        for layer in range(NUM_LAYERS):
            heads = np.stack([row @ PROJECT[layer] for row in x]).astype(np.float32)
            q, k, v = np.split(
                heads.reshape(len(x), -1, HEAD_DIM), [NUM_Q_HEADS, NUM_Q_HEADS + NUM_KV_HEADS], 1
            )
            entries = [oc.Entry(session, layer) for session in sessions[rows]]
            result = yield oc.Step(entries, q, k, v, {"return_lse": True})
            assert result.lse is not None
            x = x + result.raise_for_errors().out.reshape(len(x), -1)
    return x


def without_pipeline(client: oc.Client, sessions: Sessions) -> Array:
    """Run the same model code step by step."""
    task = decode(sessions, slice(0, NUM_SESSIONS))
    result = None
    while True:
        try:
            step = task.send(result)  # type: ignore[arg-type]
        except StopIteration as stop:
            found: Array = stop.value
            return found
        result = client.decode_batch(step.entries, step.q, step.k, step.v, **step.options)


def open_all(client: oc.Client) -> list[oc.Session]:
    """Open a session for each prompt."""
    sessions = [client.open_session(EXACT) for _ in PROMPTS]
    for session, prompt in zip(sessions, PROMPTS, strict=True):
        session.append(*prompt)
    return sessions


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_the_same_bits_as_without_a_pipeline(exact_wire: Wire, num_parts: int) -> None:
    with oc.Client(exact_wire.address) as client:
        plain, piped = open_all(client), open_all(client)
        expected = without_pipeline(client, plain)
        parts = oc.micro_batches(NUM_SESSIONS, num_parts)
        found = client.pipeline(decode(piped, rows) for rows in parts)
        assert [len(part) for part in found] == [rows.stop - rows.start for rows in parts]
        assert np.array_equal(np.concatenate(found), expected)
        for session, twin in zip(plain, piped, strict=True):
            assert twin.refresh().lengths == session.lengths == twin.lengths
            session.close()
            twin.close()


def test_the_same_bits_of_the_asyncio_client(exact_wire: Wire) -> None:
    with oc.Client(exact_wire.address) as client:
        plain, piped = open_all(client), open_all(client)
        expected = without_pipeline(client, plain)

        async def main() -> Array:
            async with oc.AsyncClient(exact_wire.address) as other:
                sessions = [await other.attach(session.session_id) for session in piped]
                rows = oc.micro_batches(NUM_SESSIONS)
                return np.concatenate(await other.pipeline(decode(sessions, part) for part in rows))

        assert np.array_equal(asyncio.run(main()), expected)
        for session in (*plain, *piped):
            session.close()


def draw_rows(num_tokens: int) -> tuple[Array, Array, Array]:
    """Return q, k and v."""
    heads = (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (_rng.standard_normal((num_tokens, n, HEAD_DIM), np.float32) for n in heads)
    return q, k, v


def walk(session: oc.Session | oc.AsyncSession, start_pos: int | None = None) -> oc.Steps[None]:
    """Append a token to each layer."""
    for layer in range(NUM_LAYERS):
        entries = [oc.Entry(session, layer, start_pos=start_pos)]
        result = yield oc.Step(entries, *draw_rows(1))
        result.raise_for_errors()


def test_a_refused_entry_ends_its_task_and_leaves_no_step(wire: Wire) -> None:
    with oc.Client(wire.address) as client:
        one, two = client.open_session(MODEL), client.open_session(MODEL)
        with pytest.raises(oc.PositionMismatch) as caught:
            client.pipeline([walk(one), walk(two, start_pos=3)])
        assert caught.value.__notes__ == ["raised in task 1 of a pipeline of 2"]
        # The other's second layer was on its way by then, and is in.
        assert one.lengths == one.refresh().lengths == (1, 1)
        assert two.lengths == two.refresh().lengths == (0, 0)
        client.pipeline([walk(one), walk(two)])
        assert (one.lengths, two.lengths) == ((2, 2), (1, 1))


def test_a_refused_entry_can_be_let_pass(wire: Wire) -> None:
    with oc.Client(wire.address) as client:
        one, two = client.open_session(MODEL), client.open_session(MODEL)

        def tolerant() -> oc.Steps[int]:
            entries = [oc.Entry(one, 0), oc.Entry(two, 0, start_pos=7)]
            result = yield oc.Step(entries, *draw_rows(2))
            assert result[0].out.shape == (1, NUM_Q_HEADS, HEAD_DIM)
            return len(result.errors)

        assert client.pipeline([tolerant()]) == [1]


def test_a_step_that_cannot_be_sent_ends_the_pipeline(wire: Wire) -> None:
    with oc.Client(wire.address) as client:
        one, two = client.open_session(MODEL), client.open_session(MODEL)

        def misshapen() -> oc.Steps[None]:
            yield oc.Step([oc.Entry(two, 0)], *draw_rows(2))

        with pytest.raises(ValueError, match="q must be"):
            client.pipeline([walk(one), misshapen()])
        assert one.lengths == one.refresh().lengths == (1, 0)


def is_closed(task: oc.Steps[None]) -> bool:
    """Return whether a generator has come to its end."""
    return inspect.getgeneratorstate(task) == inspect.GEN_CLOSED


def test_cancelling_gives_up_the_steps_in_flight(wire: Wire) -> None:
    async def main() -> None:
        async with oc.AsyncClient(wire.address) as client:
            sessions = [await client.open_session(MODEL) for _ in range(2)]
            tasks = [walk(session) for session in sessions]
            wire.backend.shut()
            running = asyncio.create_task(client.pipeline(tasks))
            await until(wire.backend.is_running.is_set)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert all(map(is_closed, tasks))
            wire.backend.open()
            # The first step was at the backend: it was applied, though nobody waits for it. Then all goes on.
            session = sessions[0]
            while (await session.refresh()).lengths != (1, 0):
                await asyncio.sleep(0.005)
            await client.pipeline([walk(session)])
            assert (await session.refresh()).lengths == session.lengths == (2, 1)

    asyncio.run(main())
