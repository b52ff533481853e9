"""Every reason of the error table over the wire, with the session, its neighbours and the pool unharmed by it."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import numpy as np
import pytest

from octavo import v1
from octavo_server.errors import REASONS, Reason
from tests.rpc.conftest import serving
from tests.rpc.tenants import TenantsFile
from tests.rpc.wire import (
    CALL_TIMEOUT_S,
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_Q_HEADS,
    WINDOWED_MODEL,
    Caching,
    Refusal,
    Stream,
    Wire,
    as_done,
    refusal_of,
    refusal_of_call,
    tensor,
    unharmed,
)
from tests.waiting import wait_until

SEEN: set[str] = set()
"""Reasons that the tests of this module met; the last test wants them all."""


def confirm(refusal: Refusal, reason: Reason) -> None:
    """Compare a refusal with its row of the table."""
    SEEN.add(refusal.reason)
    assert refusal.reason == reason
    spec = REASONS[reason]
    assert refusal.code == getattr(grpc.StatusCode, spec.code).value[0]
    assert set(refusal.metadata) == set(spec.metadata)
    assert refusal.has_retry == spec.is_retryable
    for value in refusal.metadata.values():
        assert value in refusal.message


def rows(num_tokens: int, num_heads: int, head_dim: int = HEAD_DIM, fill: float = 1.0) -> v1.Tensor:
    return tensor(np.full((num_tokens, num_heads, head_dim), fill, np.float32))


WHOLE_STEP: dict[str, tuple[Reason, str, dict[str, Any]]] = {
    "q of too few tokens": (Reason.SHAPE_MISMATCH, "q", {"q": rows(1, NUM_Q_HEADS)}),
    "q of another head count": (Reason.SHAPE_MISMATCH, "q", {"q": rows(2, 8)}),
    "k with the query heads": (Reason.SHAPE_MISMATCH, "k", {"k": rows(2, NUM_Q_HEADS)}),
    "v of another head_dim": (Reason.SHAPE_MISMATCH, "v", {"v": rows(2, NUM_KV_HEADS, 8)}),
    "k without v": (Reason.SHAPE_MISMATCH, "v", {"v": None}),
    "v without k": (Reason.SHAPE_MISMATCH, "k", {"k": None}),
    "no q": (Reason.SHAPE_MISMATCH, "q", {"q": None}),
    "full attention with k and v": (Reason.SHAPE_MISMATCH, "causal", {"causal": False}),
    "layers of another count": (Reason.SHAPE_MISMATCH, "layers", {"layers": [0, 1]}),
    "no tokens": (Reason.SHAPE_MISMATCH, "num_tokens", {"num_tokens": [0]}),
    "v of another dtype": (
        Reason.DTYPE_MISMATCH,
        "q, k, v",
        {"v": tensor(np.ones((2, NUM_KV_HEADS, HEAD_DIM), np.float16))},
    ),
    "a dtype that is none": (
        Reason.BAD_TENSOR,
        "k.dtype",
        {"k": v1.Tensor(data=b"abcd", dtype=v1.DATA_TYPE_UNSPECIFIED, shape=[1])},
    ),
    "bytes that do not fill the shape": (
        Reason.BAD_TENSOR,
        "q.data",
        {"q": v1.Tensor(data=b"abc", dtype=v1.DATA_TYPE_FLOAT32, shape=[2, NUM_Q_HEADS, HEAD_DIM])},
    ),
    "a tensor without a shape": (
        Reason.BAD_TENSOR,
        "q.shape",
        {"q": v1.Tensor(data=b"abcd", dtype=v1.DATA_TYPE_FLOAT32)},
    ),
    "a tensor of 65 axes": (
        Reason.BAD_TENSOR,
        "q.shape",
        {"q": v1.Tensor(data=b"abcd", dtype=v1.DATA_TYPE_FLOAT32, shape=[1] * 65)},
    ),
    "a tensor of 100,000 huge axes": (
        Reason.BAD_TENSOR,
        "q.shape",
        {"q": v1.Tensor(dtype=v1.DATA_TYPE_FLOAT32, shape=[2**32 - 1] * 20_000)},
    ),
    "a tensor with an axis of nothing": (
        Reason.BAD_TENSOR,
        "q.shape",
        {"q": v1.Tensor(dtype=v1.DATA_TYPE_FLOAT32, shape=[0, 2**32 - 1, 2**32 - 1])},
    ),
    "a tensor larger than memory": (
        Reason.BAD_TENSOR,
        "q.data",
        {"q": v1.Tensor(dtype=v1.DATA_TYPE_FLOAT32, shape=[2**32 - 1] * 3)},
    ),
    "no entries": (
        Reason.EMPTY_STEP,
        "session_handles",
        {"session_handles": None, "layers": None, "start_pos": None, "num_tokens": None},
    ),
}


@pytest.mark.parametrize("case", WHOLE_STEP)
def test_a_step_that_is_wrong_is_refused_whole(wire: Wire, case: str) -> None:
    reason, field, changes = WHOLE_STEP[case]
    with unharmed(wire) as (victim, _), wire.stream() as stream:
        stream.send(wire.step((victim, 0, 2), **changes))
        result = stream.receive()
        refusal = refusal_of(result.error)
        confirm(refusal, reason)
        assert refusal.metadata["field"] == field
        assert not result.HasField("out")
        step = wire.step((victim, 0, 1))
        stream.send(step)
        wire.check(step, stream.receive(), [(victim, 0)])


def test_two_entries_of_one_session_and_layer_are_refused(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour):
        result = wire.run(wire.step((victim, 0, 1), (neighbour, 0, 1), (victim, 0, 1)))
        confirm(refusal_of(result.error), Reason.DUPLICATE_ENTRY)


def test_sessions_of_two_models_in_a_step_are_refused(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        step = wire.step((victim, 0, 1), (wire.open(WINDOWED_MODEL), 0, 1))
        confirm(refusal_of(wire.run(step).error), Reason.SHAPE_MISMATCH)


ONE_ENTRY: dict[str, tuple[Reason, dict[str, str], int, dict[str, Any]]] = {
    # name: reason, metadata, layer, changes of the step (victim's entry first, then the neighbour's)
    "a NaN in k": (
        Reason.NON_FINITE,
        {"field": "k", "token": "1", "head": "1"},
        0,
        {"k": "nan"},
    ),
    "a NaN in v": (Reason.NON_FINITE, {"field": "v", "token": "1", "head": "1"}, 0, {"v": "nan"}),
    "a NaN in q": (Reason.NON_FINITE, {"field": "q", "token": "1", "head": "1"}, 0, {"q": "nan"}),
    "infinity in k": (
        Reason.NON_FINITE,
        {"field": "k", "token": "1", "head": "1"},
        0,
        {"k": "inf"},
    ),
    "infinity in q": (
        Reason.NON_FINITE,
        {"field": "q", "token": "1", "head": "1"},
        0,
        {"q": "-inf"},
    ),
    "k that no FP16 scale holds": (
        Reason.SCALE_OVERFLOW,
        {"field": "k", "token": "1", "head": "1"},
        0,
        {"k": "1e8"},
    ),
    "v that no FP16 scale holds": (
        Reason.SCALE_OVERFLOW,
        {"field": "v", "token": "1", "head": "1"},
        0,
        {"v": "-1e8"},
    ),
    "a layer that is none": (
        Reason.LAYER_NOT_FOUND,
        {"layer": "2", "num_layers": "2"},
        2,
        {},
    ),
    "a position too early": (
        Reason.POSITION_MISMATCH,
        {"start_pos": "4", "length": "5", "layer": "0"},
        0,
        {"start_pos": 4},
    ),
    "a position too late": (
        Reason.POSITION_MISMATCH,
        {"start_pos": "6", "length": "5", "layer": "0"},
        0,
        {"start_pos": 6},
    ),
    "a position beyond all": (
        Reason.POSITION_MISMATCH,
        {"start_pos": str(2**32 - 1), "length": "5", "layer": "1"},
        1,
        {"start_pos": 2**32 - 1},
    ),
}


@pytest.mark.parametrize("case", ONE_ENTRY)
def test_an_entry_that_is_wrong_is_refused_alone(wire: Wire, case: str) -> None:
    reason, metadata, layer, changes = ONE_ENTRY[case]
    with unharmed(wire) as (victim, neighbour):
        step = wire.step((victim, layer, 2), (neighbour, 0, 2))
        for name, value in changes.items():
            if name == "start_pos":
                step.start_pos[0] = value
            else:
                poison(getattr(step, name), float(value))
        refused_alone(wire, step, neighbour, reason, metadata)


def poison(message: v1.Tensor, value: float) -> None:
    """Put a value into token 1, head 1 of a tensor."""
    values = np.frombuffer(message.data, np.float32).reshape(message.shape).copy()
    values[1, 1, 3] = value
    message.data = values.tobytes()


def refused_alone(
    wire: Wire, step: v1.Step, neighbour: Caching, reason: Reason, metadata: dict[str, str]
) -> None:
    """Run a step whose first entry is refused and whose second is the neighbour's."""
    result = wire.run(step)
    (entry_error,) = result.entry_errors
    assert entry_error.entry_idx == 0
    refusal = refusal_of(entry_error.error)
    confirm(refusal, reason)
    assert refusal.metadata == metadata
    first = step.num_tokens[0]
    out = np.frombuffer(result.out.data, np.float32).reshape(result.out.shape)
    assert not out[:first].any()
    own = v1.Step(num_tokens=[step.num_tokens[1]])
    for name in "qkv":
        values = np.frombuffer(getattr(step, name).data, np.float32)
        getattr(own, name).CopyFrom(
            tensor(values.reshape(getattr(step, name).shape)[first:].copy())
        )
    answered = v1.StepResult(out=tensor(out[first:].copy()))
    wire.check(own, answered, [(neighbour, 0)])


