"""Tokens and tenants on real connections: who gets in, whose sessions are whose, and tokens that go."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import octavo_client as oc
from octavo import v1
from octavo_server import auth, grpc_server
from octavo_server.grpc_server import MAX_METADATA_BYTES
from octavo_server.tokens import MAX_TOKEN_LEN, MIN_TOKEN_LEN, draw_token, read_authorization
from tests.rpc.checked_session import Checked, draw_prompt, draw_step
from tests.rpc.conftest import serving
from tests.rpc.tenants import TenantsFile, authorization, look_often
from tests.rpc.wire import (
    CALL_TIMEOUT_S,
    MODEL,
    NUM_KV_HEADS,
    Caching,
    Refusal,
    Stream,
    Wire,
    refusal_of,
    refusal_of_call,
    tensor,
)
from tests.waiting import wait_until

ONCE = oc.Retry(max_attempts=1)
CALLS = [method.name for method in v1.DESCRIPTOR.services_by_name["OctavoService"].methods]


@pytest.fixture
def tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TenantsFile:
    look_often(monkeypatch)
    return TenantsFile(tmp_path / "tenants.yaml")


@pytest.fixture
def acme(tenants: TenantsFile) -> str:
    """The token of a tenant."""
    return tenants.add("acme")


@pytest.fixture
def beta(tenants: TenantsFile) -> str:
    """The token of another one."""
    return tenants.add("beta")


@pytest.fixture
def guarded(tenants: TenantsFile, acme: str, beta: str) -> Iterator[Wire]:
    assert acme != beta
    with serving(**tenants.settings, max_streams=2) as wire:
        yield wire


def refusal(call: Any) -> Refusal:
    """Take what refused a call apart."""
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refusal_of_call(refused.value)


def is_known(wire: Wire, token: str) -> bool:
    """Whether the server knows a token."""
    with oc.Client(wire.address, retry=ONCE, token=token) as client:
        try:
            client.server_info()
        except oc.Unauthenticated:
            return False
        return True


def num_refusals(wire: Wire, reason: str = "UNAUTHENTICATED") -> int:
    """Return how often the server says that it refused for a reason."""
    return wire.server._service.stats().refusals.get(reason, 0)


# ---- Who gets in ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [*CALLS, "NoSuchCall"])
def test_a_call_without_a_token_is_refused_before_it_is_read(guarded: Wire, call: str) -> None:
    is_over = threading.Event()

    def never() -> Iterator[bytes]:
        is_over.wait()
        yield b""

    before = num_refusals(guarded)
    try:
        ended = guarded.raw("stream_stream", call)(never(), timeout=CALL_TIMEOUT_S)
        assert refusal(lambda: next(ended)).reason == "UNAUTHENTICATED"
    finally:
        is_over.set()
    assert num_refusals(guarded) == before + 1


def test_reflection_wants_a_token_and_health_does_not(guarded: Wire, acme: str) -> None:
    assert guarded.health("ready") == "SERVING"
    watch = health_pb2_grpc.HealthStub(guarded.channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    def names(metadata: Any) -> list[str]:
        answers = stub.ServerReflectionInfo(
            iter([request]), timeout=CALL_TIMEOUT_S, metadata=metadata
        )
        return [service.name for service in next(answers).list_services_response.service]

    assert refusal(lambda: names(None)).reason == "UNAUTHENTICATED"
    assert "octavo.v1.OctavoService" in names(authorization(acme))


def test_calls_of_nobody_take_no_place(guarded: Wire, acme: str) -> None:
    metadata = authorization(acme)
    held = [guarded.stub.Decode(iter(threading.Event().wait, None), metadata=metadata)]
    held += [guarded.stub.Decode(iter(threading.Event().wait, None), metadata=metadata)]
    wait_until(lambda: guarded.server._service.streams.num_open == 2)
    assert refusal(lambda: next(guarded.stub.Decode(iter([])))).reason == "UNAUTHENTICATED"
    full = guarded.stub.Decode(iter([]), metadata=metadata)
    assert refusal(lambda: next(full)).reason == "STREAM_LIMIT"
    for call in held:
        call.cancel()


@pytest.mark.parametrize(
    "values",
    [
        [f"Bearer {draw_token()}"],
        ["Bearer"],
        ["Bearer  "],
        [draw_token()],
        ["Basic dXNlcjpwYXNzd29yZA=="],
        [f"Bearer {'x' * (MIN_TOKEN_LEN - 1)}"],
        [f"Bearer {'x' * (MAX_TOKEN_LEN + 1)}"],
        [f"Bearer {draw_token()}", f"Bearer {draw_token()}"],
    ],
)
def test_what_is_no_token_of_a_tenant_is_refused_and_not_quoted(
    guarded: Wire, values: list[str]
) -> None:
    metadata = [("authorization", value) for value in values]
    refused = refusal(
        lambda: guarded.stub.ServerInfo(
            v1.ServerInfoRequest(), timeout=CALL_TIMEOUT_S, metadata=metadata
        )
    )
    assert (refused.reason, refused.metadata, refused.has_retry) == ("UNAUTHENTICATED", {}, False)
    assert not any(value.split()[-1] in refused.message for value in values if len(value) > 10)


def test_the_right_token_twice_is_refused(guarded: Wire, acme: str) -> None:
    metadata = authorization(acme) * 2
    request = v1.ServerInfoRequest()
    call = lambda: guarded.stub.ServerInfo(request, timeout=CALL_TIMEOUT_S, metadata=metadata)  # noqa: E731
    assert "more than one authorization" in refusal(call).message


def test_metadata_over_the_limit_is_always_refused(guarded: Wire, acme: str) -> None:
    def call(num_bytes: int) -> None:
        metadata = (*authorization(acme), ("x", "y" * num_bytes))
        request = v1.ServerInfoRequest()
        guarded.stub.ServerInfo(request, timeout=CALL_TIMEOUT_S, metadata=metadata)

    call(MAX_METADATA_BYTES * 3 // 4)
    # By default gRPC refuses some of the first and all of the last.
    for num_bytes in (*([MAX_METADATA_BYTES + 100] * 5), 3 * MAX_METADATA_BYTES):
        with pytest.raises(grpc.RpcError) as refused:
            call(num_bytes)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert is_known(guarded, acme)


def test_a_connection_that_says_nothing_is_closed(
    tenants: TenantsFile, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert acme
    monkeypatch.setattr(grpc_server, "HANDSHAKE_TIMEOUT_MS", 300)
    with serving(**tenants.settings) as wire:
        # Well before it would be found out to answer no ping.
        with socket.create_connection(("127.0.0.1", wire.server.port), 15) as silent:
            while silent.recv(4096):
                pass
        assert is_known(wire, acme)


def test_bytes_that_are_no_text_are_refused() -> None:
    for value in (b"Bearer \xff\xfe" + b"x" * 40, "Bearer " + "\udcff" * 40):
        with pytest.raises(ValueError, match="not `Bearer TOKEN`"):
            read_authorization(auth._authorization([("authorization", value)]))


def test_a_server_without_a_file_needs_no_token_and_minds_none() -> None:
    with serving() as wire, oc.Client(wire.address, token=draw_token()) as client:
        client.server_info()
        assert wire.health("ready") == "SERVING"
        wire.close(wire.open())


# ---- Whose sessions are whose -----------------------------------------------------------------


def test_everything_works_with_a_token(guarded: Wire, acme: str) -> None:
    with (
        oc.Client(guarded.address, retry=ONCE, token=acme) as client,
        client.open_session(MODEL) as session,
    ):
        checked = Checked(session)
        session.append(*(prompt := draw_prompt(5)))
        checked.take_prompt(prompt)
        for _ in range(3):
            checked.check(0, step := draw_step(), session.decode(0, *step))
        session.truncate(2)
        assert session.refresh().lengths == (2, 2)
        assert [state.session_id for state in client.list_sessions()] == [session.session_id]


def test_everything_works_with_a_token_in_asyncio(guarded: Wire, acme: str) -> None:
    async def decode() -> None:
        async with (
            oc.AsyncClient(guarded.address, retry=ONCE, token=lambda: acme) as client,
            await client.open_session(MODEL) as session,
        ):
            checked = Checked(session)
            await session.append(*(prompt := draw_prompt(5)))
            checked.take_prompt(prompt)
            for _ in range(3):
                checked.check(0, step := draw_step(), await session.decode(0, *step))

    asyncio.run(decode())


def request_of(wire: Wire, call: str, caching: Caching) -> Any:
    """Return a request of a call that names a session."""
    step = wire.step((caching, 0, 1))
    kv = tensor(wire.draw(1, NUM_KV_HEADS))
    session_id = caching.session_id
    requests: dict[str, Any] = {
        "GetSession": v1.GetSessionRequest(session_id=session_id),
        "TruncateSession": v1.TruncateSessionRequest(session_id=session_id),
        "CloseSession": v1.CloseSessionRequest(session_id=session_id),
        "KeepAlive": v1.KeepAliveRequest(session_ids=[session_id]),
        "DecodeOnce": v1.DecodeOnceRequest(step=step),
        "Decode": v1.DecodeRequest(step=step),
        "Append": v1.AppendRequest(
            session_handle=caching.handle, num_tokens=1, step_key=1, k=kv, v=kv
        ),
        "ExportSession": v1.ExportSessionRequest(session_id=session_id),
    }
    return requests[call]


NAMING_CALLS = (
    *("GetSession", "TruncateSession", "CloseSession", "KeepAlive"),
    *("DecodeOnce", "Decode", "Append", "ExportSession"),
)
NAMELESS_CALLS = ("ServerInfo", "ServerStats", "OpenSession", "ListSessions", "ImportSession")


def outcome(wire: Wire, call: str, caching: Caching, token: str) -> Refusal:
    """Make a call that names a session; return what refused it, in the status or inside the answer."""
    request = request_of(wire, call, caching).SerializeToString()
    rpc = wire.raw("stream_stream", call)
    ended = rpc(iter([request]), timeout=CALL_TIMEOUT_S, metadata=authorization(token))
    try:
        answer = getattr(v1, f"{call}Response").FromString(next(ended))
    except grpc.RpcError as error:
        return refusal_of_call(error)
    if call == "KeepAlive":
        return refusal_of(answer.leases[0].error)
    return refusal_of(answer.result.entry_errors[0].error)


def test_every_call_names_a_session_or_none() -> None:
    assert {*NAMING_CALLS, *NAMELESS_CALLS} == set(CALLS)


@pytest.mark.parametrize("call", NAMING_CALLS)
def test_another_tenant_s_session_is_refused_like_one_that_never_was(
    guarded: Wire, acme: str, beta: str, call: str
) -> None:
    with oc.Client(guarded.address, retry=ONCE, token=acme) as client:
        session = client.open_session(MODEL)
        session.append(*draw_prompt(3))
        theirs = Caching(session.session_id, session.handle)
        never = Caching(session.session_id[:-8] + "0" * 8, session.handle ^ 1)
        refused, unknown = (outcome(guarded, call, x, beta) for x in (theirs, never))
        assert refused.reason == "SESSION_NOT_FOUND"
        assert set(refused.metadata) == set(unknown.metadata) == {"session_id"}
        name = refused.metadata["session_id"]
        assert name in (theirs.session_id, str(theirs.handle))
        assert refused.message.replace(name, "?") == unknown.message.replace(
            unknown.metadata["session_id"], "?"
        )
        assert (refused.code, refused.has_retry) == (unknown.code, unknown.has_retry)
        assert session.refresh().lengths == (3, 3)
        session.close()


def test_lists_hold_the_tenant_s_own_sessions_and_request_ids_are_its_own(
    guarded: Wire, acme: str, beta: str
) -> None:
    opened: dict[str, set[str]] = {}
    for token in (acme, beta):
        request = v1.OpenSessionRequest(model=MODEL, request_id="the same")
        metadata = authorization(token)
        for _ in range(2):
            answer = guarded.stub.OpenSession(request, timeout=CALL_TIMEOUT_S, metadata=metadata)
            opened.setdefault(token, set()).add(answer.session.session_id)
    for token, session_ids in opened.items():
        with oc.Client(guarded.address, retry=ONCE, token=token) as client:
            assert {state.session_id for state in client.list_sessions()} == session_ids
            assert len(session_ids) == 1
    assert opened[acme] != opened[beta]


def test_limits_come_from_the_file_and_change_with_it(tenants: TenantsFile) -> None:
    token = tenants.add("small", max_sessions=1)
    with (
        serving(**tenants.settings) as wire,
        oc.Client(wire.address, retry=ONCE, token=token) as client,
    ):
        client.open_session(MODEL)
        with pytest.raises(oc.TenantLimit) as refused:
            client.open_session(MODEL)
        assert refused.value.limit == 1
        tenants.add("small", max_sessions=2)
        wait_until(lambda: wire.server._auth._tenants.get("small").limits.max_sessions == 2)
        client.open_session(MODEL)


# ---- Tokens that come and go ------------------------------------------------------------------


def test_a_token_is_taken_up_and_given_up_without_a_restart(
    guarded: Wire, tenants: TenantsFile, acme: str
) -> None:
    added = tenants.add("gamma")
    wait_until(lambda: is_known(guarded, added))
    tenants.remove(added)
    wait_until(lambda: not is_known(guarded, added))
    assert is_known(guarded, acme)


@pytest.mark.parametrize("waits", [True, False], ids=["idle", "sending on"])
def test_a_removed_token_ends_its_decode_streams_alone(
    guarded: Wire, tenants: TenantsFile, acme: str, waits: bool
) -> None:
    staying = tenants.add("acme")
    wait_until(lambda: is_known(guarded, staying))
    with oc.Client(guarded.address, retry=ONCE, token=staying) as client:
        session = client.open_session(MODEL)
        session.decode(0, *draw_step())
        leaving = Stream(guarded.stub, metadata=authorization(acme))
        step = guarded.step((Caching(session.session_id, session.handle), 0, 1), k=None, v=None)
        leaving.send(step)
        leaving.receive()
        for _ in range(0 if waits else 100):  # more than are ever worked on at a time
            leaving.send(step)
        tenants.remove(acme)

        def go_on() -> None:
            while True:
                leaving.receive()
                leaving.send(step)

        refused = refusal(go_on)
        assert (refused.reason, refused.metadata) == ("UNAUTHENTICATED", {})
        assert "the token was removed" in refused.message
        leaving.end()
        session.decode(0, *draw_step())
        wait_until(lambda: guarded.num_free_streams == 1)


def test_a_stream_that_ends_answers_what_it_took_and_takes_no_more(
    guarded: Wire, tenants: TenantsFile, acme: str
) -> None:
    with oc.Client(guarded.address, retry=ONCE, token=tenants.add("acme")) as client:
        wait_until(lambda: is_known(guarded, client._metadata()[1][1].split()[1]))
        session = client.open_session(MODEL)
        caching = Caching(session.session_id, session.handle)
        leaving = Stream(guarded.stub, metadata=authorization(acme))
        guarded.backend.shut()
        leaving.send(taken := guarded.step((caching, 0, 1)))
        assert guarded.backend.is_running.wait(CALL_TIMEOUT_S)
        (stream,) = guarded.server._service._step_streams
        tenants.remove(acme)
        wait_until(lambda: stream._end)
        num_bytes = stream._traffic.received_bytes
        leaving.send(guarded.step((caching, 1, 1)))
        wait_until(lambda: stream._traffic.received_bytes > num_bytes)
        guarded.backend.open()
        guarded.check(taken, leaving.receive(), [(caching, 0)])
        assert refusal(leaving.receive).reason == "UNAUTHENTICATED"
        assert session.refresh().lengths == (1, 0)


def test_a_removed_token_ends_an_append_at_its_next_message(
    guarded: Wire, tenants: TenantsFile, acme: str
) -> None:
    with oc.Client(guarded.address, retry=ONCE, token=acme) as client:
        session = client.open_session(MODEL)
    caching = Caching(session.session_id, session.handle)
    has_gone = threading.Event()

    def messages() -> Iterator[v1.AppendRequest]:
        yield request_of(guarded, "Append", caching)
        wait_until(has_gone.is_set)
        request = request_of(guarded, "Append", caching)
        request.start_pos = 1
        yield request

    ended = guarded.stub.Append.future(messages(), metadata=authorization(acme))
    wait_until(lambda: len(guarded.server._auth._streams) == 1)
    tenants.remove(acme)
    wait_until(lambda: not is_known(guarded, acme))
    wait_until(lambda: all(stream.num_looks for stream in guarded.server._auth._streams))
    has_gone.set()
    assert refusal(ended.result).reason == "UNAUTHENTICATED"


def test_a_stream_that_cannot_be_told_is_cut_off(
    guarded: Wire, tenants: TenantsFile, acme: str
) -> None:
    is_over = threading.Event()
    idle = guarded.stub.Append.future(iter(is_over.wait, True), metadata=authorization(acme))
    wait_until(lambda: guarded.num_free_streams == 1)
    tenants.remove(acme)
    with pytest.raises(grpc.RpcError):
        idle.result(timeout=CALL_TIMEOUT_S)
    assert idle.code() is grpc.StatusCode.CANCELLED
    is_over.set()
    wait_until(lambda: guarded.num_free_streams == 2)


def test_a_removed_token_cuts_off_an_import(guarded: Wire, tenants: TenantsFile, acme: str) -> None:
    is_over = threading.Event()
    rpc = guarded.raw("stream_unary", "ImportSession")
    idle = rpc.future(iter(is_over.wait, True), metadata=authorization(acme))
    wait_until(lambda: guarded.num_free_streams == 1)
    tenants.remove(acme)
    with pytest.raises(grpc.RpcError):
        idle.result(timeout=CALL_TIMEOUT_S)
    assert idle.code() is grpc.StatusCode.CANCELLED
    is_over.set()
    wait_until(lambda: guarded.num_free_streams == 2)


BROKEN = {
    "not YAML": "tenants: [",
    "a token instead of its hash": "tenants: [{name: acme, token_sha256: [octavo_abcdef]}]",
    "empty": "",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_file_with_mistakes_changes_nothing_and_is_logged_once(
    guarded: Wire,
    tenants: TenantsFile,
    acme: str,
    text: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def complaints() -> list[str]:
        records = [r for r in caplog.records if r.name == "octavo_server.auth"]
        return [r.getMessage() for r in records if r.levelno == logging.ERROR]

    looks = threading.Semaphore(0)
    look = auth.Auth.look

    def counted(self: auth.Auth) -> None:
        look(self)
        looks.release()

    monkeypatch.setattr(auth.Auth, "look", counted)
    with oc.Client(guarded.address, retry=ONCE, token=acme) as client, caplog.at_level("INFO"):
        session = client.open_session(MODEL)
        session.decode(0, *draw_step())
        tenants.path.write_text(text)
        wait_until(complaints)
        for _ in range(5):
            assert looks.acquire(timeout=CALL_TIMEOUT_S)
        (complaint,) = complaints()
        assert f"{tenants.path}:1: " in complaint
        assert "octavo_abcdef" not in caplog.text
        session.decode(0, *draw_step())
        tenants.path.unlink()
        wait_until(lambda: len(complaints()) == 2)
        session.decode(0, *draw_step())
        added = tenants.add("gamma")
        wait_until(lambda: is_known(guarded, added))
        session.decode(0, *draw_step())
        session.close()


def test_half_a_file_is_not_taken_up(tenants: TenantsFile, acme: str, beta: str) -> None:
    assert acme != beta
    with serving(**tenants.settings) as wire:
        own = wire.server._auth
        own.stop()  # the test looks for itself
        whole = tenants.path.read_text()
        half, _, _ = whole.partition("  - name: beta")
        tenants.path.write_text(half)
        own.look()
        tenants.path.write_text(whole)
        own.look()
        own.look()
        assert is_known(wire, beta)
        tenants.path.write_text(half)
        own.look()
        assert is_known(wire, beta)
        own.look()
        assert not is_known(wire, beta)


# ---- The client -------------------------------------------------------------------------------


def test_a_refused_token_is_not_tried_again(guarded: Wire, acme: str) -> None:
    before = num_refusals(guarded)
    token = acme
    with oc.Client(guarded.address, token=lambda: token) as client:
        session = client.open_session(MODEL)
        token = draw_token()
        with pytest.raises(oc.Unauthenticated):
            client.server_info()
        with pytest.raises(oc.ConnectionLost) as lost:
            session.decode(0, *draw_step())
        assert isinstance(lost.value.__cause__, oc.Unauthenticated)
        with pytest.raises(oc.Unauthenticated):
            session.append(*draw_prompt(3))
        assert num_refusals(guarded) == before + 3
        token = acme
        session.decode(0, *draw_step(), start_pos=0)
        session.close()


def test_every_call_carries_token_and_route(
    guarded: Wire, acme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    check = auth.Auth.check

    def spy(self: auth.Auth, metadata: auth.Metadata) -> None:
        seen.append(dict(metadata))
        check(self, metadata)

    monkeypatch.setattr(auth.Auth, "check", spy)

    async def call_async() -> None:
        async with (
            oc.AsyncClient(guarded.address, token=acme, route="mine") as client,
            await client.open_session(MODEL) as session,
        ):
            await session.append(*draw_prompt(3))
            await session.decode(0, *draw_step())

    def call(route: str | None = None) -> set[str]:
        seen.clear()
        with (
            oc.Client(guarded.address, token=acme, route=route) as client,
            client.open_session(MODEL) as session,
        ):
            session.append(*draw_prompt(3))
            session.decode(0, *draw_step())
        assert len(seen) >= 5
        assert {metadata["authorization"] for metadata in seen} == {f"Bearer {acme}"}
        return {metadata["octavo-route"] for metadata in seen}

    assert call("mine") == {"mine"}
    (first,), (second,) = call(), call()
    assert first != second
    assert len(first) >= 16
    seen.clear()
    asyncio.run(call_async())
    assert len(seen) >= 5
    assert {metadata["octavo-route"] for metadata in seen} == {"mine"}
    assert {metadata["authorization"] for metadata in seen} == {f"Bearer {acme}"}
