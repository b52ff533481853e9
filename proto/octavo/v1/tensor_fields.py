"""Messages with large tensors, put together and taken apart without passing the tensors through protobuf.

A message is its fields one after the other, each with a tag and, for bytes and messages, a length
(protobuf.dev/programming-guides/encoding). So only the small fields need protobuf; the tensors are joined on, and found
by their place. Protobuf's own encoder grows its buffer while it copies, and its decoder copies twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from octavo.v1 import octavo_pb2 as pb

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
"""Wire types; the others are groups, which nothing of ours has."""

_DATA = frozenset([pb.Tensor.DATA_FIELD_NUMBER])

WORTH_CUTTING_BYTES = 1 << 16
"""Size from which a message is parsed faster this way; measured, at steps of 4 to 8 sessions of 12 KiB each."""

Span = tuple[int, int]
"""Where in a message something begins and ends."""


class TensorField(NamedTuple):
    """A tensor in a message.

    Attributes:
        dtype: Of its elements, as the message says; may be none that there is.
        shape: As the message says; may not fit the data.
        message: Bytes that hold the data.
        start: Where in them the data begins.
        num_bytes: Size of the data.
        region_offset: Where in the stream's region the elements are instead, or None.
    """

    dtype: int
    shape: tuple[int, ...]
    message: bytes
    start: int
    num_bytes: int
    region_offset: int | None = None


def tensor_of(tensor: pb.Tensor) -> TensorField:
    """Return the tensor that protobuf parsed."""
    data = tensor.data  # each access copies
    offset = tensor.region_offset if tensor.HasField("region_offset") else None
    return TensorField(tensor.dtype, tuple(tensor.shape), data, 0, len(data), offset)


def cut_tensors(
    message: bytes, numbers: frozenset[int], span: Span | None = None
) -> tuple[bytes, dict[int, TensorField]]:
    """Take a message apart.

    Args:
        message: Encoded, not yet known to be well formed.
        numbers: Fields of it that are tensors.
        span: The part of `message` that is meant; all by default.

    Returns:
        The message without its tensors, for protobuf to parse; and those tensors, over the message's bytes.

    Raises:
        ValueError: It is malformed, or formed in a way that is left to protobuf, such as a tensor in two pieces.
    """
    try:
        rest, spans = _cut(message, numbers, span or (0, len(message)))
        return rest, {number: _tensor(message, found) for number, found in spans.items()}
    except IndexError:
        raise ValueError("the message ends within a field") from None


def only_field(message: bytes, number: int) -> Span:
    """Return where the value of a message's only field is.

    Raises:
        ValueError: It has others, or is malformed.
    """
    if not message or message[0] != number << 3 | _LENGTH_DELIMITED:
        raise ValueError(f"the message does not begin with field {number}")
    try:
        size, start = _read_varint(message, 1, _MAX_SIZE_BITS)
    except IndexError:
        raise ValueError("the message ends within a field") from None
    if start + size != len(message):
        raise ValueError("the message has more than one field")
    return start, start + size


def _tensor(message: bytes, span: Span) -> TensorField:
    rest, spans = _cut(message, _DATA, span)
    field = _read_known_rest(rest) if len(rest) <= _MAX_KNOWN_BYTES else _read_rest(rest)
    start, end = spans.get(pb.Tensor.DATA_FIELD_NUMBER, (0, 0))
    return field._replace(message=message, start=start, num_bytes=end - start)


def _read_rest(rest: bytes) -> TensorField:
    """Return a Tensor field that is without its data."""
    try:
        return tensor_of(pb.Tensor.FromString(rest))
    except Exception as error:
        raise ValueError("not a tensor") from error


_MAX_KNOWN_BYTES = 64
"""Of what is kept; whoever sends more is not to fill our memory with it."""

_read_known_rest = lru_cache(maxsize=256)(_read_rest)
"""Decoding sees few of them again and again."""


def _cut(message: bytes, numbers: frozenset[int], span: Span) -> tuple[bytes, dict[int, Span]]:
    idx, end = span
    kept_from = idx
    kept: list[bytes] = []
    found: dict[int, Span] = {}
    while idx < end:
        first = idx
        tag, idx = _read_varint(message, idx, _MAX_SIZE_BITS)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            size, start = _read_varint(message, idx, _MAX_SIZE_BITS)
            idx = start + size
            number = tag >> 3
            if number in numbers:
                if number in found:
                    raise ValueError(f"field {number} is there twice")
                found[number] = start, idx
                kept.append(message[kept_from:first])
                kept_from = idx
        elif wire_type == _VARINT:
            _, idx = _read_varint(message, idx)
        elif wire_type in (_FIXED64, _FIXED32):
            idx += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError("groups are left to protobuf")
    if idx != end:
        raise ValueError("the message ends within a field")
    kept.append(message[kept_from:end])
    return b"".join(kept), found


_MAX_VARINT_BITS = 63
_MAX_SIZE_BITS = 28
"""Tags and sizes take at most five bytes; protobuf refuses longer ones, also where the number itself is small."""


def _read_varint(message: bytes, idx: int, max_bits: int = _MAX_VARINT_BITS) -> tuple[int, int]:
    """Return a number, whose last byte adds bits from `max_bits` on at most, and where it ends."""
    byte = message[idx]
    if byte < 0x80:
        return byte, idx + 1
    value, shift = byte & 0x7F, 7
    while shift <= max_bits:
        idx += 1
        byte = message[idx]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, idx + 1
        shift += 7
    raise ValueError("a number of more bytes than it may have")


def encode_tensors(
    arrays: Mapping[int, Any], dtypes: Mapping[Any, int]
) -> list[bytes | memoryview]:
    """Return the parts, to be joined, that are C-contiguous arrays as encoded Tensor fields.

    Args:
        arrays: numpy arrays by field number.
        dtypes: The wire's dtype by numpy's.
    """
    parts: list[bytes | memoryview] = []
    for number, array in arrays.items():
        parts.append(_head(number, dtypes[array.dtype], array.shape, array.nbytes))
        parts.append(array.reshape(-1).view("B").data)
    return parts


def encode_field(number: int, parts: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the parts of a field that holds a message, from the message's parts."""
    inner = list(parts)
    return [_prefix(number, sum(map(len, inner))), *inner]


@lru_cache(maxsize=256)
def _head(number: int, dtype: int, shape: tuple[int, ...], num_bytes: int) -> bytes:
    """Return all of a Tensor field but its data, which comes last; decoding sends few shapes again and again."""
    rest = pb.Tensor(dtype=pb.DataType.Name(dtype), shape=shape).SerializeToString()
    rest += _prefix(pb.Tensor.DATA_FIELD_NUMBER, num_bytes)
    return _prefix(number, len(rest) + num_bytes) + rest


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
