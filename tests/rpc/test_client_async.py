"""The asyncio client against a real server: the same as the sync one, on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch

import octavo_client as oc
from octavo_client import _append
from tests.rpc.checked_session import Checked, check_batch, draw_prompt, draw_step
from tests.rpc.cutting_proxy import cutting_proxy
from tests.rpc.wire import MODEL, NUM_LAYERS, Wire

QUICK = oc.Retry(max_attempts=20, initial_backoff_s=0.02, max_backoff_s=0.1)


def run(target: str, main: Callable[[oc.AsyncClient], Awaitable[None]]) -> None:
    async def with_client() -> None:
        async with oc.AsyncClient(target, retry=QUICK) as client:
            await main(client)

    asyncio.run(with_client())


def test_a_session_from_prompt_to_close(wire: Wire) -> None:
    async def main(client: oc.AsyncClient) -> None:
        async with await client.open_session(MODEL) as session:
            checked, prompt = Checked(session), draw_prompt(40)
            await session.append(*prompt)
            checked.take_prompt(prompt)
            steps = [(layer, draw_step()) for _ in range(5) for layer in range(NUM_LAYERS)]
            futures = [await session.submit(layer, *tensors) for layer, tensors in steps]
            for (layer, tensors), future in zip(steps, futures, strict=True):
                checked.check(layer, tensors, await future)
            assert session.lengths == checked.lengths == (await session.refresh()).lengths
            await session.truncate(10, guard=True)
            other = await client.attach(session.session_id)
            assert (session.lengths, other.lengths) == ((10, 10), (10, 10))
            assert [state.session_id for state in await client.list_sessions()] == [
                session.session_id
            ]
        assert await client.list_sessions() == []

    run(wire.address, main)


def test_torch_in_torch_out(wire: Wire) -> None:
    async def main(client: oc.AsyncClient) -> None:
        async with await client.open_session(MODEL) as session:
            q, k, v = map(torch.from_numpy, draw_step(3))
            result = await session.decode(0, q, k, v, return_lse=True)
            assert isinstance(result.out, torch.Tensor)
            assert torch.equal((await session.decode(0, q)).out, result.out)

    run(wire.address, main)


def test_a_batch_with_a_refused_entry(wire: Wire) -> None:
    async def main(client: oc.AsyncClient) -> None:
        one, two = [await client.open_session(MODEL) for _ in range(2)]
        q, k, v = draw_step(2)
        entries = [oc.Entry(one, 0), oc.Entry(two, 0, start_pos=3)]
        batch = await client.decode_batch(entries, q, k, v)
        Checked(one).check(0, (q[:1], k[:1], v[:1]), batch[0])
        with pytest.raises(oc.PositionMismatch):
            batch[1]
        assert (one.lengths, two.lengths) == ((1, 0), (0, 0))

    run(wire.address, main)


def test_reasons_are_raised(wire: Wire) -> None:
    async def main(client: oc.AsyncClient) -> None:
        with pytest.raises(oc.ModelNotFound):
            await client.open_session("huge")
        session = await client.open_session(MODEL)
        with pytest.raises(oc.ContextTooLong):
            await session.append(*draw_prompt(161))
        await session.append(*draw_prompt(5))
        assert session.lengths == (5, 5)
        with pytest.raises(ValueError, match="layer must be from 0 to 1"):
            await session.decode(2, *draw_step())

    run(wire.address, main)


def test_decoding_survives_a_connection_that_breaks_all_the_time(wire: Wire) -> None:
    with cutting_proxy(wire.address) as proxy:

        async def main(client: oc.AsyncClient) -> None:
            sessions = [await client.open_session(MODEL) for _ in range(2)]
            checked = [Checked(session) for session in sessions]
            proxy.cut_after_bytes, proxy.num_cuts_left = 10_000, 5
            for _ in range(30):
                await decode_one_token(client, checked)
            for session in sessions:
                assert (await client.get_session(session.session_id)).lengths == (30, 30)

        run(proxy.target, main)
        assert (proxy.num_cuts_left, proxy.num_connections) == (0, 6)


async def decode_one_token(client: oc.AsyncClient, checked: list[Checked]) -> None:
    tensors = [draw_step(len(checked)) for _ in range(NUM_LAYERS)]
    futures = [
        await client.submit_batch(
            [oc.Entry(each.session, layer) for each in checked], *tensors[layer]
        )
        for layer in range(NUM_LAYERS)
    ]
    for layer, future in enumerate(futures):
        check_batch(checked, layer, tensors[layer], await future)


def test_a_prompt_survives_a_connection_that_breaks(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_append, "_MAX_MESSAGE_TOKENS", 1)
    with cutting_proxy(wire.address) as proxy:

        async def main(client: oc.AsyncClient) -> None:
            session = await client.open_session(MODEL)
            checked, prompt = Checked(session), draw_prompt(150)
            proxy.cut_after_bytes, proxy.num_cuts_left = 20_000, 3
            await session.append(*prompt)
            assert (await session.refresh()).lengths == (150, 150)
            checked.take_prompt(prompt)
            tensors = draw_step()
            checked.check(0, tensors, await session.decode(0, *tensors))

        run(proxy.target, main)
        assert (proxy.num_cuts_left, proxy.num_connections) == (0, 4)
