"""Between messages and the engine's values: parses bytes, views tensors, encodes answers."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from octavo import v1
from octavo_server.backends.base import HostArray
from octavo_server.engine import ModelPool, SessionState
from octavo_server.errors import Reason, mismatch
from octavo_server.shared_memory import IN_RESULT, AnswerPlace, Extent, Region, no_region
from octavo_server.status import to_status
from octavo_server.step import StepAnswer, StepRequest

DTYPES: dict[v1.DataType, np.dtype[Any]] = {
    v1.DATA_TYPE_FLOAT16: np.dtype(np.float16),
    v1.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    v1.DATA_TYPE_FLOAT32: np.dtype(np.float32),
}
_NUM_AXES = 3
_WIRE_DTYPES = {dtype: wire for wire, dtype in DTYPES.items()}

AnyMessage = TypeVar("AnyMessage", bound=Message)


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


def read_tensor(field: str, tensor: v1.Tensor, region: Region | None = None) -> HostArray:
    """Return a tensor as an array of 3 axes: over the one copy of its bytes that protobuf makes, or the region's.

    Raises:
        OctavoError: BAD_TENSOR.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        expected = "one of " + ", ".join(v1.DataType.Name(known) for known in DTYPES)
        raise mismatch(Reason.BAD_TENSOR, f"{field}.dtype", expected, tensor.dtype)
    shape = tuple(tensor.shape[:_NUM_AXES])
    if len(tensor.shape) != _NUM_AXES or 0 in shape:
        expected = "[num_tokens, num_heads, head_dim], each at least 1"
        actual = f"{len(tensor.shape)} axes, the first {list(shape)}"
        raise mismatch(Reason.BAD_TENSOR, f"{field}.shape", expected, actual)
    num_bytes = math.prod(shape) * dtype.itemsize
    data: Any = (
        _region_data(field, tensor, num_bytes, region)
        if tensor.HasField("region_offset")
        else tensor.data  # each access copies
    )
    if len(data) != num_bytes:
        expected = f"{num_bytes} bytes for {dtype} of shape {list(shape)}"
        raise mismatch(Reason.BAD_TENSOR, f"{field}.data", expected, f"{len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _region_data(
    field: str, tensor: v1.Tensor, num_bytes: int, region: Region | None
) -> NDArray[np.uint8]:
    if region is None:
        raise no_region(field, tensor.region_offset)
    if tensor.data:
        raise mismatch(Reason.BAD_TENSOR, f"{field}.data", "empty beside region_offset", "bytes")
    return region.read(Extent(field, tensor.region_offset, num_bytes))


def write_tensor(
    tensor: v1.Tensor, array: NDArray[Any], region: Region | None = None, offset: int | None = None
) -> None:
    """Fill in a tensor, whose elements go to a place of the region where there is one."""
    if region is None or offset is None:
        tensor.data = array.tobytes()
    else:
        region.write(offset, array)
        tensor.region_offset = offset
    tensor.dtype = _WIRE_DTYPES[array.dtype]
    tensor.shape.extend(array.shape)


def read_step(step: v1.Step, region: Region | None = None) -> StepRequest:
    """Return the request that a Step asks for, on a stream that may have a region.

    Raises:
        OctavoError: BAD_TENSOR, or SHAPE_MISMATCH when q is missing.
    """
    if not step.HasField("q") and step.session_handles:
        raise mismatch(
            Reason.SHAPE_MISMATCH, "q", "[total_tokens, num_q_heads, head_dim]", "nothing"
        )
    tensors = {
        name: read_tensor(name, getattr(step, name), region)
        for name in "qkv"
        if step.HasField(name)
    }
    return StepRequest(
        handles=list(step.session_handles),
        layers=list(step.layers),
        start_pos=list(step.start_pos),
        num_tokens=list(step.num_tokens),
        step_key=step.step_key,
        timeout_ms=step.timeout_ms,
        return_lse=step.return_lse,
        is_causal=step.causal if step.HasField("causal") else True,
        **tensors,
    )


def read_append(message: v1.AppendRequest) -> StepRequest:
    """Return the one-entry request without q that a message of an Append call asks for.

    Raises:
        OctavoError: BAD_TENSOR.
    """
    return StepRequest(
        handles=[message.session_handle],
        layers=[message.layer],
        start_pos=[message.start_pos],
        num_tokens=[message.num_tokens],
        step_key=message.step_key,
        k=read_tensor("k", message.k),
        v=read_tensor("v", message.v),
    )


def encode_region(response: v1.RegionResponse) -> bytes:
    """Return a DecodeResponse."""
    return v1.DecodeResponse(region=response).SerializeToString()


def encode_answer(step_id: int, answer: StepAnswer, place: AnswerPlace = IN_RESULT) -> bytes:
    """Return a DecodeResponse."""
    response = v1.DecodeResponse()
    write_answer(response.result, step_id, answer, place)
    return response.SerializeToString()


def write_answer(
    result: v1.StepResult, step_id: int, answer: StepAnswer, place: AnswerPlace = IN_RESULT
) -> None:
    """Fill in the result of a step; its tensors go where the client asked for them."""
    result.step_id = step_id
    if answer.error is not None:
        result.error.CopyFrom(to_status(answer.error))
    if answer.out is not None:
        write_tensor(result.out, answer.out, place.region, place.out)
    if answer.lse is not None:
        write_tensor(result.lse, answer.lse, place.region, place.lse)
    for entry_idx, error in sorted(answer.entry_errors.items()):
        result.entry_errors.add(entry_idx=entry_idx, error=to_status(error))


def write_session(state: SessionState) -> v1.Session:
    """Return a session as a message."""
    return v1.Session(
        session_id=state.session_id,
        session_handle=state.handle,
        model=state.model,
        lengths=state.lengths,
        num_blocks=state.num_blocks,
    )


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
