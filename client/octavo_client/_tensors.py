"""Arrays at the edge: numpy or torch in, wire bytes, and the same kind out.

Torch is never imported here: a caller who passes a torch tensor has imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from octavo.v1 import octavo_pb2 as pb
from octavo.v1.tensor_fields import TensorField

HostArray = NDArray[Any]
"""A float16, bfloat16 (ml_dtypes) or float32 array in this process's memory."""

ToCaller = Callable[[HostArray], Any]
"""Turns an answer into the kind of array that the caller passed in."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

WIRE_DTYPES: dict[np.dtype[Any], int] = {
    np.dtype("<f2"): pb.DATA_TYPE_FLOAT16,
    _BFLOAT16: pb.DATA_TYPE_BFLOAT16,
    np.dtype("<f4"): pb.DATA_TYPE_FLOAT32,
}
_HOST_DTYPES = {wire: host for host, wire in WIRE_DTYPES.items()}


def to_host(name: str, value: Any) -> HostArray:
    """Return a numpy array or torch tensor as a numpy array, without a copy where the memory is this process's.

    Raises:
        TypeError: It is neither, or not float16, bfloat16 or float32.
    """
    array = _from_torch(value) if _is_torch(value) else value
    if not isinstance(array, np.ndarray):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a numpy array or a torch tensor, got {kind}")
    if array.dtype not in WIRE_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {array.dtype}")
    return array


def num_rows(value: Any) -> int:
    """Return the extent of an array's first axis, or 1 of what has none and is refused later."""
    shape: Sequence[int] = getattr(value, "shape", ())
    return int(shape[0]) if shape else 1


def like(value: Any) -> ToCaller:
    """Return the function that turns a read-only numpy answer into `value`'s kind: numpy, or torch on its device."""
    if not _is_torch(value):
        return lambda array: array
    device = value.device
    return lambda array: _to_torch(array).to(device)


def check_shape(name: str, array: HostArray, shape: Sequence[int | str]) -> None:
    """Check an array's shape; a string in `shape` names an axis of any extent from 1 on.

    Raises:
        ValueError: It differs.
    """
    fits = len(array.shape) == len(shape) and all(
        extent >= 1 if isinstance(expected, str) else extent == expected
        for extent, expected in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected_text = ", ".join(str(expected) for expected in shape)
        raise ValueError(f"{name} must be [{expected_text}], got {list(array.shape)}")


def check_dtype(name: str, array: HostArray, expected: np.dtype[Any]) -> None:
    """Check that an array has the dtype of the others.

    Raises:
        TypeError: It differs.
    """
    if array.dtype != expected:
        raise TypeError(f"{name} must be {expected} like the others, got {array.dtype}")


def host_dtype(tensor: TensorField) -> np.dtype[Any]:
    """Return the dtype of a wire tensor.

    Raises:
        ValueError: There is none of its number.
    """
    dtype = _HOST_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"the server sent a tensor of unknown dtype {tensor.dtype}")
    return dtype


def from_wire(tensor: TensorField | None) -> HostArray:
    """Return a wire tensor as a read-only array over its message's bytes, or over a copy where those are not aligned.

    Raises:
        ValueError: It is not there, or its bytes, shape and dtype do not fit each other.
    """
    if tensor is None:
        raise ValueError("a tensor is missing")
    dtype = host_dtype(tensor)
    size = math.prod(tensor.shape)
    if tensor.num_bytes != size * dtype.itemsize:
        raise ValueError(f"{tensor.num_bytes} bytes are no {dtype} of shape {list(tensor.shape)}")
    array = np.frombuffer(tensor.message, dtype, size, tensor.start).reshape(tensor.shape)
    return array if array.flags.aligned else array.copy()


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_torch(tensor: Any) -> HostArray:
    torch = sys.modules["torch"]
    # Conjugation and negation may be pending bits of the tensor, which numpy does not know.
    host = tensor.detach().cpu().resolve_conj().resolve_neg()
    # numpy has no bfloat16 of its own, so torch cannot hand it over; its bits can.
    array: HostArray = (
        host.view(torch.int16).numpy().view(_BFLOAT16)
        if host.dtype == torch.bfloat16
        else host.numpy()
    )
    return array


def _to_torch(array: HostArray) -> Any:
    torch = sys.modules["torch"]
    # A copy, since torch tensors are writable and the answer's bytes are not.
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
