"""The cuda backend on the emulator: the kernels' own source, run on the CPU, with every access checked."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from octavo_server.backends.base import (
    HostArray,
    PagedInt8Cache,
    PagedInt8Layer,
    RaggedBatch,
    StepOutput,
)
from octavo_server.backends.cuda import CudaBackend
from octavo_server.backends.cuda_library import CudaLibrary, DeviceError
from octavo_server.model import ModelSpec
from tests.cuda.build import open_emulated

SHUFFLED = 7
"""Seed of the order in which blocks and threads take turns."""


MEMORY_BYTES = 4 * 2**30
"""Of the device, by its own account."""


class Emulator:
    """The emulated device of one library.

    Args:
        path: The kernels, the host code and the emulator in one library.
    """

    def __init__(self, path: Path) -> None:
        self._library = open_emulated(path)

    def register(self, pool: torch.Tensor) -> None:
        """Make a tensor's memory known as the device's, with nothing written to it, while the tensor lives."""
        address, num_bytes = pool.data_ptr(), pool.numel() * pool.element_size()
        assert self._library.octavo_emulator_register(address, num_bytes) == 0
        weakref.finalize(pool, self._library.octavo_emulator_unregister, address)

    def set_device(self, name: str, value: int) -> None:
        """Change a property of the device, such as num_multiprocessors."""
        assert self._library.octavo_emulator_set_device(name.encode(), value) == 0

    def set_seed(self, seed: int) -> None:
        """Shuffle the order of blocks and threads by a seed; 0 = in their order."""
        self._library.octavo_emulator_set_seed(seed)

    def take_fault(self) -> str:
        """Return the text of the fault that stopped a kernel, and forget it."""
        text: str = self._library.octavo_emulator_error().decode()
        self._library.octavo_emulator_clear_error()
        return text


class EmulatedCudaBackend(CudaBackend):
    """The cuda backend, with its pools in host memory that the emulator knows.

    Args:
        path: The kernels, the host code and the emulator in one library.
        num_multiprocessors: Of the device, for the caches made by this backend.
    """

    def __init__(self, path: Path, num_multiprocessors: int) -> None:
        self.emulator = Emulator(path)
        self.emulator.set_seed(SHUFFLED)
        self.emulator.set_device("memory_bytes", MEMORY_BYTES)
        self._num_multiprocessors = num_multiprocessors
        super().__init__(CudaLibrary(path), torch.device("cpu"))

    def alloc_paged_int8_layer(self, spec: ModelSpec, num_blocks: int) -> PagedInt8Layer:
        """Allocate one layer, in which nothing counts as written: its zeros are torch's."""
        layer = super().alloc_paged_int8_layer(spec, num_blocks)
        for pool in (layer.k_codes, layer.v_codes, layer.k_scales, layer.v_scales):
            self.emulator.register(pool)
        return layer

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind allocated layers; the launches' sizes are planned for this backend's device from here on."""
        self.emulator.set_device("num_multiprocessors", self._num_multiprocessors)
        return super().prepare(spec, num_blocks, layers)

    def step(
        self,
        cache: PagedInt8Cache,
        batch: RaggedBatch,
        q: HostArray | None,
        kv: tuple[HostArray, HostArray] | None,
        *,
        return_lse: bool,
    ) -> StepOutput:
        """Run a step; a fault of a kernel fails the test with the emulator's text."""
        try:
            return super().step(cache, batch, q, kv, return_lse=return_lse)
        except DeviceError as error:
            self._raise_fault(error)

    def _raise_fault(self, error: DeviceError) -> NoReturn:
        raise AssertionError(self.emulator.take_fault()) from error
