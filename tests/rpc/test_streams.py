"""Streams and calls as clients use and misuse them: several steps in flight, retries, broken connections, garbage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import grpc
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from hypothesis import given, settings
from numpy.typing import NDArray

from octavo import v1
from octavo.v1.octavo_pb2_grpc import OctavoServiceStub
from octavo_client.oracle import AttentionOptions, OracleCache, check
from octavo_server import grpc_server
from tests.rpc.conftest import NUM_BLOCKS, serving
from tests.rpc.cutting_proxy import cutting_proxy
from tests.rpc.wire import (
    CALL_TIMEOUT_S,
    HEAD_DIM,
    MODEL,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    SM_SCALE,
    Caching,
    Stream,
    Wire,
    array,
    as_done,
    refusal_of,
    refusal_of_call,
    tensor,
    unharmed,
)
from tests.waiting import wait_until


def test_server_info_describes_the_server(wire: Wire) -> None:
    info = wire.stub.ServerInfo(v1.ServerInfoRequest(), timeout=CALL_TIMEOUT_S)
    model = info.models[0]
    assert (model.name, model.num_layers, model.num_q_heads, model.num_kv_heads) == (MODEL, 2, 4, 2)
    assert (model.head_dim, model.block_size, model.num_blocks) == (HEAD_DIM, 16, NUM_BLOCKS)
    assert list(model.sm_scale) == pytest.approx([SM_SCALE] * 2)
    assert list(info.models[1].window) == [8, 8]
    assert (info.max_steps_in_flight, info.max_message_bytes) == (4, 256 * 1024)
    assert wire.open().session_id.startswith(info.incarnation + "-")


def test_several_steps_are_in_flight_and_linked_by_step_id(wire: Wire) -> None:
    cachings = [wire.open() for _ in range(4)]
    steps = [wire.step((caching, layer, 2)) for caching in cachings for layer in (0, 1)]
    with wire.stream() as stream:
        for step in steps:
            stream.send(step)
        results = {}
        for _ in steps:
            result = stream.receive()
            results[result.step_id] = result
    for index, step in enumerate(steps):
        wire.check(step, results[step.step_id], [(cachings[index // 2], index % 2)])


def test_a_slow_reader_holds_up_only_itself(wire: Wire) -> None:
    slow, other = wire.open(), wire.open()
    wire.append(slow, 0, 8)
    read = wire.step((slow, 0, 1), k=None, v=None, start_pos=[7])
    with wire.stream() as stream:
        for _ in range(20):
            stream.send(read)
        for _ in range(5):
            wire.append(other, 1, 2)
        assert [stream.receive().step_id for _ in range(20)] == [read.step_id] * 20


def test_a_client_that_waits_for_each_answer_gets_them_in_order(wire: Wire) -> None:
    caching = wire.open()
    with wire.stream() as stream:
        steps = []
        for _ in range(3):
            step = wire.step((caching, 0, 1), waits_for_answer=True)
            stream.send(step)
            wire.check(step, stream.receive(), [(caching, 0)])
        # One that does not keep its word is answered all the same.
        for layer in (0, 1):
            steps.append(wire.step((caching, layer, 2), waits_for_answer=True))
            stream.send(steps[-1])
        steps.append(wire.step((wire.open(), 0, 1)))
        stream.send(steps[-1])
        answered = [stream.receive().step_id for _ in steps]
    assert answered == [step.step_id for step in steps]


def test_the_next_step_is_read_whether_or_not_the_client_says_that_it_waits(wire: Wire) -> None:
    caching, other = wire.open(), wire.open()
    with wire.stream() as stream, wire.stream() as second:
        with wire.busy():
            stream.send(wire.step((caching, 0, 1), waits_for_answer=True))
            stream.send(wire.step((caching, 1, 1)))
            second.send(wire.step((other, 0, 1)))
            second.send(wire.step((other, 1, 1)))
            wait_until(lambda: len(wire.queue) == 4)
        for _ in range(2):
            assert not stream.receive().HasField("error")
            assert not second.receive().HasField("error")


def test_a_waiting_client_that_vanishes_gives_its_stream_back(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour), wire.busy():
        num_free = wire.num_free_streams
        with wire.stream() as stream:
            stream.send(wire.step((victim, 0, 1), (neighbour, 0, 1), waits_for_answer=True))
            wait_until(lambda: len(wire.queue) == 1)
            stream.call.cancel()
        wait_until(lambda: wire.num_free_streams == num_free)


def test_a_replay_gets_the_same_answer_and_grows_nothing(wire: Wire) -> None:
    caching = wire.open()
    wire.append(caching, 0, 3)
    step = wire.step((caching, 0, 20))
    first = wire.run(step)
    free = wire.num_free_blocks()
    with grpc.insecure_channel(wire.address) as channel:
        stub = OctavoServiceStub(channel)  # type: ignore[no-untyped-call]
        (again,) = stub.Decode(iter([v1.DecodeRequest(step=step)]), timeout=CALL_TIMEOUT_S)
    assert again.result == first
    assert wire.lengths(caching) == [23, 0]
    assert wire.num_free_blocks() == free
    wire.check(step, first, [(caching, 0)])


def test_a_replay_after_the_connection_broke_before_the_answer(wire: Wire) -> None:
    caching = wire.open()
    wire.append(caching, 0, 3)
    step = wire.step((caching, 0, 5))
    channel = grpc.insecure_channel(wire.address)
    stub = OctavoServiceStub(channel)  # type: ignore[no-untyped-call]
    wire.backend.shut()
    call = stub.Decode(iter([v1.DecodeRequest(step=step)]), timeout=CALL_TIMEOUT_S)
    assert wire.backend.is_running.wait(CALL_TIMEOUT_S)
    channel.close()
    with pytest.raises((grpc.RpcError, ValueError)):
        next(call)
    wire.backend.open()
    wire.check(step, wire.run(step), [(caching, 0)])
    assert wire.lengths(caching) == [8, 0]


def test_steps_queued_by_a_client_that_vanishes_are_not_applied(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour), wire.stream() as other:
        with wire.busy():
            channel = grpc.insecure_channel(wire.address)
            gone = Stream(OctavoServiceStub(channel))  # type: ignore[no-untyped-call]
            gone.send(wire.step((victim, 0, 4), (neighbour, 1, 1)))
            wait_until(lambda: len(wire.queue) == 1)
            kept = wire.step((neighbour, 0, 2))
            other.send(kept)
            channel.close()
            gone.end()
            wait_until(lambda: are_cancelled(wire, 1) and len(wire.queue) == 2)
        wire.check(kept, other.receive(), [(neighbour, 0)])


def are_cancelled(wire: Wire, count: int) -> bool:
    """Tell whether the queue holds at least so much, and its first `count` have nobody waiting for them."""
    first = wire.queue[:count]
    return len(first) == count and all(item.is_cancelled() for item in first)


def test_streams_of_clients_that_vanished_are_given_back(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour):
        for _ in range(3 * 4):
            step = wire.step((victim, 0, 1), (neighbour, 0, 1), k=None, v=None, start_pos=[0, 0])
            with wire.stream() as stream:
                stream.send(step)
                stream.receive()
                stream.call.cancel()
            wait_until(lambda: wire.num_free_streams == 4)


def test_a_cancelled_unary_step_frees_its_place(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour):
        kept = wire.step((neighbour, 0, 2))
        with wire.busy():
            for num_queued in range(1, 7):
                request = v1.DecodeOnceRequest(step=wire.step((victim, 0, 3), (neighbour, 1, 2)))
                cancel_once_queued(wire, wire.stub.DecodeOnce, request, num_queued)
            call = wire.stub.DecodeOnce.future(
                v1.DecodeOnceRequest(step=kept), timeout=CALL_TIMEOUT_S
            )
            wait_until(lambda: len(wire.queue) == 7)
        wire.check(kept, call.result().result, [(neighbour, 0)])


def cancel_once_queued(wire: Wire, call: Any, request: Any, num_queued: int) -> None:
    """Start a unary call, and leave it when the queue has come to this length; return once its place is free."""
    future = call.future(request, timeout=CALL_TIMEOUT_S)
    wait_until(lambda: len(wire.queue) == num_queued)
    future.cancel()
    wait_until(lambda: are_cancelled(wire, num_queued) and wire.num_free_calls == 2)


@pytest.mark.parametrize(
    ("dtype", "wire_dtype"),
    [(np.float16, v1.DATA_TYPE_FLOAT16), (ml_dtypes.bfloat16, v1.DATA_TYPE_BFLOAT16)],
)
def test_half_precision_goes_in_and_comes_out(
    wire: Wire, dtype: type, wire_dtype: v1.DataType
) -> None:
    caching = wire.open()
    cache = OracleCache(AttentionOptions(SM_SCALE))
    q: NDArray[Any] = wire.draw(5, NUM_Q_HEADS).astype(dtype)
    k: NDArray[Any] = wire.draw(5, NUM_KV_HEADS).astype(dtype)
    v: NDArray[Any] = wire.draw(5, NUM_KV_HEADS).astype(dtype)
    step = wire.step((caching, 0, 5))
    for name, values in (("q", q), ("k", k), ("v", v)):
        message = v1.Tensor(data=values.tobytes(), dtype=wire_dtype, shape=values.shape)
        getattr(step, name).CopyFrom(message)
    step.return_lse = True
    result = wire.run(step)
    assert result.out.dtype == wire_dtype
    cache.append(k, v)
    exact = cache.attend(q, start_pos=0)
    check(np.frombuffer(result.out.data, dtype).reshape(result.out.shape), exact)
    np.testing.assert_allclose(array(result.lse), exact.lse, rtol=0, atol=1e-3)


def append_message(
    caching: Caching, layer: int, start_pos: int, k: NDArray[np.float32], key: int = 5
) -> v1.AppendRequest:
    return v1.AppendRequest(
        session_handle=caching.handle,
        layer=layer,
        start_pos=start_pos,
        num_tokens=len(k),
        step_key=key,
        k=tensor(k),
        v=tensor(-k),
    )


def test_append_stores_a_prompt_of_all_layers(wire: Wire) -> None:
    caching = wire.open()
    messages = []
    for layer in range(NUM_LAYERS):
        k = wire.draw(60, NUM_KV_HEADS)
        caching.layers[layer].append(k, -k)
        messages += [append_message(caching, layer, pos, k[pos : pos + 25]) for pos in (0, 25, 50)]
    response = wire.stub.Append(iter(messages), timeout=CALL_TIMEOUT_S)
    assert response.num_messages == 6
    assert list(response.session.lengths) == [60, 60]
    assert response.session.num_blocks == 4
    for layer in range(NUM_LAYERS):
        wire.append(caching, layer, 1)


def test_append_stops_at_the_first_refused_message_and_resumes(wire: Wire) -> None:
    caching = wire.open()
    k = wire.draw(30, NUM_KV_HEADS)
    poisoned = k.copy()
    poisoned[22, 1, 0] = np.inf
    messages = [
        append_message(caching, 0, pos, poisoned[pos : pos + 10], pos + 1) for pos in (0, 10, 20)
    ]
    with pytest.raises(grpc.RpcError) as refused:
        wire.stub.Append(iter(messages), timeout=CALL_TIMEOUT_S)
    refusal = refusal_of_call(refused.value)
    assert (refusal.reason, refusal.metadata["token"]) == ("NON_FINITE", "2")
    stored = stored_in(refused.value)
    assert stored.num_messages == 2
    assert list(stored.session.lengths) == [20, 0]
    assert wire.lengths(caching) == [20, 0]
    again = [messages[1], append_message(caching, 0, 20, k[20:], 21)]
    assert wire.stub.Append(iter(again), timeout=CALL_TIMEOUT_S).num_messages == 2
    caching.layers[0].append(k, -k)
    wire.append(caching, 0, 1)


def stored_in(error: grpc.RpcError) -> v1.AppendResponse:
    """Return what an Append call's error says is stored."""
    status = rpc_status.from_call(cast(grpc.Call, error))
    assert status is not None
    (detail,) = [d for d in status.details if d.Is(v1.AppendResponse.DESCRIPTOR)]
    return v1.AppendResponse.FromString(detail.value)