def test_an_unknown_session_is_refused_alone(wire: Wire) -> None:
    with unharmed(wire) as (_, neighbour):
        gone = wire.open()
        wire.close(gone)
        step = wire.step((gone, 0, 2), (neighbour, 0, 2))
        metadata = {"session_id": str(gone.handle)}
        refused_alone(wire, step, neighbour, Reason.SESSION_NOT_FOUND, metadata)


def test_a_truncated_session_refuses_the_old_position(wire: Wire) -> None:
    with unharmed(wire) as (_, neighbour):
        caching = wire.open()
        wire.append(caching, 0, 9)
        request = v1.TruncateSessionRequest(session_id=caching.session_id, length=4)
        assert list(wire.stub.TruncateSession(request).session.lengths) == [4, 0]
        step = wire.step((caching, 0, 2), (neighbour, 0, 2))
        metadata = {"start_pos": "9", "length": "4", "layer": "0"}
        refused_alone(wire, step, neighbour, Reason.POSITION_MISMATCH, metadata)
        wire.close(caching)


def test_another_client_at_the_same_position_is_refused(wire: Wire) -> None:
    with unharmed(wire) as (_, neighbour):
        caching = wire.open()
        late = wire.step((caching, 0, 2), (neighbour, 0, 2))
        wire.append(caching, 0, 2)
        metadata = {"start_pos": "0", "length": "2", "layer": "0"}
        refused_alone(wire, late, neighbour, Reason.POSITION_MISMATCH, metadata)
        wire.append(caching, 0, 1)
        wire.close(caching)


