"""What must not hang and not lose anything: faults inside the client, refused streams, closing, and order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import octavo_client as oc
from octavo.v1 import octavo_pb2 as pb
from octavo_client._exchange import Exchange
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

QUICK = oc.Retry(max_attempts=5, initial_backoff_s=0.01, max_backoff_s=0.05)
SILENCE = pb.StepResult()
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
FOREVER = oc.Timeout(connect_s=1e300, call_s=1e300, step_s=1e300, append_s=1e300)


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


def tensors(num_tokens: int = 1, dtype: Any = np.float16) -> tuple[Any, Any, Any]:
    heads = (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (np.ones((num_tokens, num_heads, HEAD_DIM), dtype) for num_heads in heads)
    return q, k, v


def prompt(num_tokens: int) -> Any:
    return np.ones((NUM_LAYERS, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float16)


def run(
    main: Callable[[oc.AsyncClient], Awaitable[None]],
    server: FakeServer,
    timeout: oc.Timeout | None = None,
) -> None:
    async def with_client() -> None:
        async with oc.AsyncClient(server.target, retry=QUICK, timeout=timeout) as client:
            await main(client)

    asyncio.run(with_client())


def fail_once(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Break a method of the exchange for one call."""
    intact = getattr(Exchange, method)

    def fail(*_args: Any) -> Any:
        monkeypatch.setattr(Exchange, method, intact)
        raise RuntimeError("planted fault")

    monkeypatch.setattr(Exchange, method, fail)


def slow(server: FakeServer) -> None:
    """Let every step take 0.1 s."""

    def act(_step: Any) -> None:
        time.sleep(0.1)

    server.on_step = act


