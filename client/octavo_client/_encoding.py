"""Messages with large tensors, put together without passing the tensors through protobuf.

A message is its fields one after the other, each with a tag and, for bytes and messages, a length
(protobuf.dev/programming-guides/encoding). So only the small fields are encoded by protobuf; the tensors are joined on.
Protobuf's own encoder grows its buffer while it copies, which took many times as long for a step of 64 sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from google.protobuf.message import Message

from octavo.v1 import octavo_pb2 as pb
from octavo_client._tensors import HostArray, wire_dtype

_LENGTH_DELIMITED = 2


def encode_tensors(arrays: Mapping[int, HostArray]) -> bytes:
    """Return arrays of any strides, by field number, as the encoded Tensor fields of a message; one copy."""
    parts: list[bytes | memoryview] = []
    for number, array in arrays.items():
        parts.append(_head(number, wire_dtype(array), array.shape, array.nbytes))
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return b"".join(parts)


def encode_region_tensors(arrays: Mapping[int, HostArray], offsets: Mapping[int, int]) -> bytes:
    """Return arrays that lie in a region, by field number, as the encoded Tensor fields of a message."""
    return b"".join(
        _in_region(number, wire_dtype(array), array.shape, offsets[number])
        for number, array in arrays.items()
    )


def encode_append(header: pb.AppendRequest, tensors: bytes) -> bytes:
    """Return a message of an Append call."""
    return _encode(header) + tensors


def encode_decode(header: pb.Step, tensors: bytes) -> bytes:
    """Return a message of a Decode stream."""
    step = _encode(header)
    return b"".join(
        [_prefix(pb.DecodeRequest.STEP_FIELD_NUMBER, len(step) + len(tensors)), step, tensors]
    )


@lru_cache(maxsize=256)
def _head(number: int, dtype: pb.DataType, shape: tuple[int, ...], num_bytes: int) -> bytes:
    """Return all of a Tensor field but its data, which comes last; decoding sends few shapes again and again."""
    rest = _encode(pb.Tensor(dtype=dtype, shape=shape))
    rest += _prefix(pb.Tensor.DATA_FIELD_NUMBER, num_bytes)
    return _prefix(number, len(rest) + num_bytes) + rest


@lru_cache(maxsize=256)
def _in_region(number: int, dtype: pb.DataType, shape: tuple[int, ...], offset: int) -> bytes:
    """Return a Tensor field; decoding sends few shapes at few offsets again and again."""
    tensor = _encode(pb.Tensor(dtype=dtype, shape=shape, region_offset=offset))
    return _prefix(number, len(tensor)) + tensor


def _encode(message: Message) -> bytes:
    return message.SerializeToString()


def _prefix(number: int, num_bytes: int) -> bytes:
    """Return the tag and length before the bytes of a field."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(num_bytes)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
