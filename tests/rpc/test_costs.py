"""What steps cost, as a server tells it: the stage times of one step, and the totals of all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest

import octavo_client as oc
from octavo import v1
from tests.rpc.checked_session import Checked, draw_prompt, draw_step
from tests.rpc.conftest import serving
from tests.rpc.wire import (
    CALL_TIMEOUT_S,
    HEAD_DIM,
    MODEL,
    NUM_KV_HEADS,
    NUM_LAYERS,
    WINDOWED_MODEL,
    Caching,
    Wire,
)

TOKEN_BYTES = 2 * NUM_KV_HEADS * (HEAD_DIM + 2)
"""Bytes of one cached token in one layer."""


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


def launches_of(stats: oc.ServerStats) -> dict[int, int]:
    return {launch.max_batch_size: launch.num_launches for launch in stats.launches}


def test_the_totals_count_what_was_done() -> None:
    with serving(max_queued_steps=7) as wire, oc.Client(wire.address) as client:
        session = client.open_session(MODEL)
        session.append(*draw_prompt(20))
        for _ in range(2):
            session.decode(0, *draw_step())
        session.decode(1, draw_step(3)[0])
        with pytest.raises(oc.PositionMismatch):
            session.decode(0, *draw_step(), start_pos=3)
        stats = client.server_stats()
        assert launches_of(stats) == {1: 2 + 4}
        (launch,) = stats.launches
        assert (launch.num_steps, launch.num_entries) == (6, 6)
        assert launch.num_tokens == 2 * 20 + 2 + 3 + 1
        assert launch.kernel_us > 0
        assert (stats.num_steps, stats.num_appended_tokens) == (6, 2 * 20 + 2)
        assert dict(stats.refusals) == {"POSITION_MISMATCH": 1}
        assert (stats.num_queued, stats.max_queued_steps) == (0, 7)
        assert (stats.num_sessions, stats.num_streams, stats.max_streams) == (1, 1, 4)
        assert list(stats.pools) == [MODEL, WINDOWED_MODEL]
        block_bytes = 16 * NUM_LAYERS * TOKEN_BYTES
        assert stats.pools[MODEL] == oc.PoolStats(12, 10, 16, block_bytes)
        # Attention over 21, 22 and 20 tokens, and what was stored.
        assert launch.cache_bytes == (21 + 22 + 20 + 2 * 20 + 2) * TOKEN_BYTES
        assert stats.device_free_bytes > 2**20
        assert stats.uptime_s > 0


def test_the_totals_count_the_bytes_of_messages_each_way() -> None:
    with serving() as wire:
        stats = read_stats(wire)
        assert (stats.received_bytes, stats.sent_bytes) == (0, 0)
        before = stats.ByteSize()
        opened = v1.OpenSessionRequest(model=MODEL)
        session = wire.stub.OpenSession(opened, timeout=CALL_TIMEOUT_S)
        handle = session.session.session_handle
        step = wire.step((Caching("", handle), 0, 3))
        with wire.stream() as stream:
            stream.send(step)
            result = stream.receive()
            received = opened.ByteSize() + v1.DecodeRequest(step=step).ByteSize()
            sent = before + session.ByteSize() + v1.DecodeResponse(result=result).ByteSize()
            stats = read_stats(wire)
            assert (stats.received_bytes, stats.sent_bytes) == (received, sent)


def read_stats(wire: Wire) -> v1.ServerStatsResponse:
    response = wire.stub.ServerStats(v1.ServerStatsRequest(), timeout=CALL_TIMEOUT_S)
    assert isinstance(response, v1.ServerStatsResponse)
    return response


def test_the_totals_count_every_refusal_once() -> None:
    with serving(max_streams=1, max_queued_steps=1) as wire, wire.stream() as stream:
        caching = wire.open()
        closed = Caching("", caching.handle ^ 1)
        bad = wire.step((caching, 0, 1))
        bad.q.dtype = v1.DATA_TYPE_UNSPECIFIED
        stream.send(bad)
        stream.send(wire.step((caching, 5, 1), (closed, 0, 1)))
        for _ in range(2):
            stream.receive()
        gone = wire.step((closed, 0, 1))
        once = wire.stub.DecodeOnce(v1.DecodeOnceRequest(step=gone), timeout=CALL_TIMEOUT_S)
        assert len(once.result.entry_errors) == 1
        with pytest.raises(grpc.RpcError):
            wire.raw("unary_unary", "CloseSession")(b"\xff", timeout=CALL_TIMEOUT_S)
        with pytest.raises(grpc.RpcError):
            wire.stub.Append(iter([]), timeout=CALL_TIMEOUT_S)
        assert dict(read_stats(wire).refusals) == {
            "BAD_TENSOR": 1,
            "LAYER_NOT_FOUND": 1,
            "MALFORMED_MESSAGE": 1,
            "SESSION_NOT_FOUND": 2,
            "STREAM_LIMIT": 1,
        }


def test_the_totals_show_what_waits(client: oc.Client, wire: Wire) -> None:
    sessions = [client.open_session(MODEL) for _ in range(3)]
    with wire.busy():
        futures = [session.submit(0, *draw_step()) for session in sessions]
        wire.wait_for_queued(3)
        assert client.server_stats().num_queued == 3
    for future in futures:
        future.result(CALL_TIMEOUT_S)
    stats = client.server_stats()
    assert stats.num_queued == 0
    assert launches_of(stats)[4] >= 1


def test_an_asyncio_client_reads_the_same_totals(client: oc.Client, wire: Wire) -> None:
    async def main() -> oc.ServerStats:
        async with oc.AsyncClient(wire.address) as other:
            return await other.server_stats()

    theirs, ours = asyncio.run(main()), client.server_stats()
    assert theirs.launches == ours.launches
    assert (theirs.num_steps, theirs.pools) == (ours.num_steps, ours.pools)
