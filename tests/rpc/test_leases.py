"""Leases, keep-alive, reservations and the policy on disconnect, over the wire and through both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import octavo_client as oc
from octavo import v1
from octavo_server.errors import Reason
from tests.rpc.checked_session import Checked, draw_step
from tests.rpc.conftest import NUM_BLOCKS, serving
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Wire, refusal_of_call
from tests.waiting import wait_until

SHORT_S = 0.2


@pytest.fixture
def client(wire: Wire) -> Iterator[oc.Client]:
    with oc.Client(wire.address) as client:
        yield client


def used_at(wire: Wire) -> float:
    """Return when the only open session was last used."""
    (session,) = wire.server._engine.sessions._store.sessions
    return session.used_at


def test_a_lease_is_asked_for_shortened_and_told(wire: Wire, client: oc.Client) -> None:
    info = client.server_info()
    assert (info.default_lease_s, info.max_lease_s) == (900.0, 86_400.0)
    for lease_s, granted_s in ((None, 900.0), (5.0, 5.0), (1e9, 86_400.0)):
        with client.open_session(MODEL, lease_s=lease_s) as session:
            state = client.get_session(session.session_id)
            assert state.lease_s == granted_s
            assert granted_s - 5 < state.lease_remaining_s <= granted_s
            assert (state.on_disconnect, state.reserved_tokens) == ("keep", 0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lease_s": 0}, "lease_s must be positive"),
        ({"lease_s": float("inf")}, "lease_s must be positive and finite"),
        ({"on_disconnect": "stay"}, "on_disconnect must be 'keep' or 'close', got 'stay'"),
        ({"reserve_tokens": -1}, "reserve_tokens must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_not_sent(client: oc.Client, options: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        client.open_session(MODEL, **options)


def test_an_unknown_policy_is_malformed(wire: Wire) -> None:
    request = v1.OpenSessionRequest(model=MODEL, disconnect_policy=7)  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as refused:
        wire.stub.OpenSession(request, timeout=CALL_TIMEOUT_S)
    assert refusal_of_call(refused.value).reason == Reason.MALFORMED_MESSAGE


def test_a_session_left_alone_ends_and_every_call_says_so(wire: Wire, client: oc.Client) -> None:
    session = client.open_session(MODEL, lease_s=SHORT_S)
    wait_until(lambda: not wire.sessions())
    for call in (
        lambda: session.decode(0, *draw_step()),
        lambda: session.append(*np.ones((2, 2, 3, 2, 16), np.float16)),
        lambda: session.truncate(0),
        session.refresh,
        session.close,
    ):
        with pytest.raises(oc.SessionExpired) as ended:
            call()
        assert ended.value.lease_ms == round(SHORT_S * 1000)
    (error,) = client.keep_alive([session]).values()
    assert isinstance(error, oc.SessionExpired)


def test_use_and_keep_alive_renew(wire: Wire, client: oc.Client) -> None:
    with client.open_session(MODEL, lease_s=60) as session:
        for renew in (
            lambda: session.decode(0, *draw_step()),
            lambda: session.append(*np.ones((2, 2, 3, 2, 16), np.float16), start_pos=None),
            lambda: session.truncate(0),
            lambda: client.keep_alive([session]),
        ):
            before = used_at(wire)
            client.get_session(session.session_id)
            client.list_sessions()
            assert used_at(wire) == before
            renew()
            assert used_at(wire) > before


def test_a_reservation_holds_its_blocks_and_is_never_refused(wire: Wire, client: oc.Client) -> None:
    with client.open_session(MODEL, reserve_tokens=160) as session:
        assert wire.num_free_blocks() == NUM_BLOCKS - 10
        with client.open_session(MODEL) as other:
            other.append(*np.ones((2, 2, 32, 2, 16), np.float16))
            with pytest.raises(oc.OutOfBlocks):
                other.decode(0, *draw_step())
            session.append(*np.ones((2, 2, 159, 2, 16), np.float16))
            session.decode(0, *draw_step())
        state = client.get_session(session.session_id)
        assert (state.num_blocks, state.reserved_tokens) == (10, 160)
        session.truncate(0)
        assert wire.num_free_blocks() == NUM_BLOCKS - 10
    assert wire.num_free_blocks() == NUM_BLOCKS
    with pytest.raises(oc.ContextTooLong):
        client.open_session(MODEL, reserve_tokens=161)
    with client.open_session(MODEL, reserve_tokens=160), pytest.raises(oc.OutOfBlocks):
        client.open_session(MODEL, reserve_tokens=33)


def test_a_session_may_end_with_its_connection(wire: Wire) -> None:
    with oc.Client(wire.address) as client:
        closing = client.open_session(MODEL, on_disconnect="close")
        keeping = client.open_session(MODEL)
        for session in (closing, keeping):
            session.decode(0, *draw_step())
        assert client.get_session(closing.session_id).on_disconnect == "close"
    wait_until(lambda: [s.session_id for s in wire.sessions()] == [keeping.session_id])


def test_tenants_limits_are_said(wire: Wire) -> None:
    limits = {"tenant_max_sessions": 2, "tenant_max_tokens": 32}
    with serving(**limits) as limited, oc.Client(limited.address) as client:
        session = client.open_session(MODEL)
        session.append(*np.ones((2, 2, 32, 2, 16), np.float16))
        with pytest.raises(oc.TenantLimit, match="32 tokens in blocks") as refused:
            session.decode(0, *draw_step())
        assert refused.value.limit == 32
        client.open_session(MODEL)
        with pytest.raises(oc.TenantLimit, match="2 open sessions"):
            client.open_session(MODEL)
        stats = limited.server._service.stats().engine.tenants
        assert [tenant[1:3] for tenant in stats] == [(2, 32)]


def test_as_many_as_may_be_are_renewed_at_once(wire: Wire) -> None:
    too_many = v1.KeepAliveRequest(session_ids=["s"] * 4097)
    with pytest.raises(grpc.RpcError) as refused:
        wire.stub.KeepAlive(too_many, timeout=CALL_TIMEOUT_S)
    assert refusal_of_call(refused.value).reason == Reason.MALFORMED_MESSAGE


def test_the_asyncio_client_does_the_same(wire: Wire) -> None:
    async def run() -> None:
        async with oc.AsyncClient(wire.address) as client:
            session = await client.open_session(MODEL, lease_s=60, reserve_tokens=16)
            checked, tensors = Checked(session), draw_step()
            checked.check(0, tensors, await session.decode(0, *tensors))
            assert await client.keep_alive([session]) == {}
            state = await client.get_session(session.session_id)
            assert (state.lease_s, state.reserved_tokens) == (60, 16)
            await session.close()
            (error,) = (await client.keep_alive([session])).values()
            assert isinstance(error, oc.SessionNotFound)

    asyncio.run(run())
