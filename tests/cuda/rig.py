"""Runs the test kernels of tests/cuda/kernels by name, with NumPy arrays in and out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KERNELS = Path(__file__).parent / "kernels"

LAUNCH_FAILURE = 719
"""What the runtime answers from a fault on."""

Array = npt.NDArray[Any]


class _Job(ctypes.Structure):
    """TestJob of kernels/harness.h."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("input_bytes", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("output_bytes", ctypes.c_int64),
        ("num_blocks", ctypes.c_int32),
        ("option", ctypes.c_int32),
        ("is_in_place", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Rig:
    """The library of test kernels on its emulated device."""

    kernels: ctypes.CDLL

    def run(
        self, name: str, given: Array, output: Array, *, option: int = 0, num_blocks: int = 1
    ) -> Array:
        """Run a kernel and return what it gives; a fault is a failure of the test.

        Args:
            name: File and kernel: `collectives.any`.
            given: The kernel's input.
            output: Written to: of the shape and type that the kernel gives.
            option: What the kernel says.
            num_blocks: Of the grid.
        """
        given = np.ascontiguousarray(given)
        code = self.launch(name, given, output, option=option, num_blocks=num_blocks)
        assert (code, self.fault()) == (0, "")
        return output

    def fail(self, name: str, given: Array, output: Array, *, option: int = 1) -> str:
        """Run a kernel that has to fail; return the fault's text, and clear the fault."""
        code = self.launch(name, given, output, option=option)
        assert code == LAUNCH_FAILURE, f"no fault: {name} returned {code}"
        return self.take_fault()

    def take_fault(self) -> str:
        """Return the text of the fault there is, and clear it."""
        text = self.fault()
        self.kernels.octavo_emulator_clear_error()
        return text

    def fault(self) -> str:
        """Return the text of the fault there is, or nothing."""
        text: bytes = self.kernels.octavo_emulator_error()
        return text.decode()

    def register(self, array: Array, *, is_written: bool) -> None:
        """Make an array memory of the device."""
        address, num_bytes = array.ctypes.data, array.nbytes
        assert self.kernels.octavo_emulator_register(address, num_bytes) == 0
        assert self.kernels.octavo_emulator_set_written(address, num_bytes, is_written) == 0

    def unregister(self, array: Array) -> None:
        """Take an array back from the device."""
        assert self.kernels.octavo_emulator_unregister(array.ctypes.data) == 0

    def launch(
        self,
        name: str,
        given: Array,
        output: Array,
        *,
        option: int = 0,
        num_blocks: int = 1,
        is_in_place: bool = False,
    ) -> int:
        """Run a kernel and return the runtime's code.

        Args:
            is_in_place: The arrays are the device's own memory; else they are copied there and back.
        """
        file, _, kernel = name.partition(".")
        job = _Job(
            *(given.ctypes.data, given.nbytes, output.ctypes.data, output.nbytes),
            *(num_blocks, option, is_in_place),
        )
        code: int = getattr(self.kernels, f"run_{file}")(kernel.encode(), ctypes.byref(job))
        return code