@pytest.mark.parametrize("method", ["on_result", "on_open", "expire"])
def test_a_fault_of_the_client_is_said_and_survived(
    session: oc.Session, server: FakeServer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    fail_once(monkeypatch, method)
    if method == "expire":
        server.on_step = lambda step: SILENCE
    future = session.submit(0, *tensors(), timeout=0.5 if method == "expire" else 5.0)
    error = future.exception(10)
    assert type(error) is oc.InterruptedCall
    assert "planted fault" in str(error)
    assert isinstance(error.__cause__, RuntimeError)
    server.on_step = lambda step: None
    session.decode(0, *tensors())
    server.on_step = lambda step: SILENCE
    with pytest.raises(oc.StepTimeout):
        session.decode(0, *tensors(), timeout=0.1)


@pytest.mark.parametrize("method", ["on_result", "on_open", "expire"])
def test_a_fault_of_the_asyncio_client_is_said_and_survived(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        fail_once(monkeypatch, method)
        if method == "expire":
            server.on_step = lambda step: SILENCE
        timeout = 0.5 if method == "expire" else 5.0
        with pytest.raises(oc.InterruptedCall, match="planted fault"):
            await asyncio.wait_for(session.decode(0, *tensors(), timeout=timeout), 10)
        server.on_step = lambda step: None
        await session.decode(0, *tensors())

    run(main, server)


def test_the_longest_timeouts_work(server: FakeServer) -> None:
    with oc.Client(server.target, timeout=FOREVER) as client:
        session = client.open_session("tiny")
        session.append(prompt(3), prompt(3))
        session.decode(0, *tensors())
        server.on_step = lambda step: SILENCE
        session.submit(1, *tensors(), timeout=1e7)
        with pytest.raises(oc.StepTimeout):
            session.decode(0, *tensors(), timeout=0.1)


def test_the_longest_timeouts_work_with_asyncio(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        await session.append(prompt(3), prompt(3))
        await session.decode(0, *tensors())
        server.on_step = lambda step: SILENCE
        long = await session.submit(1, *tensors(), timeout=1e7)
        with pytest.raises(oc.StepTimeout):
            await session.decode(0, *tensors(), timeout=0.1)
        assert not long.done()

    run(main, server, FOREVER)


def test_a_refused_stream_leaves_the_fate_of_its_steps_open(
    server: FakeServer, session: oc.Session
) -> None:
    are_submitted = threading.Event()

    def act(step: Any) -> pb.StepResult:
        assert are_submitted.wait(10)
        server.serve(step)
        server.on_step = lambda step: None
        server.before["Decode"] = refusing(status("DEVICE_FAILURE", "INTERNAL"))
        server.end_streams()
        return SILENCE

    server.on_step = act
    futures = [session.submit(0, *tensors()) for _ in range(2)]
    are_submitted.set()
    applied, held = (future.exception(10) for future in futures)
    assert isinstance(applied, oc.ConnectionLost)
    assert applied.may_be_applied
    assert isinstance(held, oc.DeviceFailure)
    session.decode(0, *tensors())
    assert (server.lengths, session.lengths) == ([2, 0], (2, 0))


def lose_one_answer(server: FakeServer) -> None:
    def act(step: Any) -> pb.StepResult:
        server.on_step = lambda step: None
        server.serve(step)
        return SILENCE

    server.on_step = act


def test_a_message_over_the_limit_fails_alone(server: FakeServer, client: oc.Client) -> None:
    # gRPC's own limit, 4 MiB, is the real one.
    server.max_message_bytes = 1 << 30
    session = client.open_session("tiny")
    lose_one_answer(server)
    small = session.submit(0, *tensors())
    large = session.submit(1, *tensors(20_000, np.float32))
    error = large.exception(10)
    assert isinstance(error, oc.MessageTooLarge)
    assert error.limit_bytes == 4 << 20
    small.result(10)
    assert (server.lengths, session.lengths) == ([1, 0], (1, 0))
    num_asked = server.calls["ServerInfo"]
    session.decode(1, *tensors())
    assert server.calls["ServerInfo"] == num_asked + 1, "a limit that is none was relied on"


def test_a_message_over_the_limit_fails_alone_with_asyncio(server: FakeServer) -> None:
    server.max_message_bytes = 1 << 30

    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        lose_one_answer(server)
        small = await session.submit(0, *tensors())
        large = await session.submit(1, *tensors(20_000, np.float32))
        with pytest.raises(oc.MessageTooLarge):
            await asyncio.wait_for(large, 10)
        await asyncio.wait_for(small, 10)
        assert (server.lengths, session.lengths) == ([1, 0], (1, 0))

    run(main, server)


def test_an_answer_starts_the_attempts_over(server: FakeServer, session: oc.Session) -> None:
    def act(step: Any) -> pb.StepResult:
        result = server.serve(step)
        for results in list(server.streams):
            results.put(result)
        server.end_streams()
        return SILENCE

    server.on_step = act
    futures = [session.submit(0, *tensors()) for _ in range(3 * QUICK.max_attempts)]
    for future in futures:
        future.result(20)


def test_an_answer_starts_the_attempts_over_with_asyncio(server: FakeServer) -> None:
    def act(step: Any) -> pb.StepResult:
        result = server.serve(step)
        for results in list(server.streams):
            results.put(result)
        server.end_streams()
        return SILENCE

    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        server.on_step = act
        futures = [await session.submit(0, *tensors()) for _ in range(3 * QUICK.max_attempts)]
        await asyncio.wait_for(asyncio.gather(*futures), 20)

    run(main, server)


def test_a_proxy_in_the_environment_is_not_asked(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with oc.Client(server.target, retry=oc.Retry(max_attempts=1)) as client:
        assert client.server_info().incarnation == "run1"


def test_a_session_loses_nothing_when_it_is_left(server: FakeServer, client: oc.Client) -> None:
    slow(server)
    with client.open_session("tiny") as session:
        futures = [session.submit(0, *tensors()) for _ in range(3)]
    assert all(future.done() for future in futures)
    assert [future.exception() for future in futures] == [None] * 3
    assert (server.lengths, server.is_open) == ([3, 0], False)


def test_an_asyncio_session_loses_nothing_when_it_is_left(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        slow(server)
        async with await client.open_session("tiny") as session:
            futures = [await session.submit(0, *tensors()) for _ in range(3)]
        assert all(future.done() for future in futures)
        await asyncio.gather(*futures)
        assert (server.lengths, server.is_open) == ([3, 0], False)

    run(main, server)


def test_append_waits_for_steps_in_flight(server: FakeServer, session: oc.Session) -> None:
    slow(server)
    session.submit(0, *tensors(4))
    session.append(prompt(3), prompt(3))
    assert (server.lengths, session.lengths) == ([7, 3], (7, 3))


def test_asyncio_append_and_truncate_wait_for_steps_in_flight(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        slow(server)
        await session.submit(0, *tensors(4))
        await session.append(prompt(3), prompt(3))
        assert (server.lengths, session.lengths) == ([7, 3], (7, 3))
        future = await session.submit(0, *tensors(4))
        await session.truncate(2)
        assert future.done()
        assert (server.lengths, session.lengths) == ([2, 2], (2, 2))

    run(main, server)


def test_a_close_that_failed_is_repeated(server: FakeServer, session: oc.Session) -> None:
    server.before["CloseSession"] = aborting(UNAVAILABLE, times=QUICK.max_attempts)
    with pytest.raises(oc.ConnectionLost):
        session.close()
    with pytest.raises(oc.ClientClosed):
        session.decode(0, *tensors())
    session.close()
    session.close()
    assert (server.is_open, server.calls["CloseSession"]) == (False, QUICK.max_attempts + 1)


def test_a_close_that_may_have_worked_counts_when_repeated_by_hand(
    server: FakeServer, session: oc.Session
) -> None:
    server.after["CloseSession"] = aborting(UNAVAILABLE)
    server.before["CloseSession"] = lambda context: (
        None if server.is_open else context.abort(UNAVAILABLE, "planted break")
    )
    with pytest.raises(oc.ConnectionLost):
        session.close()
    server.before.clear()
    session.close()


def test_an_asyncio_close_that_failed_is_repeated(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        server.before["CloseSession"] = aborting(UNAVAILABLE, times=QUICK.max_attempts)
        with pytest.raises(oc.ConnectionLost):
            await session.close()
        with pytest.raises(oc.ClientClosed):
            await session.decode(0, *tensors())
        await asyncio.gather(session.close(), session.close())
        assert (server.is_open, server.calls["CloseSession"]) == (False, QUICK.max_attempts + 1)

    run(main, server)


def test_a_truncate_without_an_answer_is_asked_about(
    server: FakeServer, session: oc.Session
) -> None:
    session.append(prompt(4), prompt(4))
    server.after["TruncateSession"] = aborting(UNAVAILABLE, times=QUICK.max_attempts)
    with pytest.raises(oc.ConnectionLost):
        session.truncate(1)
    session.decode(0, *tensors())
    assert (server.lengths, session.lengths) == ([2, 1], (2, 1))


def test_an_asyncio_truncate_without_an_answer_is_asked_about(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        await session.append(prompt(4), prompt(4))
        server.after["TruncateSession"] = aborting(UNAVAILABLE, times=QUICK.max_attempts)
        with pytest.raises(oc.ConnectionLost):
            await session.truncate(1)
        await session.decode(0, *tensors())
        assert (server.lengths, session.lengths) == ([2, 1], (2, 1))

    run(main, server)


def test_asyncio_steps_keep_their_order_when_the_lengths_are_asked_for(server: FakeServer) -> None:
    asked: list[None] = []

    def delay_the_first(_context: grpc.ServicerContext) -> None:
        asked.append(None)
        time.sleep(0.2 if len(asked) == 1 else 0)

    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        session._mirror.is_stale = True
        client._info = None
        server.before["GetSession"] = delay_the_first
        num_tokens = (1, 2, 3)
        await asyncio.gather(*(session.decode(0, *tensors(n)) for n in num_tokens))
        order = [(step.start_pos[0], step.num_tokens[0]) for step in server.steps]
        assert order == [(0, 1), (1, 2), (3, 3)]
        assert len(asked) == 1

    run(main, server)


def test_asyncio_steps_expire_one_after_the_other(server: FakeServer) -> None:
    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        server.on_step = lambda step: SILENCE
        futures = [await session.submit(0, *tensors(), timeout=s) for s in (0.1, 0.3)]
        fates = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)
        assert [type(fate) for fate in fates] == [oc.StepTimeout] * 2

    run(main, server)


def test_a_step_and_a_batch_have_answers_of_their_own(
    server: FakeServer, session: oc.Session
) -> None:
    assert isinstance(session.decode(0, *tensors()), oc.DecodeResult)
    batch = session._client.decode_batch([oc.Entry(session, 0)], *tensors())
    assert isinstance(batch, oc.BatchResult)

    async def main(client: oc.AsyncClient) -> None:
        other = await client.open_session("tiny")
        other._mirror.refresh(server.lengths)
        assert isinstance(await other.decode(0, *tensors()), oc.DecodeResult)
        batch = await client.decode_batch([oc.Entry(other, 0)], *tensors())
        assert isinstance(batch, oc.BatchResult)

    run(main, server)


def test_sessions_are_asked_for_by_a_name_of_their_own(
    server: FakeServer, client: oc.Client
) -> None:
    server.after["OpenSession"] = aborting(UNAVAILABLE)
    client.open_session("tiny")
    client.open_session("tiny")
    first, again, second = (request.request_id for request in server.opens)
    assert first == again != second
    assert len(first) == len(second) == 32


def test_positions_that_no_cache_has_are_not_sent(server: FakeServer, session: oc.Session) -> None:
    with pytest.raises(ValueError, match="start_pos must be at most"):
        session.append(prompt(10), prompt(10), start_pos=2**32 - 5)
    with pytest.raises(ValueError, match="start_pos must be at most"):
        session.decode(0, *tensors(), start_pos=2**32)
    with pytest.raises(ValueError, match="length must be at most"):
        session.truncate(2**33)
    with pytest.raises(TypeError):
        session.append(prompt(1), prompt(1), start_pos=0.5)  # type: ignore[arg-type]
    assert not server.calls.keys() & {"Append", "Decode", "TruncateSession"}
    assert not session._mirror.is_stale


def test_a_message_that_cannot_be_encoded_is_no_broken_connection(
    server: FakeServer, session: oc.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> bytes:
        raise KeyError("planted fault")

    monkeypatch.setattr("octavo_client._append.encode_append", fail)
    with pytest.raises(KeyError, match="planted fault"):
        session.append(prompt(1), prompt(1))
    assert server.calls["Append"] <= 1
