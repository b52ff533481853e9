"""What is fuzzed of messages: the parsers between bytes and the engine. Each target takes any bytes.

Only OctavoError may leave a parser. What it accepts is held against protobuf's own parser, and against what the code
behind relies on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from octavo import v1
from octavo.v1.tensor_fields import TensorField, cut_tensors, only_field, tensor_of
from octavo_server import codec
from octavo_server.errors import OctavoError
from octavo_server.session import SessionOptions
from octavo_server.step import StepRequest

_STEP_TENSORS = {
    "q": v1.Step.Q_FIELD_NUMBER,
    "k": v1.Step.K_FIELD_NUMBER,
    "v": v1.Step.V_FIELD_NUMBER,
}
_APPEND_TENSORS = {
    "k": v1.AppendRequest.K_FIELD_NUMBER,
    "v": v1.AppendRequest.V_FIELD_NUMBER,
}

REQUESTS: tuple[type[Message], ...] = tuple(
    GetMessageClass(method.input_type)
    for method in v1.DESCRIPTOR.services_by_name["OctavoService"].methods
)


def fuzz_step(data: bytes) -> None:
    """A DecodeRequest, parsed and read."""
    try:
        if codec.asks_for_region(data):
            return
        step, tensors = codec.parse_step(data)
        request = codec.read_step(step, tensors)
    except OctavoError:
        return
    check_request(request, data)


def fuzz_append(data: bytes) -> None:
    """An AppendRequest, parsed and read."""
    try:
        request = codec.read_append(data)
    except OctavoError:
        return
    check_request(request, data)


def fuzz_step_fields(data: bytes) -> None:
    """The fast parser of steps beside protobuf's, also where messages are too small to be worth it."""
    try:
        span = only_field(data, v1.DecodeRequest.STEP_FIELD_NUMBER)
        rest, tensors = cut_tensors(data, frozenset(_STEP_TENSORS.values()), span)
        step = v1.Step.FromString(rest)
    except (ValueError, DecodeError):
        return  # left to protobuf
    whole = v1.DecodeRequest.FromString(data).step
    check_same(step, tensors, whole, _STEP_TENSORS)


def fuzz_append_fields(data: bytes) -> None:
    """The fast parser of appends beside protobuf's."""
    try:
        rest, tensors = cut_tensors(data, frozenset(_APPEND_TENSORS.values()))
        message = v1.AppendRequest.FromString(rest)
    except (ValueError, DecodeError):
        return
    check_same(message, tensors, v1.AppendRequest.FromString(data), _APPEND_TENSORS)


def fuzz_requests(data: bytes) -> None:
    """Every request, and the options of those that open sessions."""
    for message_type in REQUESTS:
        try:
            request: Any = codec.parse(message_type, data)
        except OctavoError:
            continue
        assert type(request).FromString(request.SerializeToString()) == request
        if isinstance(request, v1.OpenSessionRequest | v1.ImportSessionRequest):
            _fuzz_options(request)


def check_request(request: StepRequest, data: bytes) -> None:
    """Check what the engine relies on: tensors of three axes, none empty, no larger than the message."""
    for array in (request.q, request.k, request.v):
        if array is None:
            continue
        assert array.ndim == 3, f"a tensor has shape {array.shape}"
        assert min(array.shape) >= 1, f"a tensor has shape {array.shape}"
        assert array.nbytes <= len(data), f"{array.nbytes} bytes came out of {len(data)}"
        assert array.flags.aligned, "an array is not aligned"


def check_same(
    fast: Any, tensors: Mapping[int, TensorField], whole: Any, fields: Mapping[str, int]
) -> None:
    """Check that a message that was cut apart is the one that protobuf parsed."""
    for name, number in fields.items():
        assert (number in tensors) == whole.HasField(name), f"{name} is there for one parser alone"
        if number in tensors:
            mine, theirs = tensors[number], tensor_of(getattr(whole, name))
            assert _values_of(mine) == _values_of(theirs), f"{name}: {mine} is not {theirs}"
            whole.ClearField(name)
    # Unknown fields stand in another order; known ones must be the same.
    fast.DiscardUnknownFields()
    whole.DiscardUnknownFields()
    assert fast == whole, f"{fast} is not {whole}"


def _values_of(tensor: TensorField) -> tuple[object, ...]:
    data = tensor.message[tensor.start : tensor.start + tensor.num_bytes]
    return tensor.dtype, tensor.shape, data, tensor.num_bytes, tensor.region_offset


def _fuzz_options(request: v1.OpenSessionRequest | v1.ImportSessionRequest) -> None:
    try:
        options: SessionOptions = codec.read_options(request)
    except OctavoError:
        return
    assert 0 <= options.lease_s < math.inf
    assert 0 <= options.reserve_tokens < 2**32
