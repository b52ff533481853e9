"""Arrays to the wire and back: numpy and torch, every dtype, any strides."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.v1 import octavo_pb2 as pb
from octavo.v1 import tensor_fields
from octavo_client import _tensors
from octavo_client._encoding import encode_append, encode_decode, encode_tensors

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
TORCH_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def through_the_wire(value: Any) -> Any:
    encoded = encode_tensors({pb.StepResult.OUT_FIELD_NUMBER: _tensors.to_host("q", value)})
    received = pb.StepResult.FromString(b"".join(encoded))
    return _tensors.like(value)(_tensors.from_wire(tensor_fields.tensor_of(received.out)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_in_numpy_out(dtype: Any) -> None:
    array = np.arange(24, dtype=np.float32).astype(dtype).reshape(2, 3, 4)
    out = through_the_wire(array)
    assert (type(out), out.dtype) == (np.ndarray, array.dtype)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_in_torch_out(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype).requires_grad_()
    out = through_the_wire(tensor)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    assert torch.equal(out, tensor)
    out.add_(1)  # its memory is its own, and writable


def test_torch_with_pending_bits() -> None:
    negative = torch.tensor([1.0 + 2.0j]).conj().imag
    assert negative.is_neg()
    np.testing.assert_array_equal(_tensors.to_host("q", negative), [-2.0])


@pytest.mark.parametrize("value", [np.zeros((4, 3), np.float16), torch.zeros(4, 3)])
def test_any_strides_are_taken(value: Any) -> None:
    value[1, 2] = 5
    out = through_the_wire(value.T[:, ::2])
    assert tuple(out.shape) == (3, 2)
    out = through_the_wire(value.T[:, 1::2])
    assert out[2, 0] == 5


def test_wire_bytes_are_little_endian_and_row_major() -> None:
    encoded = encode_tensors({pb.Step.Q_FIELD_NUMBER: np.array([[1.0, 2.0]], np.float16)})
    tensor = pb.Step.FromString(b"".join(encoded)).q
    assert tensor.data == bytes([0x00, 0x3C, 0x00, 0x40])
    assert (tensor.dtype, list(tensor.shape)) == (pb.DATA_TYPE_FLOAT16, [1, 2])


@given(num_q=st.integers(1, 3000), num_kv=st.integers(1, 3000), step_id=st.integers(1, 2**64 - 1))
def test_messages_are_what_protobuf_would_encode(num_q: int, num_kv: int, step_id: int) -> None:
    q, k = np.full((num_q, 2), 7, np.float16), np.full((num_kv,), 9, np.float16)
    header = pb.Step(step_id=step_id, layers=[1, 2])
    encoded = encode_decode(
        header, encode_tensors({pb.Step.Q_FIELD_NUMBER: q, pb.Step.K_FIELD_NUMBER: k})
    )
    header.q.MergeFrom(tensor_of(q))
    header.k.MergeFrom(tensor_of(k))
    assert pb.DecodeRequest.FromString(encoded) == pb.DecodeRequest(step=header)
    append = pb.AppendRequest(layer=3)
    encoded = encode_append(append, encode_tensors({pb.AppendRequest.K_FIELD_NUMBER: k}))
    append.k.MergeFrom(tensor_of(k))
    assert pb.AppendRequest.FromString(encoded) == append


def tensor_of(array: Any) -> pb.Tensor:
    return pb.Tensor(data=array.tobytes(), dtype=pb.DATA_TYPE_FLOAT16, shape=array.shape)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.zeros(3), "k must be float16, bfloat16 or float32, got float64"),
        (np.zeros(3, ">f4"), "k must be float16, bfloat16 or float32, got >f4"),
        (torch.zeros(3, dtype=torch.int8), "k must be float16, bfloat16 or float32, got int8"),
        ([1.0], "k must be a numpy array or a torch tensor, got list"),
    ],
)
def test_other_kinds_are_refused(value: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=f"^{expected}$"):
        _tensors.to_host("k", value)


@pytest.mark.parametrize("shape", [(2, 8, 16), (2, 4, 8), (4, 8), (0, 4, 8)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.float16)
    if shape == (2, 4, 8):
        _tensors.check_shape("k", array, ("num_tokens", 4, 8))
        return
    with pytest.raises(ValueError, match=r"k must be \[num_tokens, 4, 8\], got \["):
        _tensors.check_shape("k", array, ("num_tokens", 4, 8))


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(data=b"abc", dtype=pb.DATA_TYPE_BFLOAT16, shape=[1]),
        pb.Tensor(data=b"ab", shape=[1]),
    ],
)
def test_nonsense_from_the_server_is_seen(tensor: pb.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tensor|are no"):
        _tensors.from_wire(tensor_fields.tensor_of(tensor))
