"""What steps cost, as a server tells it: the stage times of one step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

import octavo_client as oc
from octavo import v1
from tests.rpc.checked_session import Checked, draw_step
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Wire


@pytest.fixture
def client(wire: Wire) -> Iterator[oc.Client]:
    with oc.Client(wire.address) as client:
        yield client


def stages_us(times: oc.StageTimes | v1.StageTimes) -> int:
    return times.queue_us + times.copy_in_us + times.kernel_us + times.copy_out_us


def test_a_step_on_its_own_tells_what_it_cost(wire: Wire) -> None:
    caching = wire.open()
    step = wire.step((caching, 0, 3), (caching, 1, 2), return_stage_times=True)
    request = v1.DecodeOnceRequest(step=step)
    result = wire.stub.DecodeOnce(request, timeout=CALL_TIMEOUT_S).result
    times = result.stage_times
    assert (times.batch_size, times.batch_tokens) == (2, 5)
    assert times.kernel_us > 0
    assert not wire.run(wire.step((caching, 0, 3), start_pos=[3])).HasField("stage_times")


def test_a_client_is_told_what_its_steps_cost(client: oc.Client) -> None:
    with client.open_session(MODEL) as one, client.open_session(MODEL) as two:
        tensors = draw_step(2)
        began_at = time.monotonic()
        entries = [oc.Entry(one, 0), oc.Entry(two, 0)]
        batch = client.decode_batch(entries, *tensors, stage_times=True)
        whole_us = (time.monotonic() - began_at) * 1e6
        times = batch.stage_times
        assert times is not None
        assert (times.batch_size, times.batch_tokens) == (2, 2)
        assert times.kernel_us > 0
        assert stages_us(times) <= whole_us + 2
        assert batch[1].stage_times is times
        assert client.decode_batch(entries, *tensors).stage_times is None


def test_steps_that_shared_a_launch_say_so(client: oc.Client, wire: Wire) -> None:
    sessions = [client.open_session(MODEL) for _ in range(3)]
    with wire.busy():
        futures = [session.submit(0, *draw_step(), stage_times=True) for session in sessions]
        wire.wait_for_queued(3)
    results = [future.result(CALL_TIMEOUT_S).stage_times for future in futures]
    first, *others = [times for times in results if times is not None]
    assert (first.batch_size, first.batch_tokens) == (3, 3)
    assert len(others) == 2
    for times in others:
        assert (times.batch_size, times.copy_in_us, times.kernel_us) == (
            3,
            first.copy_in_us,
            first.kernel_us,
        )


def test_an_asyncio_client_is_told_too(wire: Wire) -> None:
    async def main() -> None:
        async with oc.AsyncClient(wire.address) as client:
            session = await client.open_session(MODEL)
            tensors = draw_step(3)
            result = await session.decode(0, *tensors, stage_times=True)
            Checked(session).check(0, tensors, result)
            assert result.stage_times is not None
            assert (result.stage_times.batch_size, result.stage_times.batch_tokens) == (1, 3)
            assert (await session.decode(0, tensors[0])).stage_times is None

    asyncio.run(main())


def test_a_step_of_closed_sessions_has_no_stage_times(wire: Wire) -> None:
    caching = wire.open()
    wire.close(caching)
    result = wire.run(wire.step((caching, 0, 1), return_stage_times=True))
    assert len(result.entry_errors) == 1
    assert not result.HasField("stage_times")
