"""Between messages and the engine's values: parses bytes, views tensors, encodes answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from octavo import v1
from octavo.v1.tensor_fields import (
    WORTH_CUTTING_BYTES,
    TensorField,
    cut_tensors,
    encode_field,
    encode_tensors,
    only_field,
    tensor_of,
)
from octavo_server.backends.base import HostArray
from octavo_server.errors import OctavoError, Reason, mismatch
from octavo_server.model_pool import ModelPool
from octavo_server.session import SessionOptions, SessionState
from octavo_server.shared_memory import (
    IN_RESULT,
    AnswerPlace,
    Extent,
    Region,
    answer_place,
    no_region,
)
from octavo_server.stats import ServerStats
from octavo_server.status import to_status
from octavo_server.step import StepAnswer, StepRequest

DTYPES: dict[int, np.dtype[Any]] = {
    v1.DATA_TYPE_FLOAT16: np.dtype(np.float16),
    v1.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    v1.DATA_TYPE_FLOAT32: np.dtype(np.float32),
}
_NUM_AXES = 3
_REGION_TAG = bytes([v1.DecodeRequest.REGION_FIELD_NUMBER << 3 | 2])
"""How a DecodeRequest begins that asks for a region: the field's number, and that it has a length."""

_WIRE_DTYPES = {dtype: wire for wire, dtype in DTYPES.items()}
_STEP_FIELDS = (
    ("q", v1.Step.Q_FIELD_NUMBER),
    ("k", v1.Step.K_FIELD_NUMBER),
    ("v", v1.Step.V_FIELD_NUMBER),
)
_STEP_TENSORS = frozenset(number for _, number in _STEP_FIELDS)
_APPEND_TENSORS = frozenset([v1.AppendRequest.K_FIELD_NUMBER, v1.AppendRequest.V_FIELD_NUMBER])

Tensors = Mapping[int, TensorField]
"""Tensors of a message by field number."""

AnyMessage = TypeVar("AnyMessage", bound=Message)

MAX_REQUEST_ID_LEN = 128
"""Characters; a client draws 32 of them."""


def parse(message_type: type[AnyMessage], data: bytes) -> AnyMessage:
    """Parse a message.

    Raises:
        OctavoError: MALFORMED_MESSAGE.
    """
    try:
        return message_type.FromString(data)
    except DecodeError:
        expected, actual = message_type.DESCRIPTOR.full_name, f"{len(data)} bytes that are none"
        raise mismatch(Reason.MALFORMED_MESSAGE, "message", expected, actual) from None


def asks_for_region(data: bytes) -> bool:
    """Whether a DecodeRequest asks for a region, rather than bringing a step.

    Raises:
        OctavoError: MALFORMED_MESSAGE.
    """
    return data[:1] == _REGION_TAG and parse(v1.DecodeRequest, data).HasField("region")


def parse_step(data: bytes) -> tuple[v1.Step, Tensors]:
    """Parse the step of a DecodeRequest.

    Returns:
        The step, and its tensors by field number, which its fields may lack.

    Raises:
        OctavoError: MALFORMED_MESSAGE.
    """
    if len(data) < WORTH_CUTTING_BYTES:
        return _parse_whole_step(data)
    try:
        span = only_field(data, v1.DecodeRequest.STEP_FIELD_NUMBER)
        rest, tensors = cut_tensors(data, _STEP_TENSORS, span)
        return v1.Step.FromString(rest), tensors
    except (ValueError, DecodeError):
        return _parse_whole_step(data)


def _parse_whole_step(data: bytes) -> tuple[v1.Step, Tensors]:
    step = parse(v1.DecodeRequest, data).step
    return step, step_tensors(step)


def step_tensors(step: v1.Step) -> Tensors:
    """Return the tensors of a step that protobuf parsed, by field number."""
    return {
        number: tensor_of(getattr(step, name))
        for name, number in _STEP_FIELDS
        if step.HasField(name)
    }