def test_append_without_messages_stores_nothing(wire: Wire) -> None:
    response = wire.stub.Append(iter([]), timeout=CALL_TIMEOUT_S)
    assert response == v1.AppendResponse()


def test_health_and_short_calls_are_answered_while_every_stream_is_busy(wire: Wire) -> None:
    caching = wire.open()
    wire.append(caching)
    read = wire.step((caching, 0, 1), k=None, v=None, start_pos=[0])
    with wire.busy(), wire.stream() as second, wire.stream() as third, wire.stream() as fourth:
        for stream in (second, third, fourth):
            stream.send(read)
        waiting = [
            wire.stub.DecodeOnce.future(v1.DecodeOnceRequest(step=read), timeout=CALL_TIMEOUT_S)
            for _ in range(2)
        ]
        for service in ("", "live", "ready", "octavo.v1.OctavoService"):
            assert wire.health(service) == "SERVING"
        assert wire.lengths(caching) == [3, 0]
        wire.open()
        wire.backend.open()
        for stream in (second, third, fourth):
            assert stream.receive().step_id == read.step_id
        assert [call.code() for call in waiting] == [grpc.StatusCode.OK] * 2


def test_full_attention_ignores_the_position(wire: Wire) -> None:
    caching = wire.open()
    wire.append(caching, 0, 5)
    for start_pos in (0, 5, 2**31 - 1, 2**31, 2**32 - 1):
        step = wire.step((caching, 0, 2), k=None, v=None, causal=False, start_pos=[start_pos])
        result = wire.run(step)
        q = array(step.q)
        check(array(result.out), caching.layers[0].attend(q, start_pos=0, causal=False))


