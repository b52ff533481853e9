"""The messages of the data calls, encoded and parsed without passing their tensors through protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from octavo.v1 import octavo_pb2 as pb
from octavo.v1 import tensor_fields
from octavo.v1.tensor_fields import TensorField
from octavo_client._tensors import WIRE_DTYPES, HostArray

_OUT, _LSE = pb.StepResult.OUT_FIELD_NUMBER, pb.StepResult.LSE_FIELD_NUMBER
_RESULT_TENSORS = frozenset([_OUT, _LSE])


Parts = list[bytes | memoryview]
"""What is to be joined into a message."""


class Result(NamedTuple):
    """An answer to a step, or to the request for a region.

    Attributes:
        head: The result; its own tensors are not to be looked at.
        out: The attention output, if there is one.
        lse: The log-sum-exp, if there is one.
        region: The answer to the request for a region; there is nothing else then.
    """

    head: pb.StepResult
    out: TensorField | None
    lse: TensorField | None
    region: pb.RegionResponse | None = None


def parse_response(message: bytes) -> Result:
    """Return the answer that a message of a Decode stream holds.

    Raises:
        DecodeError: It is none.
    """
    if len(message) < tensor_fields.WORTH_CUTTING_BYTES:
        response = pb.DecodeResponse.FromString(message)
        if response.HasField("region"):
            return Result(response.result, None, None, response.region)
        return result_of(response.result)
    try:
        span = tensor_fields.only_field(message, pb.DecodeResponse.RESULT_FIELD_NUMBER)
        rest, tensors = tensor_fields.cut_tensors(message, _RESULT_TENSORS, span)
        return Result(pb.StepResult.FromString(rest), tensors.get(_OUT), tensors.get(_LSE))
    except (ValueError, DecodeError):
        return result_of(pb.DecodeResponse.FromString(message).result)


def result_of(result: pb.StepResult) -> Result:
    """Return the answer that protobuf parsed."""
    out, lse = (
        tensor_fields.tensor_of(getattr(result, name)) if result.HasField(name) else None
        for name in ("out", "lse")
    )
    return Result(result, out, lse)


def encode_tensors(arrays: Mapping[int, HostArray]) -> Parts:
    """Return arrays of any strides, by field number, as Tensor fields of a message: parts over the arrays' memory."""
    contiguous = {number: np.ascontiguousarray(array) for number, array in arrays.items()}
    return tensor_fields.encode_tensors(contiguous, WIRE_DTYPES)


def encode_region_tensors(arrays: Mapping[int, HostArray], offsets: Mapping[int, int]) -> Parts:
    """Return arrays that lie in a region, by field number, as Tensor fields of a message."""
    return [
        _in_region(number, WIRE_DTYPES[array.dtype], array.shape, offsets[number])
        for number, array in arrays.items()
    ]


@lru_cache(maxsize=256)
def _in_region(number: int, dtype: pb.DataType, shape: tuple[int, ...], offset: int) -> bytes:
    """Return a Tensor field; decoding sends few shapes at few offsets again and again."""
    tensor = pb.Tensor(dtype=dtype, shape=shape, region_offset=offset)
    return b"".join(tensor_fields.encode_field(number, [tensor.SerializeToString()]))


def num_bytes(parts: Parts) -> int:
    """Return the size of what the parts are when joined."""
    return sum(map(len, parts))


def encode_append(header: pb.AppendRequest, tensors: Parts) -> bytes:
    """Return a message of an Append call."""
    return b"".join([header.SerializeToString(), *tensors])


def encode_decode(header: pb.Step, tensors: Parts) -> bytes:
    """Return a message of a Decode stream."""
    parts = [header.SerializeToString(), *tensors]
    return b"".join(tensor_fields.encode_field(pb.DecodeRequest.STEP_FIELD_NUMBER, parts))
