"""The sync and the asyncio client against a server that breaks, refuses and stays silent as planned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

import octavo_client as oc
from octavo.v1 import octavo_pb2 as pb
from tests.unit.client_fakes import (
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    FakeServer,
    aborting,
    fake_server,
    refusing,
    status,
)
from tests.waiting import until, wait_until

QUICK = oc.Retry(max_attempts=5, initial_backoff_s=0.01, max_backoff_s=0.05)
SILENCE = pb.StepResult()
"""An answer that the fake server never sends."""

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[oc.Client]:
    with oc.Client(server.target, retry=QUICK) as client:
        yield client


@pytest.fixture
def session(client: oc.Client) -> oc.Session:
    return client.open_session("tiny")


def tensors(num_tokens: int = 1) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(1)
    shapes = [(num_tokens, heads, HEAD_DIM) for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    return q, k, v


def once(server: FakeServer, fault: Callable[[Any], pb.StepResult | None]) -> None:
    """Plant a fault for the next step only."""

    def act(step: Any) -> pb.StepResult | None:
        server.on_step = lambda step: None
        return fault(step)

    server.on_step = act


def break_after_applying(server: FakeServer) -> Callable[[Any], pb.StepResult | None]:
    def act(step: Any) -> pb.StepResult:
        server.serve(step)
        server.end_streams()
        return SILENCE

    return act


def break_before_applying(server: FakeServer) -> Callable[[Any], pb.StepResult | None]:
    def act(_step: Any) -> pb.StepResult:
        server.end_streams()
        return SILENCE

    return act


def run(main: Callable[[oc.AsyncClient], Awaitable[None]], server: FakeServer) -> None:
    async def with_client() -> None:
        async with oc.AsyncClient(server.target, retry=QUICK) as client:
            await main(client)

    asyncio.run(with_client())


@pytest.mark.parametrize("break_stream", [break_after_applying, break_before_applying])
def test_a_broken_stream_is_survived_with_the_same_key(
    server: FakeServer, session: oc.Session, break_stream: Any
) -> None:
    session.decode(0, *tensors())
    once(server, break_stream(server))
    q, k, v = tensors()
    np.testing.assert_array_equal(session.decode(0, q, k, v).out, q)
    first, again = server.steps[1:]
    assert (again.step_key, again.start_pos) == (first.step_key, first.start_pos)
    assert server.calls["Decode"] == 2
    assert (server.lengths, session.lengths) == ([2, 0], (2, 0))


@pytest.mark.parametrize("break_stream", [break_after_applying, break_before_applying])
def test_a_broken_stream_is_survived_by_asyncio_too(server: FakeServer, break_stream: Any) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        once(server, break_stream(server))
        futures = [await session.submit(0, *tensors()) for _ in range(3)]
        await asyncio.gather(*futures)
        assert (server.lengths, session.lengths) == ([3, 0], (3, 0))

    run(main, server)
    assert server.calls["Decode"] == 2


def test_many_steps_survive_many_breaks(server: FakeServer, session: oc.Session) -> None:
    faults = iter([break_after_applying, break_before_applying] * 2)
    served = [0]

    def act(step: Any) -> pb.StepResult | None:
        served[0] += 1
        if served[0] % 5 == 0:
            fault = next(faults, None)
            return fault(server)(step) if fault else None
        return None

    server.on_step = act
    futures = [session.submit(layer, *tensors()) for _ in range(10) for layer in range(NUM_LAYERS)]
    for future in futures:
        future.result()
    assert server.calls["Decode"] == 5
    assert server.lengths == [10, 10]


def test_results_come_in_any_order(server: FakeServer, session: oc.Session) -> None:
    held: list[pb.StepResult] = []
    may_answer = threading.Event()

    def act(step: Any) -> pb.StepResult:
        assert may_answer.wait(10)
        if not held:
            held.append(server.serve(step))
            return SILENCE
        for results in server.streams:
            results.put(server.serve(step))
        return held[0]

    server.on_step = act
    finished: list[int] = []
    futures = [session.submit(layer, *tensors()) for layer in range(NUM_LAYERS)]
    for layer, future in enumerate(futures):
        future.add_done_callback(partial(lambda layer, _: finished.append(layer), layer))
    may_answer.set()
    for future in futures:
        future.result()
    assert finished == [1, 0]


def test_appends_of_a_layer_are_sent_one_by_one(server: FakeServer, session: oc.Session) -> None:
    server.on_step = lambda step: SILENCE if step.layers[0] == 0 else None
    futures = [session.submit(0, *tensors()) for _ in range(3)]
    assert session.lengths == (3, 0)
    # What the stream carries arrives in order: all that was sent before this step is there once it is answered.
    session.decode(1, *tensors())
    first, _ = server.steps
    server.on_step = lambda step: None
    for results in server.streams:
        results.put(server.serve(first))
    for future in futures:
        future.result()
    appends = [(step.layers[0], step.start_pos[0]) for step in server.steps]
    assert appends == [(0, 0), (1, 0), (0, 1), (0, 2)]


def test_the_attempts_are_used_up(server: FakeServer, session: oc.Session) -> None:
    server.before["Decode"] = aborting(UNAVAILABLE, times=99)
    with pytest.raises(oc.ConnectionLost, match="planted break") as raised:
        session.decode(0, *tensors())
    assert raised.value.may_be_applied
    assert isinstance(raised.value.__cause__, grpc.RpcError)
    assert server.calls["Decode"] == QUICK.max_attempts


def test_a_client_recovers_after_it_gave_up(server: FakeServer, session: oc.Session) -> None:
    server.before["Decode"] = aborting(UNAVAILABLE, times=QUICK.max_attempts)
    with pytest.raises(oc.ConnectionLost):
        session.decode(0, *tensors())
    num_asked = server.calls["GetSession"]
    session.decode(0, *tensors())
    assert server.calls["GetSession"] == num_asked + 1, "a stale mirror was relied on"
    assert session.lengths == (1, 0)


@pytest.mark.parametrize(
    "refusal",
    [
        status("STREAM_LIMIT", "RESOURCE_EXHAUSTED", retry_after_s=0.05, limit=1),
        status("DRAINING", "UNAVAILABLE", retry_after_s=0.05),
    ],
)
def test_a_refused_stream_is_opened_again(
    server: FakeServer, session: oc.Session, refusal: Any
) -> None:
    server.before["Decode"] = refusing(refusal, times=2)
    session.decode(0, *tensors())
    assert server.calls["Decode"] == 3


def test_another_refusal_of_the_stream_is_final(server: FakeServer, session: oc.Session) -> None:
    server.before["Decode"] = refusing(status("DEVICE_FAILURE", "INTERNAL"))
    with pytest.raises(oc.ConnectionLost, match="planted DEVICE_FAILURE") as raised:
        session.decode(0, *tensors())
    assert raised.value.may_be_applied
    assert isinstance(raised.value.__cause__, oc.DeviceFailure)
    assert server.calls["Decode"] == 1


def test_a_step_refused_by_a_draining_server_goes_to_the_next(
    server: FakeServer, session: oc.Session
) -> None:
    refusal = status("DRAINING", "UNAVAILABLE")
    once(server, lambda step: pb.StepResult(step_id=step.step_id, error=refusal))
    session.decode(0, *tensors())
    assert server.calls["Decode"] == 2
    assert session.lengths == (1, 0)


def test_a_draining_server_is_left_by_asyncio_too(server: FakeServer) -> None:
    refusal = status("DRAINING", "UNAVAILABLE")
    once(server, lambda step: pb.StepResult(step_id=step.step_id, error=refusal))

    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        await session.decode(0, *tensors())
        assert session.lengths == (1, 0)

    run(main, server)
    assert server.calls["Decode"] == 2


def test_capacity_is_not_waited_for(server: FakeServer, session: oc.Session) -> None:
    refusal = status("OUT_OF_BLOCKS", "RESOURCE_EXHAUSTED", 0.5, required_blocks=2, free_blocks=1)
    once(server, lambda step: pb.StepResult(step_id=step.step_id, error=refusal))
    with pytest.raises(oc.OutOfBlocks) as raised:
        session.decode(0, *tensors())
    assert (raised.value.retry_after_s, raised.value.required_blocks) == (0.5, 2)
    assert (session.lengths, len(server.steps)) == ((0, 0), 1)


def test_silence_ends_in_a_timeout_that_says_what_is_known(
    server: FakeServer, session: oc.Session
) -> None:
    server.on_step = lambda step: SILENCE
    futures = [session.submit(0, *tensors(), timeout=seconds) for seconds in (2.0, 1.0)]
    wait_until(lambda: server.steps)
    fates = [future.exception(10) for future in futures]
    assert [(type(fate), fate.may_be_applied) for fate in fates] == [  # type: ignore[union-attr]
        (oc.StepTimeout, True),
        (oc.StepTimeout, False),
    ]
    assert server.steps[0].timeout_ms <= 1800
    server.on_step = lambda step: None
    session.decode(0, *tensors())
    assert server.calls["GetSession"] == 1


def test_a_short_timeout_after_a_long_one(server: FakeServer, session: oc.Session) -> None:
    server.on_step = lambda step: SILENCE
    long = session.submit(0, *tensors(), timeout=30.0)
    with pytest.raises(oc.StepTimeout):
        session.decode(1, *tensors(), timeout=0.1)
    assert not long.done()


def test_asyncio_timeouts_and_cancelling(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        server.on_step = lambda step: SILENCE
        overdue = await session.submit(0, *tensors(), timeout=1.0)
        await until(lambda: len(server.steps) == 1)
        with pytest.raises(oc.StepTimeout) as raised:
            await overdue
        assert raised.value.may_be_applied
        await session.refresh()
        decoding = asyncio.create_task(session.decode(0, *tensors()))
        await until(lambda: len(server.steps) == 2)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        server.on_step = lambda step: None
        # The step given up holds nothing back, and its fate is asked for.
        await session.decode(0, *tensors())
        assert server.calls["GetSession"] == 2

    run(main, server)


def test_an_answer_that_makes_no_sense_harms_only_its_step(
    server: FakeServer, session: oc.Session
) -> None:
    bad = pb.Tensor(data=b"abc", dtype=pb.DATA_TYPE_FLOAT16, shape=[1])
    once(server, lambda step: pb.StepResult(step_id=step.step_id, out=bad))
    with pytest.raises(oc.OctavoError, match="makes no sense"):
        session.decode(0, *tensors())
    session.decode(1, *tensors())
    assert server.calls["Decode"] == 1


def test_closing_fails_what_is_in_flight(server: FakeServer, client: oc.Client) -> None:
    session = client.open_session("tiny")
    server.on_step = lambda step: SILENCE
    future: Future[Any] = session.submit(0, *tensors())
    client.close()
    assert isinstance(future.exception(10), oc.ClientClosed)
    with pytest.raises(oc.ClientClosed):
        session.decode(0, *tensors())
    with pytest.raises(oc.ClientClosed):
        client.server_info()
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"octavo-decode", "octavo-deadlines"}


def test_closing_asyncio_fails_what_is_in_flight(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        server.on_step = lambda step: SILENCE
        future = await session.submit(0, *tensors())
        await client.close()
        with pytest.raises(oc.ClientClosed):
            await future
        with pytest.raises(oc.ClientClosed):
            await session.decode(0, *tensors())
        with pytest.raises(oc.ClientClosed):
            await client.server_info()

    run(main, server)


def test_only_a_caller_that_waits_for_a_lone_step_says_so(
    server: FakeServer, session: oc.Session
) -> None:
    session.decode(0, *tensors())  # opens the stream
    session.decode(0, *tensors())
    futures = [session.submit(layer, *tensors()) for layer in range(NUM_LAYERS)]
    for future in futures:
        future.result()
    session.decode(1, *tensors())
    assert [step.waits_for_answer for step in server.steps] == [False, True, False, False, True]


def test_a_caller_reads_its_own_answer(
    server: FakeServer, client: oc.Client, session: oc.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.decode(0, *tensors())
    readers: list[str] = []
    on_result = client._stream._on_result

    def note(result: Any) -> bool:
        readers.append(threading.current_thread().name)
        return on_result(result)

    monkeypatch.setattr(client._stream, "_on_result", note)
    session.decode(0, *tensors())
    session.submit(0, *tensors()).result()
    assert readers == [threading.current_thread().name, "octavo-decode"]


def test_a_lone_step_that_is_not_answered_times_out(
    server: FakeServer, session: oc.Session
) -> None:
    session.decode(0, *tensors())
    server.on_step = lambda step: SILENCE
    with pytest.raises(oc.StepTimeout):
        session.decode(0, *tensors(), timeout=0.1)
    server.on_step = lambda step: None
    session.decode(0, *tensors())
    assert session.lengths == (2, 0)


def test_steps_of_others_are_answered_while_a_caller_reads_its_own(
    server: FakeServer, session: oc.Session
) -> None:
    session.decode(0, *tensors())
    is_there = threading.Event()
    held: list[pb.StepResult] = []

    def act(step: Any) -> pb.StepResult | None:
        if step.layers[0] == 0:
            held.append(server.serve(step))
            is_there.set()
            return SILENCE
        return None

    server.on_step = act
    waiting = threading.Thread(target=lambda: session.decode(0, *tensors()))
    waiting.start()
    assert is_there.wait(10)
    session.submit(1, *tensors()).result(10)
    session.decode(1, *tensors())
    for results in server.streams:
        results.put(held[0])
    waiting.join(10)
    assert not waiting.is_alive()
    assert server.calls["Decode"] == 1


def test_a_client_is_closed_while_a_caller_reads(server: FakeServer, client: oc.Client) -> None:
    session = client.open_session("tiny")
    session.decode(0, *tensors())
    is_there = threading.Event()

    def act(_step: Any) -> pb.StepResult:
        is_there.set()
        return SILENCE

    server.on_step = act
    raised: list[BaseException] = []

    def decode() -> None:
        try:
            session.decode(0, *tensors())
        except oc.ClientClosed as error:
            raised.append(error)

    waiting = threading.Thread(target=decode)
    waiting.start()
    assert is_there.wait(10)
    client.close()
    waiting.join(10)
    assert len(raised) == 1


def test_a_caller_does_not_read_while_another_is_still_in_its_read(
    server: FakeServer, client: oc.Client, session: oc.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.decode(0, *tensors())
    stream = client._stream
    may_leave, is_answered = threading.Event(), threading.Event()
    readers: list[str] = []
    read = stream._read

    def held_read(*args: Any) -> Any:
        readers.append(threading.current_thread().name)
        result = read(*args)
        if threading.current_thread().name == "first":
            is_answered.set()
            assert may_leave.wait(10)
        return result

    monkeypatch.setattr(stream, "_read", held_read)
    first = threading.Thread(target=lambda: session.decode(0, *tensors()), name="first")
    first.start()
    assert is_answered.wait(10)
    second = session.submit(1, *tensors())
    third = threading.Thread(target=lambda: session.decode(1, *tensors()), name="third")
    third.start()
    may_leave.set()
    second.result(10)
    for thread in (first, third):
        thread.join(10)
        assert not thread.is_alive()
    assert "third" not in readers
    assert server.calls["Decode"] == 1


def test_many_threads_decode_over_one_client(server: FakeServer, session: oc.Session) -> None:
    served = [0]

    def decode(layer: int) -> None:
        for _ in range(400):
            session.decode(layer, *tensors(), timeout=20)
            served[0] += 1

    session.decode(0, *tensors())
    threads = [threading.Thread(target=decode, args=(layer,)) for layer in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert served == [800]
    assert server.calls["Decode"] == 1


def test_a_callers_timeout_costs_others_no_attempt(server: FakeServer) -> None:
    with oc.Client(server.target, retry=oc.Retry(max_attempts=1)) as client:
        session = client.open_session("tiny")
        session.decode(0, *tensors())
        is_there = threading.Event()

        def act(_step: Any) -> pb.StepResult:
            is_there.set()
            return SILENCE

        server.on_step = act
        fates: list[type[Exception]] = []

        def decode() -> None:
            try:
                session.decode(0, *tensors(), timeout=0.5)
            except oc.OctavoError as error:
                fates.append(type(error))

        waiting = threading.Thread(target=decode)
        waiting.start()
        assert is_there.wait(10)
        healthy = session.submit(1, *tensors())
        wait_until(lambda: len(server.steps) >= 3)
        server.on_step = lambda step: None
        assert healthy.result(20) is not None
        waiting.join(10)
        assert fates == [oc.StepTimeout]


def test_two_threads_may_close_a_client(server: FakeServer) -> None:
    for _ in range(20):
        client = oc.Client(server.target)
        client.open_session("tiny").decode(0, *tensors())
        raised: list[BaseException] = []
        barrier = threading.Barrier(2)

        def close(client: oc.Client = client, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                client.close()
            except BaseException as error:
                raised.append(error)  # noqa: B023 - joined before the next round

        threads = [threading.Thread(target=close) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert raised == []


def test_a_client_is_closed_by_a_callback(server: FakeServer, client: oc.Client) -> None:
    session = client.open_session("tiny")
    is_closed = threading.Event()

    def close(_: Future[Any]) -> None:
        client.close()
        is_closed.set()

    session.submit(0, *tensors()).add_done_callback(close)
    assert is_closed.wait(10)