def test_a_step_waits_and_expires_while_its_stream_is_full(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    caching = wire.open()
    wire.append(caching, 0, 1)
    with wire.busy(), wire.stream() as stream:
        arrivals = watch_arrivals(monkeypatch)
        for _ in range(4):
            stream.send(wire.step((caching, 0, 1), k=None, v=None, start_pos=[0]))
        late = wire.step((caching, 1, 1), timeout_ms=50)
        stream.send(late)
        wait_until(lambda: len(arrivals) == 5 and time.monotonic() > arrivals[4] + 0.05)
        assert len(wire.queue) == 4
        wire.backend.open()
        results = {result.step_id: result for result in (stream.receive() for _ in range(5))}
        assert refusal_of(results[late.step_id].error).reason == "STEP_EXPIRED"
    assert wire.lengths(caching) == [1, 0]


def watch_arrivals(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows by the time at which each step of a stream arrives at the server."""
    arrivals: list[float] = []

    def monotonic() -> float:
        arrivals.append(time.monotonic())
        return arrivals[-1]

    clock = SimpleNamespace(monotonic=monotonic)
    monkeypatch.setattr("octavo_server.step_stream.time", clock)
    return arrivals


def test_a_truncate_or_close_whose_caller_left_is_not_applied(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour), wire.stream() as stream:
        truncate = v1.TruncateSessionRequest(session_id=victim.session_id, length=1)
        close = v1.CloseSessionRequest(session_id=victim.session_id)
        step = wire.step((victim, 0, 1), (neighbour, 0, 1))
        with wire.busy():
            for num_queued in (1, 3, 5):
                cancel_once_queued(wire, wire.stub.TruncateSession, truncate, num_queued)
                cancel_once_queued(wire, wire.stub.CloseSession, close, num_queued + 1)
            stream.send(step)
            wait_until(lambda: len(wire.queue) == 7)
        wire.check(step, stream.receive(), [(victim, 0), (neighbour, 0)])


HEALTH = "grpc.health.v1.Health"


@contextmanager
def silent_calls(wire: Wire, count: int, *names: str) -> Iterator[list[Any]]:
    """Open calls that send nothing until the block ends."""
    may_end = threading.Event()

    def nothing() -> Iterator[bytes]:
        may_end.wait(CALL_TIMEOUT_S)
        yield from ()

    try:
        yield [wire.raw("stream_unary", *names).future(nothing()) for _ in range(count)]
    finally:
        may_end.set()


@pytest.mark.parametrize(
    "names", [("ServerInfo",), ("DecodeOnce",), ("Check", HEALTH), ("Watch", HEALTH)]
)
def test_calls_that_send_nothing_hold_nothing_up(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """More silent calls than there are threads; the last ones stay, and yet everything is answered."""
    monkeypatch.setattr(grpc_server, "MAX_SILENT_CALLS", 2)
    with serving(max_streams=1, max_unary_calls=1) as wire:
        caching = wire.open()
        with silent_calls(wire, 30, *names) as calls:
            for call in islice(as_done(calls), 28):
                assert call.code() is grpc.StatusCode.CANCELLED
            assert wire.health("ready") == "SERVING"
            assert wire.lengths(caching) == [0, 0]
            wire.append(caching, 0, 3)
            step = wire.step((caching, 0, 2))
            answer = wire.stub.DecodeOnce(v1.DecodeOnceRequest(step=step), timeout=CALL_TIMEOUT_S)
            wire.check(step, answer.result, [(caching, 0)])


def test_calls_that_come_all_at_once_are_not_taken_for_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_server, "MAX_SILENT_CALLS", 1)
    monkeypatch.setattr("octavo_server.request_reader.GRACE_S", CALL_TIMEOUT_S)
    with serving() as wire:
        request = v1.ServerInfoRequest()
        calls = [wire.stub.ServerInfo.future(request, timeout=CALL_TIMEOUT_S) for _ in range(100)]
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}


@pytest.mark.parametrize("names", [("OpenSession",), ("Check", HEALTH), ("Watch", HEALTH)])
def test_a_unary_call_without_a_message_is_refused(wire: Wire, names: tuple[str, ...]) -> None:
    call = wire.raw("stream_unary", *names)
    with pytest.raises(grpc.RpcError) as refused:
        call(iter([]), timeout=CALL_TIMEOUT_S)
    refusal = refusal_of_call(refused.value)
    assert (refusal.reason, refusal.metadata["field"]) == ("MALFORMED_MESSAGE", "request")
    assert wire.sessions() == []


def test_what_follows_the_message_of_a_unary_call_is_not_read(wire: Wire) -> None:
    requests = [v1.OpenSessionRequest(model=MODEL).SerializeToString(), b"\xff\xff\xff"]
    wire.raw("stream_unary", "OpenSession")(iter(requests), timeout=CALL_TIMEOUT_S)
    assert len(wire.sessions()) == 1


@pytest.mark.parametrize("name", ["Check", "Watch"])
def test_bytes_that_are_no_message_are_refused_by_health_too(wire: Wire, name: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        wire.raw("unary_unary", name, HEALTH)(b"\xff\xff\xff", timeout=CALL_TIMEOUT_S)
    assert refusal_of_call(refused.value).reason == "MALFORMED_MESSAGE"


def test_a_client_that_falls_silent_gives_its_streams_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_server, "KEEPALIVE_MS", 1000)
    monkeypatch.setattr(grpc_server, "KEEPALIVE_TIMEOUT_MS", 1000)
    with serving(max_streams=1) as wire, cutting_proxy(wire.address) as proxy:
        channel = grpc.insecure_channel(proxy.target)
        stub = OctavoServiceStub(channel)  # type: ignore[no-untyped-call]
        frozen = Stream(stub)
        frozen.send(wire.step((wire.open(), 0, 1)))
        frozen.receive()
        proxy.drop_answers()
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while not takes_a_stream(wire):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        channel.close()


def takes_a_stream(wire: Wire) -> bool:
    """Open a stream and end it; False when the server has no place for it."""
    call = wire.stub.Decode(iter([]), timeout=CALL_TIMEOUT_S)
    return call.code() is grpc.StatusCode.OK


def test_reflection_names_the_services(wire: Wire) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=CALL_TIMEOUT_S)
    names = {service.name for service in answer.list_services_response.service}
    assert {"octavo.v1.OctavoService", "grpc.health.v1.Health"} <= names


Mutation = tuple[dict[int, int], int]
"""Bytes to replace by their place, and how many to cut off the end."""

MUTATIONS = st.binary(max_size=64) | st.tuples(
    st.dictionaries(st.integers(0, 10_000), st.integers(0, 255), max_size=4),
    st.just(0) | st.integers(0, 100),
)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(MUTATIONS, max_size=6))
def test_any_bytes_are_answered_and_harm_nothing(
    module_wire: Wire, drawn: list[bytes | Mutation]
) -> None:
    """Random bytes, and a good step with bytes changed, cut or inserted."""
    wire = module_wire
    for session in wire.sessions():
        wire.close(session)
    caching = wire.open()
    wire.append(caching, 0, 3)
    good = v1.DecodeRequest(step=wire.step((caching, 0, 1), k=None, v=None, start_pos=[0]))
    good_bytes = good.SerializeToString()
    messages = [mutate(good_bytes, mutation) for mutation in drawn]
    answers = wire.raw("stream_stream", "Decode")(
        iter([*messages, good_bytes]), timeout=CALL_TIMEOUT_S
    )
    results = [v1.DecodeResponse.FromString(answer).result for answer in answers]
    assert len(results) == len(messages) + 1
    for result in results:
        for status in [result.error] * result.HasField("error") + [
            entry.error for entry in result.entry_errors
        ]:
            refusal_of(status)
    assert any(result.step_id == good.step.step_id and result.out.data for result in results)
    wire.close(caching)
    assert wire.num_free_blocks() == NUM_BLOCKS


def mutate(message: bytes, mutation: bytes | Mutation) -> bytes:
    """Return bytes as they are, or the message with bytes replaced and perhaps its end cut off."""
    if isinstance(mutation, bytes):
        return mutation
    replaced, cut = mutation
    changed = bytearray(message)
    for place, value in replaced.items():
        changed[place % len(message)] = value
    return bytes(changed[: len(message) - cut])


def test_many_clients_at_once_each_get_their_own_answers() -> None:
    """Eight clients append and read sessions of their own at the same time; every answer is checked."""
    limits = {"max_sessions": 64, "max_streams": 16, "max_unary_calls": 16}
    with serving(**limits) as wire:
        failures: list[BaseException] = []

        def client(seed: int) -> None:
            try:
                use_a_session(wire, seed)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures, failures[0]
        assert wire.num_free_blocks() == NUM_BLOCKS


def use_a_session(shared: Wire, seed: int) -> None:
    """Append to both layers in steps of 1 to 3 tokens up to a block, on a stream and a channel of one's own."""
    wire = Wire(shared.server, shared.backend)
    wire.rng = np.random.default_rng(seed)
    caching = wire.open()
    with wire.stream() as stream:
        while caching.length(0) < 14:
            num_tokens = int(wire.rng.integers(1, 3))
            entries = [(caching, 0), (caching, 1)]
            step = wire.step(*((caching, layer, num_tokens) for layer in (0, 1)))
            stream.send(step)
            wire.check(step, stream.receive(), entries)
    wire.close(caching)
    wire.channel.close()
