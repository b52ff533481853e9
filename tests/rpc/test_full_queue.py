"""A queue that fills up: whose turn it is, what is refused, and what the clients make of that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import grpc
import pytest

import octavo_client as oc
from octavo import v1
from octavo_client import _append
from octavo_server import engine as engine_module
from tests.rpc.checked_session import Checked, draw_prompt, draw_step
from tests.rpc.conftest import serving
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Wire, refusal_of, refusal_of_call, unharmed
from tests.waiting import until, wait_until

LIMIT = 2


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[oc.OctavoError]:
    """What appends were refused for, and went on after."""
    seen: list[oc.OctavoError] = []
    resume = _append.AppendPlan.resume

    def noting(plan: _append.AppendPlan, lengths: tuple[int, ...], error: oc.OctavoError) -> bool:
        seen.append(error)
        return resume(plan, lengths, error)

    monkeypatch.setattr(_append.AppendPlan, "resume", noting)
    return seen


@pytest.fixture(scope="module")
def module_wire() -> Iterator[Wire]:
    with serving(max_queued_steps=LIMIT) as wire:
        yield wire


def fill(wire: Wire, client: oc.Client) -> list[oc.Session]:
    """Queue as many steps as there may be, each of a session of its own; call it while the server is busy."""
    sessions = [client.open_session(MODEL) for _ in range(LIMIT)]
    for session in sessions:
        session.submit(0, *draw_step())
    wire.wait_for_queued(LIMIT)
    return sessions


def test_one_step_too_many_is_refused_unapplied_and_its_stream_lives(wire: Wire) -> None:
    with unharmed(wire) as (victim, _), wire.stream() as stream, oc.Client(wire.address) as client:
        with wire.busy():
            sessions = fill(wire, client)
            over = wire.step((victim, 0, 1))
            stream.send(over)
            refusal = refusal_of(stream.receive().error)
            assert (refusal.reason, refusal.metadata) == ("QUEUE_FULL", {"limit": str(LIMIT)})
            assert refusal.has_retry
            with pytest.raises(grpc.RpcError) as refused:
                wire.stub.DecodeOnce(v1.DecodeOnceRequest(step=over), timeout=CALL_TIMEOUT_S)
            assert refusal_of_call(refused.value).reason == "QUEUE_FULL"
        stream.send(over)
        wire.check(over, stream.receive(), [(victim, 0)])
        for session in sessions:
            session.close()


def test_the_caller_of_a_step_sees_when_to_come_back(wire: Wire) -> None:
    with oc.Client(wire.address) as client, client.open_session(MODEL) as session:
        with wire.busy():
            filling = fill(wire, client)
            with pytest.raises(oc.QueueFull) as refused:
                session.decode(0, *draw_step())
            assert (refused.value.limit, refused.value.retry_after_s) == (LIMIT, 0.1)
            assert session.lengths == (0, 0)
        checked, tensors = Checked(session), draw_step()
        checked.check(0, tensors, session.decode(0, *tensors))
        for each in filling:
            each.close()


def test_a_prompt_waits_until_there_is_room(wire: Wire, refusals: list[oc.OctavoError]) -> None:
    with oc.Client(wire.address) as client, ThreadPoolExecutor() as threads:
        session, prompt = client.open_session(MODEL), draw_prompt(40)
        with wire.busy():
            filling = fill(wire, client)
            appending = threads.submit(session.append, *prompt)
            wait_until(lambda: refusals)
        appending.result(CALL_TIMEOUT_S)
        assert {type(error) for error in refusals} == {oc.QueueFull}
        checked, tensors = Checked(session), draw_step()
        checked.take_prompt(prompt)
        checked.check(1, tensors, session.decode(1, *tensors))
        for each in filling:
            each.close()


def test_an_asyncio_client_does_the_same(wire: Wire, refusals: list[oc.OctavoError]) -> None:
    async def main(filler: oc.Client) -> None:
        async with oc.AsyncClient(wire.address) as client:
            session, prompt = await client.open_session(MODEL), draw_prompt(20)
            with wire.busy():
                await asyncio.to_thread(fill, wire, filler)
                with pytest.raises(oc.QueueFull):
                    await session.decode(0, *draw_step())
                appending = asyncio.create_task(session.append(*prompt))
                await until(lambda: refusals)
            await appending
            assert {type(error) for error in refusals} == {oc.QueueFull}
            assert (await session.refresh()).lengths == (20, 20)

    with oc.Client(wire.address) as filler:
        asyncio.run(main(filler))


def test_a_flood_of_one_stream_leaves_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "MAX_BATCH_TOKENS", 2)
    with serving() as wire:
        flooding, other = [wire.open() for _ in range(2)], wire.open()
        with wire.stream() as flood, wire.stream() as late:
            with wire.busy():
                for caching, layer in product(flooding, range(2)):
                    flood.send(wire.step((caching, layer, 1), return_stage_times=True))
                wire.wait_for_queued(4)
                late.send(wire.step((other, 0, 1), return_stage_times=True))
                wire.wait_for_queued(5)
            assert late.receive().stage_times.batch_size == 2
            sizes = [flood.receive().stage_times.batch_size for _ in range(4)]
            assert sizes == [2, 2, 2, 1]


def test_every_call_is_a_client_of_its_own(wire: Wire) -> None:
    cachings = [wire.open() for _ in range(2)]
    with wire.busy():
        step = v1.DecodeOnceRequest(step=wire.step((cachings[0], 0, 1)))
        once = wire.stub.DecodeOnce.future(step, timeout=CALL_TIMEOUT_S)
        k = wire.step((cachings[1], 0, 1)).k
        message = v1.AppendRequest(session_handle=cachings[1].handle, num_tokens=1, k=k, v=k)
        append = wire.stub.Append.future(iter([message]), timeout=CALL_TIMEOUT_S)
        wire.wait_for_queued(2)
        assert len({item.client for item in wire.queue} | {None}) == 3
    assert once.result() is not None
    assert append.result().num_messages == 1
