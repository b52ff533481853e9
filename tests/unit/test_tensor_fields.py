"""Messages taken apart by hand: the same as protobuf finds in them, or left to protobuf."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from octavo.v1 import octavo_pb2 as pb
from octavo.v1 import tensor_fields
from octavo.v1.tensor_fields import TensorField, cut_tensors, only_field, tensor_of

TENSORS = frozenset([pb.Step.Q_FIELD_NUMBER, pb.Step.K_FIELD_NUMBER, pb.Step.V_FIELD_NUMBER])
STEP = pb.DecodeRequest.STEP_FIELD_NUMBER

tensors = st.builds(
    pb.Tensor,
    data=st.binary(max_size=400),
    dtype=st.sampled_from(pb.DataType.values()),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=5),
)
steps = st.builds(
    pb.Step,
    step_id=st.integers(0, 2**64 - 1),
    step_key=st.integers(0, 2**64 - 1),
    session_handles=st.lists(st.integers(0, 2**64 - 1), max_size=70),
    layers=st.lists(st.integers(0, 2**32 - 1), max_size=70),
    causal=st.booleans(),
    q=st.none() | tensors,
    k=st.none() | tensors,
    v=st.none() | tensors,
)


def content(tensor: TensorField) -> tuple[int, tuple[int, ...], bytes]:
    data = tensor.message[tensor.start : tensor.start + tensor.num_bytes]
    return tensor.dtype, tensor.shape, data


@given(steps, st.permutations(range(4)))
def test_a_step_is_what_protobuf_finds(step: pb.Step, order: list[int]) -> None:
    head = pb.Step.FromString(step.SerializeToString())
    pieces = []
    for name in "qkv":
        piece = pb.Step()
        if step.HasField(name):
            getattr(piece, name).CopyFrom(getattr(step, name))
        head.ClearField(name)
        pieces.append(piece.SerializeToString())
    pieces.append(head.SerializeToString())
    message = pb.DecodeRequest()
    message.step.MergeFromString(b"".join(pieces[idx] for idx in order))
    # An outer message keeps the order of protobuf; the inner order is tested on the inner message alone.
    data = message.SerializeToString()
    rest, found = cut_tensors(data, TENSORS, only_field(data, STEP))
    assert pb.Step.FromString(rest) == head
    inner = b"".join(pieces[idx] for idx in order)
    rest, found_inner = cut_tensors(inner, TENSORS)
    assert pb.Step.FromString(rest) == head
    for name in "qkv":
        number = pb.Step.DESCRIPTOR.fields_by_name[name].number
        expected = content(tensor_of(getattr(step, name))) if step.HasField(name) else None
        for tensors_found in (found, found_inner):
            actual = tensors_found.get(number)
            assert (actual and content(actual)) == expected


@given(steps, st.data())
def test_what_is_damaged_is_refused_or_read_as_protobuf_reads_it(
    step: pb.Step, data: st.DataObject
) -> None:
    message = bytearray(step.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        if message:
            message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(message[: data.draw(st.integers(0, len(message)))])
    try:
        rest, found = cut_tensors(damaged, TENSORS)
    except ValueError:
        return
    try:
        head = pb.Step.FromString(rest)
    except Exception:  # protobuf's own refusal
        return
    whole = pb.Step.FromString(damaged)
    for name in "qkv":
        number = pb.Step.DESCRIPTOR.fields_by_name[name].number
        assert (number in found) == whole.HasField(name)
        if number in found:
            assert content(found[number]) == content(tensor_of(getattr(whole, name)))
        whole.ClearField(name)
    assert head == whole


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "does not begin"),
        (b"\x12\x00", "does not begin"),
        (b"\x0a\x05\x08", "more than one"),
        (b"\x0a\x01\x08\x0a\x00", "more than one"),
        (b"\x0a\x80", "within a field"),
        (b"\x0a" + b"\xff" * 11, "more bytes"),
        (b"\x0a" + b"\x80" * 5 + b"\x00", "more bytes"),
    ],
)
def test_another_outer_message_is_left_to_protobuf(message: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        only_field(message, STEP)


def test_numbers_that_protobuf_finds_too_long_are_left_to_it() -> None:
    """A tag in six bytes: the number is that of q."""
    tensor = pb.Step(q=pb.Tensor(data=b"ab")).SerializeToString()
    message = bytes([tensor[0] | 0x80]) + b"\x80" * 4 + b"\x00" + tensor[1:]
    with pytest.raises(DecodeError):
        pb.Step.FromString(message)
    with pytest.raises(ValueError, match="more bytes"):
        cut_tensors(message, TENSORS)


def test_a_tensor_in_two_pieces_is_left_to_protobuf() -> None:
    piece = pb.Step(q=pb.Tensor(data=b"ab")).SerializeToString()
    with pytest.raises(ValueError, match="twice"):
        cut_tensors(piece + piece, TENSORS)


def test_large_fields_are_not_kept() -> None:
    known = tensor_fields._read_known_rest.cache_info().currsize
    for number in range(20):
        tensor = pb.Tensor(shape=[number] * 1000)
        cut_tensors(pb.Step(q=tensor).SerializeToString(), TENSORS)
    assert tensor_fields._read_known_rest.cache_info().currsize == known