def test_a_context_too_long_is_refused_alone(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour):
        step = wire.step((victim, 0, 156), (neighbour, 0, 2))
        metadata = {"max_context": "160", "requested": "161"}
        refused_alone(wire, step, neighbour, Reason.CONTEXT_TOO_LONG, metadata)


def test_a_pool_exhausted_in_mid_batch_refuses_the_entry_that_does_not_fit(wire: Wire) -> None:
    with unharmed(wire) as (victim, neighbour):
        hog = wire.open()
        wire.append(hog, 0, 144)
        step = wire.step((victim, 0, 44), (neighbour, 0, 2))
        metadata = {"required_blocks": "3", "free_blocks": "1"}
        refused_alone(wire, step, neighbour, Reason.OUT_OF_BLOCKS, metadata)
        wire.close(hog)


def test_full_attention_on_a_layer_with_a_window_is_refused(wire: Wire) -> None:
    with unharmed(wire):
        caching = wire.open(WINDOWED_MODEL)
        wire.run(wire.step((caching, 0, 3)))
        step = wire.step((caching, 0, 1), k=None, v=None, causal=False)
        (entry_error,) = wire.run(step).entry_errors
        confirm(refusal_of(entry_error.error), Reason.SHAPE_MISMATCH)


def test_attending_to_an_empty_cache_is_refused(wire: Wire) -> None:
    with unharmed(wire) as (_, neighbour):
        for causal in (True, False):
            step = wire.step((wire.open(), 0, 1), k=None, v=None, causal=causal)
            (entry_error,) = wire.run(step).entry_errors
            confirm(refusal_of(entry_error.error), Reason.POSITION_MISMATCH)
        past = wire.step((neighbour, 0, 2), k=None, v=None, start_pos=[4])
        (entry_error,) = wire.run(past).entry_errors
        confirm(refusal_of(entry_error.error), Reason.POSITION_MISMATCH)


