"""The benchmark's device, emulated on the CPU: its times mean nothing, its answers do."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.bench_library import sources
from tests.cuda.build import build_emulated

NOT_EMULATED = {"nominal_rate.cpp"}
"""It asks for what the emulated device does not have."""


_SIGNATURES = {
    "register": (ctypes.c_void_p, ctypes.c_size_t),
    "unregister": (ctypes.c_void_p,),
    "set_written": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
}


def emulated_library() -> Path:
    """Return the benchmark's library for the emulator, built unless it was before."""
    return build_emulated([path for path in sources() if path.name not in NOT_EMULATED])


class EmulatedDevice:
    """Implements `Device`.

    Args:
        path: From `emulated_library`.
        num_multiprocessors: What launches are planned for.
    """

    def __init__(self, path: Path, num_multiprocessors: int = 2) -> None:
        self.torch_device = torch.device("cpu")
        self.num_multiprocessors = num_multiprocessors
        self.l2_bytes, self.memory_bytes = 1 << 14, 1 << 26
        self._emulator = ctypes.CDLL(str(path))
        self._emulator.octavo_emulator_error.restype = ctypes.c_char_p
        for name, arguments in _SIGNATURES.items():
            getattr(self._emulator, f"octavo_emulator_{name}").argtypes = arguments
        count = ctypes.c_uint64(num_multiprocessors)
        self._emulator.octavo_emulator_set_device(b"num_multiprocessors", count)

    def stream(self) -> int:
        """Return the default stream."""
        return 0

    def time_us(self, enqueue: Callable[[], None]) -> float:
        """Return how long the emulator takes: all is done when it is asked for."""
        start_s = time.perf_counter()
        enqueue()
        return (time.perf_counter() - start_s) * 1e6

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Refuse."""
        raise RuntimeError("the emulator has no graphs")

    def adopt(self, tensor: torch.Tensor) -> None:
        """Register a tensor's memory, as written, for as long as the tensor lives."""
        address, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        assert self._emulator.octavo_emulator_register(address, num_bytes) == 0
        assert self._emulator.octavo_emulator_set_written(address, num_bytes, 1) == 0
        weakref.finalize(tensor, self._emulator.octavo_emulator_unregister, address)

    def synchronize(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""

    def take_fault(self) -> str:
        """Return the text of the fault that stopped a kernel, or nothing, and forget it."""
        text: bytes = self._emulator.octavo_emulator_error()
        decoded = text.decode()
        self._emulator.octavo_emulator_clear_error()
        return decoded