def read_tensor(field: str, tensor: TensorField, region: Region | None = None) -> HostArray:
    """Return a tensor as an array of 3 axes: over the message's bytes; a copy if those are not aligned, or in a region.

    Raises:
        OctavoError: BAD_TENSOR.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        expected = "one of " + ", ".join(v1.DataType.Name(known) for known in DTYPES)
        raise mismatch(Reason.BAD_TENSOR, f"{field}.dtype", expected, tensor.dtype)
    shape = tensor.shape
    if len(shape) != _NUM_AXES or 0 in shape:
        expected = "[num_tokens, num_heads, head_dim], each at least 1"
        actual = f"{len(shape)} axes, the first {list(shape[:_NUM_AXES])}"
        raise mismatch(Reason.BAD_TENSOR, f"{field}.shape", expected, actual)
    size = math.prod(shape)
    if tensor.region_offset is not None:
        data = _region_data(field, tensor, size * dtype.itemsize, region)
        placed: HostArray = data.view(dtype).reshape(shape)
        return placed
    if tensor.num_bytes != size * dtype.itemsize:
        expected = f"{size * dtype.itemsize} bytes for {dtype} of shape {list(shape)}"
        raise mismatch(Reason.BAD_TENSOR, f"{field}.data", expected, f"{tensor.num_bytes} bytes")
    array = np.frombuffer(tensor.message, dtype, size, tensor.start).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _region_data(
    field: str, tensor: TensorField, num_bytes: int, region: Region | None
) -> NDArray[np.uint8]:
    assert tensor.region_offset is not None
    if region is None:
        raise no_region(field, tensor.region_offset)
    if tensor.num_bytes:
        actual = f"{tensor.num_bytes} bytes"
        raise mismatch(Reason.BAD_TENSOR, f"{field}.data", "empty beside region_offset", actual)
    return region.read(Extent(field, tensor.region_offset, num_bytes))


def read_place(
    step: v1.Step, tensors: Tensors, request: StepRequest, region: Region | None
) -> AnswerPlace:
    """Return where the answer to a step goes that was read.

    Raises:
        OctavoError: BAD_TENSOR.
    """
    if not (step.HasField("out_region_offset") or step.HasField("lse_region_offset")):
        return IN_RESULT
    offsets = {
        name: tensors[number].region_offset for name, number in _STEP_FIELDS if number in tensors
    }
    return answer_place(step, request.tensors, offsets, region)


def read_step(step: v1.Step, tensors: Tensors, region: Region | None = None) -> StepRequest:
    """Return the request that a Step asks for, on a stream that may have a region.

    Args:
        step: The step; its own tensors are not looked at.
        tensors: Its tensors by field number.

    Raises:
        OctavoError: BAD_TENSOR, or SHAPE_MISMATCH when q is missing.
    """
    handles = list(step.session_handles)
    if v1.Step.Q_FIELD_NUMBER not in tensors and handles:
        raise mismatch(
            Reason.SHAPE_MISMATCH, "q", "[total_tokens, num_q_heads, head_dim]", "nothing"
        )
    arrays = {
        name: read_tensor(name, tensors[number], region)
        for name, number in _STEP_FIELDS
        if number in tensors
    }
    return StepRequest(
        handles=handles,
        layers=list(step.layers),
        start_pos=list(step.start_pos),
        num_tokens=list(step.num_tokens),
        step_key=step.step_key,
        timeout_ms=step.timeout_ms,
        return_lse=step.return_lse,
        is_causal=step.causal if step.HasField("causal") else True,
        return_stage_times=step.return_stage_times,
        **arrays,
    )


def read_append(data: bytes) -> StepRequest:
    """Return the one-entry request without q that a message of an Append call asks for.

    Raises:
        OctavoError: MALFORMED_MESSAGE or BAD_TENSOR.
    """
    try:
        rest, tensors = cut_tensors(data, _APPEND_TENSORS)
        message = v1.AppendRequest.FromString(rest)
    except (ValueError, DecodeError):
        message = parse(v1.AppendRequest, data)
        tensors = {}
    k = tensors.get(v1.AppendRequest.K_FIELD_NUMBER) or tensor_of(message.k)
    v = tensors.get(v1.AppendRequest.V_FIELD_NUMBER) or tensor_of(message.v)
    return StepRequest(
        handles=[message.session_handle],
        layers=[message.layer],
        start_pos=[message.start_pos],
        num_tokens=[message.num_tokens],
        step_key=message.step_key,
        k=read_tensor("k", k),
        v=read_tensor("v", v),
    )


def encode_region(response: v1.RegionResponse) -> bytes:
    """Return the DecodeResponse that answers the request for a region."""
    return v1.DecodeResponse(region=response).SerializeToString()


def encode_response(step_id: int, answer: StepAnswer, place: AnswerPlace = IN_RESULT) -> bytes:
    """Return the DecodeResponse that answers a step; its tensors go where the client asked for them."""
    parts = _result_parts(step_id, answer, place)
    return b"".join(encode_field(v1.DecodeResponse.RESULT_FIELD_NUMBER, parts))


def write_result(step_id: int, answer: StepAnswer) -> v1.StepResult:
    """Return the result of a step as a message."""
    return v1.StepResult.FromString(b"".join(_result_parts(step_id, answer, IN_RESULT)))


def _result_parts(step_id: int, answer: StepAnswer, place: AnswerPlace) -> list[bytes | memoryview]:
    head = v1.StepResult(step_id=step_id)
    if answer.error is not None:
        head.error.CopyFrom(to_status(answer.error))
    for entry_idx, error in sorted(answer.entry_errors.items()):
        head.entry_errors.add(entry_idx=entry_idx, error=to_status(error))
    if answer.stage_times is not None:
        head.stage_times.CopyFrom(v1.StageTimes(**answer.stage_times._asdict()))
    arrays = {}
    for name, number, array in (
        ("out", v1.StepResult.OUT_FIELD_NUMBER, answer.out),
        ("lse", v1.StepResult.LSE_FIELD_NUMBER, answer.lse),
    ):
        if array is None:
            continue
        offset = place.write(name, array)
        if offset is None:
            arrays[number] = array
        else:
            tensor = getattr(head, name)
            tensor.dtype, tensor.region_offset = _WIRE_DTYPES[array.dtype], offset
            tensor.shape.extend(array.shape)
    return [head.SerializeToString(), *encode_tensors(arrays, _WIRE_DTYPES)]


def write_session(state: SessionState) -> v1.Session:
    """Return a session as a message."""
    return v1.Session(
        session_id=state.session_id,
        session_handle=state.handle,
        model=state.model,
        lengths=state.lengths,
        num_blocks=state.num_blocks,
        lease_ms=state.options.lease_ms,
        lease_remaining_ms=round(state.lease_remaining_s * 1000),
        disconnect_policy=(
            v1.DISCONNECT_POLICY_CLOSE
            if state.options.closes_on_disconnect
            else v1.DISCONNECT_POLICY_KEEP
        ),
        reserved_tokens=state.options.reserve_tokens,
    )


def check_request_id(request_id: str) -> None:
    """Check the length of a request_id.

    Raises:
        OctavoError: MALFORMED_MESSAGE.
    """
    if len(request_id) > MAX_REQUEST_ID_LEN:
        expected = f"at most {MAX_REQUEST_ID_LEN} characters"
        actual = f"{len(request_id)} characters"
        raise mismatch(Reason.MALFORMED_MESSAGE, "request_id", expected, actual)


def read_options(request: v1.OpenSessionRequest | v1.ImportSessionRequest) -> SessionOptions:
    """Return what a client asks for a session; a lease of 0 s where it leaves that to the server.

    Raises:
        OctavoError: MALFORMED_MESSAGE.
    """
    policy = request.disconnect_policy
    if policy not in v1.DisconnectPolicy.values():
        raise mismatch(
            Reason.MALFORMED_MESSAGE, "disconnect_policy", "one of DisconnectPolicy", policy
        )
    return SessionOptions(
        lease_s=request.lease_ms / 1000,
        closes_on_disconnect=policy == v1.DISCONNECT_POLICY_CLOSE,
        reserve_tokens=request.reserve_tokens,
    )


def write_lease(session_id: str, renewed: SessionState | OctavoError) -> v1.Lease:
    """Return what became of a session's lease."""
    if isinstance(renewed, OctavoError):
        return v1.Lease(session_id=session_id, error=to_status(renewed))
    return v1.Lease(session_id=session_id, remaining_ms=round(renewed.lease_remaining_s * 1000))