def test_a_step_that_expires_in_the_queue_is_not_applied(wire: Wire) -> None:
    with unharmed(wire) as (victim, _), wire.stream() as stream:
        with wire.busy():
            stream.send(wire.step((victim, 0, 1), timeout_ms=1))
            stream.send(wire.step((victim, 1, 1), k=None, v=None, start_pos=[4]))
            wait_until(lambda: len(wire.queue) == 2 and wire.num_overdue == 1)
        results = [stream.receive(), stream.receive()]
        (expired,) = [result for result in results if result.HasField("error")]
        refusal = refusal_of(expired.error)
        confirm(refusal, Reason.STEP_EXPIRED)
        assert refusal.metadata == {"timeout_ms": "1"}


@pytest.mark.parametrize("garbage", [b"\xff" * 40, b"\x0a\x05ab", bytes(range(256))])
def test_bytes_that_are_no_message_are_refused_on_every_call(wire: Wire, garbage: bytes) -> None:
    with unharmed(wire):
        for name in (
            "ServerInfo",
            "ServerStats",
            "OpenSession",
            "GetSession",
            "ListSessions",
            "TruncateSession",
            "CloseSession",
            "DecodeOnce",
        ):
            call = wire.raw("unary_unary", name)
            with pytest.raises(grpc.RpcError) as refused:
                call(garbage, timeout=CALL_TIMEOUT_S)
            confirm(refusal_of_call(refused.value), Reason.MALFORMED_MESSAGE)
        append = wire.raw("stream_unary", "Append")
        with pytest.raises(grpc.RpcError) as refused:
            append(iter([garbage]), timeout=CALL_TIMEOUT_S)
        confirm(refusal_of_call(refused.value), Reason.MALFORMED_MESSAGE)


