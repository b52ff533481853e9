"""The CUDA library's C ABI (csrc/include/octavo/cuda_api.h) in ctypes: structs, signatures, results as exceptions."""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from octavo_server.backends.base import RaggedBatch, UnsupportedError
from octavo_server.kernel_build import load_error_text

DATA_TYPES = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(ml_dtypes.bfloat16): 2,
}
"""octavo::DataType of each dtype."""

_INT32_P, _INT64_P, _FLOAT_P, _BOOL_P = (
    ctypes.POINTER(kind) for kind in (ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_bool)
)


class Result(enum.IntEnum):
    """octavo::cuda::Result."""

    DONE = 0
    INVALID = 1
    UNSUPPORTED = 2
    FAILED = 3


class DeviceError(Exception):
    """The GPU failed; nothing on it is to be trusted any more, and the process has to be started anew."""


class LayerStruct(ctypes.Structure):
    """octavo::PagedInt8Layer: device pointers."""

    _fields_ = (
        ("k_codes", ctypes.c_void_p),
        ("v_codes", ctypes.c_void_p),
        ("k_scales", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
    )


class CacheSpecStruct(ctypes.Structure):
    """octavo::cuda::CacheSpec."""

    _fields_ = (
        ("num_layers", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("num_q_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("is_deterministic", ctypes.c_int32),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("sm_scale", _FLOAT_P),
        ("soft_cap", _FLOAT_P),
        ("window", _INT32_P),
        ("sinks", _FLOAT_P),
    )


class BatchStruct(ctypes.Structure):
    """octavo::RaggedBatch."""

    _fields_ = (
        ("num_entries", ctypes.c_int32),
        ("max_num_blocks", ctypes.c_int32),
        ("layers", _INT32_P),
        ("start_pos", _INT32_P),
        ("token_starts", _INT32_P),
        ("kv_lens", _INT32_P),
        ("is_causal", _BOOL_P),
        ("block_tables", _INT32_P),
        ("slot_mapping", _INT64_P),
    )


class StepStruct(ctypes.Structure):
    """octavo::cuda::Step."""

    _fields_ = (
        ("batch", BatchStruct),
        ("dtype", ctypes.c_int32),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", _FLOAT_P),
        ("offences", _INT64_P),
    )


class PropertiesStruct(ctypes.Structure):
    """octavo::cuda::DeviceProperties."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("compute_major", ctypes.c_int32),
        ("compute_minor", ctypes.c_int32),
        ("num_multiprocessors", ctypes.c_int32),
        ("driver_version", ctypes.c_int32),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "octavo_cuda_open": (ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)),
    "octavo_cuda_properties": (ctypes.c_void_p, ctypes.POINTER(PropertiesStruct)),
    "octavo_cuda_free_bytes": (ctypes.c_void_p, _INT64_P),
    "octavo_cuda_make_cache": (
        ctypes.c_void_p,
        ctypes.POINTER(CacheSpecStruct),
        ctypes.POINTER(ctypes.c_void_p),
    ),
    "octavo_cuda_step": (ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(StepStruct)),
    "octavo_cuda_copy_blocks": (ctypes.c_void_p, ctypes.c_void_p, _INT64_P, ctypes.c_int64),
}
"""Arguments of the functions that return a Result."""


class CudaLibrary:
    """The loaded library.

    Args:
        path: The shared library.

    Raises:
        UnsupportedError: The system does not load it.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UnsupportedError(load_error_text("cuda", path, error)) from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int32
        for name in ("octavo_cuda_close", "octavo_cuda_free_cache"):
            function = getattr(self._library, name)
            function.argtypes, function.restype = (ctypes.c_void_p,), None
        self._library.octavo_cuda_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call octavo_cuda_<name>.

        Raises:
            ValueError: An argument is wrong.
            UnsupportedError: The device will not do, or is out of memory.
            DeviceError: The device failed.
        """
        result = getattr(self._library, f"octavo_cuda_{name}")(*arguments)
        if result != Result.DONE:
            self._raise(Result(result))

    def close(self, device: int) -> None:
        """Close a device."""
        self._library.octavo_cuda_close(device)

    def free_cache(self, cache: int) -> None:
        """Free a cache."""
        self._library.octavo_cuda_free_cache(cache)

    def _raise(self, result: Result) -> NoReturn:
        text = self._library.octavo_cuda_error().decode()
        if result == Result.INVALID:
            raise ValueError(text)
        if result == Result.UNSUPPORTED:
            raise UnsupportedError(text)
        raise DeviceError(text)


def batch_struct(batch: RaggedBatch) -> BatchStruct:
    """Return a batch's pointers; the batch is kept alive by the caller."""
    return BatchStruct(
        batch.num_entries,
        batch.block_tables.shape[1],
        pointer_to(batch.layers, _INT32_P),
        pointer_to(batch.start_pos, _INT32_P),
        pointer_to(batch.token_starts, _INT32_P),
        pointer_to(batch.kv_lens, _INT32_P),
        pointer_to(batch.is_causal, _BOOL_P),
        pointer_to(batch.block_tables, _INT32_P),
        pointer_to(batch.slot_mapping, _INT64_P),
    )


def pointer_to(array: NDArray[Any], kind: Any) -> Any:
    """Return a pointer of a ctypes pointer type to an array's memory, which must be contiguous."""
    assert array.flags.c_contiguous, "the library walks arrays row by row"
    return ctypes.cast(array.ctypes.data, kind)