def write_model(pool: ModelPool) -> v1.Model:
    """Return a served model as a message."""
    spec = pool.spec
    return v1.Model(
        name=spec.name,
        num_layers=spec.num_layers,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=spec.block_size,
        max_context=spec.max_context,
        num_blocks=pool.blocks.num_blocks,
        num_free_blocks=pool.blocks.num_free,
        sm_scale=spec.sm_scale,
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=[] if spec.sinks is None else spec.sinks.ravel().tolist(),
        deterministic=spec.deterministic,
    )


def write_stats(stats: ServerStats) -> v1.ServerStatsResponse:
    """Return a server's totals as a message."""
    engine = stats.engine
    return v1.ServerStatsResponse(
        num_steps=engine.num_steps,
        num_appended_tokens=engine.num_appended_tokens,
        launches=[v1.LaunchStats(**launch._asdict()) for launch in engine.launches],
        received_bytes=stats.received_bytes,
        sent_bytes=stats.sent_bytes,
        refusals=stats.refusals,
        num_queued=engine.num_queued,
        max_queued_steps=engine.max_queued_steps,
        num_sessions=engine.num_sessions,
        num_opened_sessions=engine.num_opened_sessions,
        num_expired_sessions=engine.num_expired_sessions,
        num_streams=stats.num_streams,
        max_streams=stats.max_streams,
        pools=[v1.PoolStats(**pool._asdict()) for pool in engine.pools],
        device_free_bytes=engine.device_free_bytes,
        uptime_s=stats.uptime_s,
    )