def test_bytes_that_are_no_message_leave_a_stream_alive(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        decode = wire.raw("stream_stream", "Decode")
        good = wire.step((victim, 0, 1), k=None, v=None, start_pos=[0])
        messages = [b"\xff\xff\xff", v1.DecodeRequest(step=good).SerializeToString()]
        answers = decode(iter(messages), timeout=CALL_TIMEOUT_S)
        results = [v1.DecodeResponse.FromString(answer).result for answer in answers]
        confirm(refusal_of(results[0].error), Reason.MALFORMED_MESSAGE)
        assert results[1].step_id == good.step_id
        assert not results[1].HasField("error")


def test_a_message_over_the_limit_ends_only_its_stream(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        step = wire.step((victim, 0, 1))
        step.q.data += bytes(256 * 1024)
        with pytest.raises(grpc.RpcError) as refused:
            wire.run(step)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unary_calls_name_what_they_do_not_find(wire: Wire) -> None:
    calls = {
        "GetSession": v1.GetSessionRequest(session_id="none"),
        "TruncateSession": v1.TruncateSessionRequest(session_id="none"),
        "CloseSession": v1.CloseSessionRequest(session_id="none"),
    }
    for name, request in calls.items():
        with pytest.raises(grpc.RpcError) as refused:
            getattr(wire.stub, name)(request, timeout=CALL_TIMEOUT_S)
        refusal = refusal_of_call(refused.value)
        confirm(refusal, Reason.SESSION_NOT_FOUND)
        assert refusal.metadata == {"session_id": "none"}


def test_an_unknown_model_is_refused(wire: Wire) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        wire.open("missing")
    refusal = refusal_of_call(refused.value)
    confirm(refusal, Reason.MODEL_NOT_FOUND)
    assert refusal.metadata == {"model": "missing"}


def test_one_session_too_many_is_refused(wire: Wire) -> None:
    for _ in range(6):
        wire.open()
    with pytest.raises(grpc.RpcError) as refused:
        wire.open()
    confirm(refusal_of_call(refused.value), Reason.SESSION_LIMIT)


def test_a_request_id_too_long_or_of_another_model_is_refused(wire: Wire) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        wire.open(request_id="x" * 129)
    confirm(refusal_of_call(refused.value), Reason.MALFORMED_MESSAGE)
    wire.open(request_id="x")
    with pytest.raises(grpc.RpcError) as refused:
        wire.open(WINDOWED_MODEL, request_id="x")
    confirm(refusal_of_call(refused.value), Reason.DUPLICATE_ENTRY)


def test_a_page_token_that_is_none_is_refused(wire: Wire) -> None:
    for token in ("x", "-1", "1" * 5000):
        with pytest.raises(grpc.RpcError) as refused:
            wire.stub.ListSessions(v1.ListSessionsRequest(page_token=token), timeout=CALL_TIMEOUT_S)
        confirm(refusal_of_call(refused.value), Reason.MALFORMED_MESSAGE)


def test_a_long_name_is_refused_with_its_beginning(wire: Wire) -> None:
    long = "x" * 20_000
    with pytest.raises(grpc.RpcError) as refused:
        wire.open(long)
    refusal = refusal_of_call(refused.value)
    confirm(refusal, Reason.MODEL_NOT_FOUND)
    assert refusal.metadata["model"] == "x" * 199 + "…"
    with pytest.raises(grpc.RpcError) as refused:
        wire.stub.GetSession(v1.GetSessionRequest(session_id=long), timeout=CALL_TIMEOUT_S)
    confirm(refusal_of_call(refused.value), Reason.SESSION_NOT_FOUND)


def test_too_many_entries_are_refused(wire: Wire) -> None:
    with unharmed(wire):
        count = 4097
        step = v1.Step(
            step_id=1,
            session_handles=range(1, count + 1),
            layers=[0] * count,
            start_pos=[0] * count,
            num_tokens=[1] * count,
            q=tensor(np.ones((count, 1, 1), np.float32)),
        )
        refusal = refusal_of(wire.run(step).error)
        confirm(refusal, Reason.SHAPE_MISMATCH)
        assert refusal.metadata["actual"] == "4097"


def test_rows_are_counted_also_where_no_session_is_known(wire: Wire) -> None:
    step = v1.Step(
        step_id=1,
        session_handles=[123],
        layers=[0],
        start_pos=[0],
        num_tokens=[2**32 - 1],
        q=rows(1, NUM_Q_HEADS),
    )
    confirm(refusal_of(wire.run(step).error), Reason.SHAPE_MISMATCH)


def test_a_region_is_refused_where_memory_is_not_shared(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        ask = v1.DecodeRequest(region=v1.RegionRequest())
        step = v1.DecodeRequest(step=wire.step((victim, 0, 1), k=None, v=None, start_pos=[0]))
        no_region, result = wire.stub.Decode(iter([ask, step]), timeout=CALL_TIMEOUT_S)
        confirm(refusal_of(no_region.region.error), Reason.SHARED_MEMORY_UNAVAILABLE)
        assert not result.result.HasField("error")


def test_one_stream_too_many_is_refused(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        with ExitStack() as stack:
            streams = [stack.enter_context(wire.stream()) for _ in range(4)]
            for stream in streams:
                stream.send(wire.step((victim, 0, 1), k=None, v=None, start_pos=[0]))
                stream.receive()
            with wire.stream() as fifth, pytest.raises(grpc.RpcError) as refused:
                fifth.receive()
            confirm(refusal_of_call(refused.value), Reason.STREAM_LIMIT)
        for stream in streams:
            assert list(stream.call) == []


def test_one_waiting_unary_call_too_many_is_refused(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        step = wire.step((victim, 0, 1), k=None, v=None, start_pos=[0])
        request = v1.DecodeOnceRequest(step=step)
        with wire.busy():
            calls = [wire.stub.DecodeOnce.future(request, timeout=CALL_TIMEOUT_S) for _ in range(3)]
            refused = next(call for call in as_done(calls) if call.exception())
            confirm(refusal_of_call(refused), Reason.QUEUE_FULL)
            wire.backend.open()
            codes = [call.code() for call in calls if call is not refused]
        assert codes == [grpc.StatusCode.OK] * 2


def test_a_wrong_guard_refuses_the_truncate(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        request = v1.TruncateSessionRequest(
            session_id=victim.session_id, length=0, expected_lengths=[5, 6]
        )
        with pytest.raises(grpc.RpcError) as refused:
            wire.stub.TruncateSession(request, timeout=CALL_TIMEOUT_S)
        refusal = refusal_of_call(refused.value)
        confirm(refusal, Reason.POSITION_MISMATCH)
        assert refusal.metadata == {"start_pos": "6", "length": "5", "layer": "1"}


def test_a_server_that_drains_refuses_new_work_and_finishes_the_old() -> None:
    with serving() as wire:
        victim = wire.open()
        step = wire.step((victim, 0, 1))
        stream, idle = Stream(wire.stub), Stream(wire.stub)
        idle.send(wire.step((wire.open(), 0, 1), waits_for_answer=True))
        idle.receive()
        wire.backend.shut()
        stream.send(step)
        assert wire.backend.is_running.wait(CALL_TIMEOUT_S)
        stopping = Thread(target=wire.server.stop)
        stopping.start()
        while wire.health("ready") == "SERVING":
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError) as refused:
            wire.open()
        confirm(refusal_of_call(refused.value), Reason.DRAINING)
        stream.send(wire.step((victim, 1, 1)))
        confirm(refusal_of(stream.receive().error), Reason.DRAINING)
        wire.backend.open()
        wire.check(step, stream.receive(), [(victim, 0)])
        with pytest.raises(grpc.RpcError) as refused:
            stream.receive()
        confirm(refusal_of_call(refused.value), Reason.DRAINING)
        with pytest.raises(grpc.RpcError) as refused:
            idle.receive()
        confirm(refusal_of_call(refused.value), Reason.DRAINING)
        stopping.join(CALL_TIMEOUT_S)
        wait_until(lambda: not wire.server._service._step_streams)


def test_a_server_whose_device_failed_refuses_everything_and_turns_unready() -> None:
    with serving() as wire:
        victim = wire.open()
        watch = wire.watch("ready")
        assert next(watch) == "SERVING"
        wire.backend.is_broken = True
        confirm(refusal_of(wire.run(wire.step((victim, 0, 1))).error), Reason.DEVICE_FAILURE)
        with pytest.raises(grpc.RpcError) as refused:
            wire.open()
        confirm(refusal_of_call(refused.value), Reason.DEVICE_FAILURE)
        assert wire.health("ready") == next(watch) == "NOT_SERVING"
        assert wire.health("live") == "SERVING"


def test_what_is_gone_is_said_to_be_expired_lost_or_closed() -> None:
    with serving(lease_s=0.1) as wire:
        expired = wire.open()
        wait_until(lambda: not wire.sessions())
        strange = Caching("0badcafe-" + 32 * "0", 0x0BAD << 48 | 7)
        closed = Caching(expired.session_id[:-1] + "x", expired.handle ^ 1)
        for caching, reason in (
            (expired, Reason.SESSION_EXPIRED),
            (strange, Reason.SESSION_LOST),
            (closed, Reason.SESSION_NOT_FOUND),
        ):
            result = wire.run(wire.step((caching, 0, 1)))
            confirm(refusal_of(result.entry_errors[0].error), reason)
            with pytest.raises(grpc.RpcError) as refused:
                wire.lengths(caching)
            confirm(refusal_of_call(refused.value), reason)


def test_a_tenant_over_its_limit_is_refused() -> None:
    with serving(tenant_max_sessions=1, tenant_max_tokens=16) as wire:
        caching = wire.open()
        result = wire.run(wire.step((caching, 0, 17)))
        confirm(refusal_of(result.entry_errors[0].error), Reason.TENANT_LIMIT)
        with pytest.raises(grpc.RpcError) as refused:
            wire.open()
        confirm(refusal_of_call(refused.value), Reason.TENANT_LIMIT)


def test_a_call_of_nobody_s_is_refused(tmp_path: Path) -> None:
    tenants = TenantsFile(tmp_path / "tenants.yaml")
    tenants.add("acme")
    with serving(**tenants.settings) as wire:
        with pytest.raises(grpc.RpcError) as refused:
            wire.open()
        confirm(refusal_of_call(refused.value), Reason.UNAUTHENTICATED)


def test_bytes_that_are_no_exported_session_are_refused(wire: Wire) -> None:
    with unharmed(wire), pytest.raises(grpc.RpcError) as refused:
        wire.stub.ImportSession(iter([v1.ImportSessionRequest(data=b"?")]), timeout=CALL_TIMEOUT_S)
    confirm(refusal_of_call(refused.value), Reason.SNAPSHOT_INVALID)


def test_every_reason_was_met(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword or "::" in "".join(request.config.args):
        pytest.skip("only a part of the module runs")
    assert {str(reason) for reason in Reason} == SEEN
