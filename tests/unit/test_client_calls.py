"""Unary calls and appends of both clients against a server that breaks and refuses as planned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import octavo_client as oc
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


def prompt(num_tokens: int) -> Any:
    return np.ones((NUM_LAYERS, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float16)


def run(main: Callable[[oc.AsyncClient], Awaitable[None]], server: FakeServer) -> None:
    async def with_client() -> None:
        async with oc.AsyncClient(server.target, retry=QUICK) as client:
            await main(client)

    asyncio.run(with_client())


def test_nobody_there_is_said(server: FakeServer) -> None:
    target = server.target
    server.stop()
    with oc.Client(target, retry=QUICK) as client, pytest.raises(oc.ConnectionLost) as raised:
        client.server_info()
    assert not raised.value.may_be_applied


def test_a_close_that_may_have_worked_counts(server: FakeServer, session: oc.Session) -> None:
    server.after["CloseSession"] = aborting(UNAVAILABLE)
    session.close()
    session.close()
    assert server.calls["CloseSession"] == 2
    with pytest.raises(oc.ClientClosed):
        session.decode(0, *tensors())


def test_closing_what_another_closed_is_said(server: FakeServer, session: oc.Session) -> None:
    server.is_open = False
    with pytest.raises(oc.SessionNotFound):
        session.close()


def test_an_error_inside_outlives_that_of_the_close(server: FakeServer, client: oc.Client) -> None:
    def fail_inside() -> None:
        with client.open_session("tiny"):
            server.is_open = False
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()


@pytest.mark.parametrize(("guard", "num_calls"), [(False, 2), (True, 1)])
def test_only_an_unguarded_truncate_is_repeated(
    server: FakeServer, session: oc.Session, guard: bool, num_calls: int
) -> None:
    session.append(prompt(5), prompt(5))
    server.after["TruncateSession"] = aborting(UNAVAILABLE)
    if guard:
        with pytest.raises(oc.ConnectionLost):
            session.truncate(3, guard=True)
    else:
        session.truncate(3)
        assert session.lengths == (3, 3)
    assert server.calls["TruncateSession"] == num_calls


def test_truncate_waits_for_steps_in_flight(server: FakeServer, session: oc.Session) -> None:
    def act(_step: Any) -> None:
        time.sleep(0.1)

    server.on_step = act
    future = session.submit(0, *tensors(4))
    session.truncate(2)
    assert future.done()
    assert (server.lengths, session.lengths) == ([2, 0], (2, 0))


@pytest.mark.parametrize("break_at", [1, 4, 7])
def test_an_append_goes_on_where_it_broke(
    server: FakeServer, client: oc.Client, break_at: int
) -> None:
    server.max_message_bytes = 256 + 4 * 64  # 4 tokens
    session = client.open_session("tiny")
    server.on_step = lambda message: True if len(server.appends) == break_at else None  # type: ignore[assignment,return-value]
    reported: list[tuple[int, int]] = []
    session.append(prompt(15), prompt(15), progress=lambda *stored: reported.append(stored))
    assert (server.lengths, session.lengths) == ([15, 15], (15, 15))
    assert server.calls["Append"] == 2
    keys = [message.step_key for message in server.appends]
    assert keys[break_at] == keys[break_at - 1], "the last stored message was not proved"
    assert len(set(keys)) == 8
    assert reported[-1] == (30, 30)


def test_an_asyncio_append_goes_on_where_it_broke(server: FakeServer) -> None:
    server.max_message_bytes = 256 + 4 * 64

    async def main(client: oc.AsyncClient) -> None:
        session = await client.open_session("tiny")
        server.on_step = lambda message: True if len(server.appends) == 3 else None  # type: ignore[assignment,return-value]
        await session.append(prompt(15), prompt(15))
        assert (server.lengths, session.lengths) == ([15, 15], (15, 15))

    run(main, server)
    assert server.calls["Append"] == 2


def test_an_append_that_cannot_go_on_is_asked_about(
    server: FakeServer, session: oc.Session
) -> None:
    server.before["Append"] = refusing(status("OUT_OF_BLOCKS", "RESOURCE_EXHAUSTED"))
    with pytest.raises(oc.OutOfBlocks):
        session.append(prompt(5), prompt(5))
    session.append(prompt(5), prompt(5))
    assert (server.calls["GetSession"], session.lengths) == (1, (5, 5))


def test_reads_are_repeated(server: FakeServer, client: oc.Client) -> None:
    server.before["ServerInfo"] = aborting(UNAVAILABLE, times=3)
    assert client.server_info().incarnation == "run1"
    assert server.calls["ServerInfo"] == 4


def test_a_session_is_its_clients(server: FakeServer, session: oc.Session) -> None:
    q, k, v = tensors()
    with (
        oc.Client(server.target, retry=QUICK) as other,
        pytest.raises(ValueError, match="another client's"),
    ):
        other.decode_batch([oc.Entry(session, 0)], q, k, v)
