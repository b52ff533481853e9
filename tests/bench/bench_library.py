"""The kernels and the benchmark's own in one library: built by nvcc through ninja, called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_server.cuda_build import ninja_file
from octavo_server.kernel_build import path_with_ninja

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BENCH_SOURCES = Path(__file__).parent / "cuda"
INCLUDE_DIRS = (CSRC / "include", CSRC, BENCH_SOURCES)

OCTAVO, THREE_PASS = 0, 1
"""BenchKernel."""

HalfArray = NDArray[np.float16]


class BenchError(RuntimeError):
    """A call of the library failed; the text says why."""


class StepStruct(ctypes.Structure):
    """BenchStep of cuda/bench.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_q_heads",
                "num_kv_heads",
                "head_dim",
                "block_size",
                "num_blocks",
                "num_entries",
                "num_tokens",
                "max_num_blocks",
            )
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "k_codes",
                "v_codes",
                "k_scales",
                "v_scales",
                "kv_lens",
                "block_tables",
                "q",
                "k",
                "v",
            )
        ),
    )


_PLAN_FIELDS = (
    "num_items",
    "num_partials",
    "longest_span",
    "resident_blocks",
    "num_multiprocessors",
)


class PlanStruct(ctypes.Structure):
    """BenchPlan of cuda/bench.h."""

    _fields_ = tuple((name, ctypes.c_int32) for name in _PLAN_FIELDS)

    def as_dict(self) -> dict[str, int]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in _PLAN_FIELDS}


@dataclass(frozen=True, slots=True)
class Resident:
    """A step on the device, made by `BenchLibrary.make_resident` and freed by `free_resident`."""

    handle: int
    plan: dict[str, int]


_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "read": (_POINTER, _INT64, _POINTER, _INT32, _POINTER),
    "copy": (_POINTER, _POINTER, _INT64, _INT32, _POINTER),
    "make_resident": (_POINTER, _POINTER, _POINTER),
    "launch": (_POINTER, _INT32, _INT64, _INT32, _INT32, _POINTER),
    "take_out": (_POINTER, _POINTER, _POINTER),
    "run_resident": (_POINTER, _POINTER, _POINTER),
    "make_host": (_POINTER, _INT32, _POINTER),
    "run_host": (_POINTER, _POINTER),
}


class BenchLibrary:
    """The loaded library. Streams are handles, 0 the default one; `path` may be the emulated library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, f"octavo_bench_{name}")
            function.argtypes, function.restype = arguments, _INT32
        for name in ("free_resident", "free_host"):
            function = getattr(self._library, f"octavo_bench_{name}")
            function.argtypes, function.restype = (_POINTER,), None
        self._library.octavo_bench_error.restype = ctypes.c_char_p

    def read(self, source: int, num_bytes: int, sink: int, num_blocks: int, stream: int) -> None:
        """Queue a read of memory."""
        self._call("read", source, num_bytes, sink, num_blocks, stream)

    def copy(self, target: int, source: int, num_bytes: int, num_blocks: int, stream: int) -> None:
        """Queue a copy of memory."""
        self._call("copy", target, source, num_bytes, num_blocks, stream)

    def make_resident(self, step: StepStruct) -> Resident:
        """Plan a step and put it on the device; what `step` points to may go then, but for the pools."""
        handle, plan = ctypes.c_void_p(), PlanStruct()
        self._call("make_resident", _address(step), _address(handle), _address(plan))
        return Resident(_value(handle), plan.as_dict())

    def free_resident(self, resident: Resident) -> None:
        """Free a step."""
        self._library.octavo_bench_free_resident(resident.handle)

    def launch(
        self, steps: ctypes.Array[Any], first: int, count: int, kernel: int, stream: int
    ) -> None:
        """Queue the kernels of `count` of these steps, from the one numbered `first` on and around."""
        self._call("launch", ctypes.addressof(steps), len(steps), first, count, kernel, stream)

    def take_out(self, resident: Resident, out: HalfArray, stream: int) -> None:
        """Copy a step's answer to `out` and wait; on the device it is NaN then."""
        self._call("take_out", resident.handle, out.ctypes.data, stream)

    def run_resident(self, resident: Resident, stream: int) -> float:
        """Run a step from pinned inputs to pinned outputs; returns microseconds."""
        return self._timed("run_resident", resident.handle, stream)

    def make_host(self, step: StepStruct, device_idx: int) -> int:
        """Bind a step to a device of its own; like `make_resident` otherwise."""
        handle = ctypes.c_void_p()
        self._call("make_host", _address(step), device_idx, _address(handle))
        return _value(handle)

    def free_host(self, host: int) -> None:
        """Free what make_host returned."""
        self._library.octavo_bench_free_host(host)

    def run_host(self, host: int) -> float:
        """Run a step from host arrays to host arrays; returns microseconds."""
        return self._timed("run_host", host)

    def nominal_rate(self, device_idx: int) -> float | None:
        """Return the bytes a second that memory clock and width allow; None when the device does not say."""
        rate = ctypes.c_double()
        function = self._library.octavo_bench_nominal_rate
        is_known = function(ctypes.c_int32(device_idx), ctypes.byref(rate)) == 0
        return rate.value if is_known and rate.value > 0 else None

    def _timed(self, name: str, *arguments: Any) -> float:
        us = ctypes.c_double()
        self._call(name, *arguments, _address(us))
        return us.value

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"octavo_bench_{name}")(*arguments) != 0:
            text = self._library.octavo_bench_error().decode()
            raise BenchError(f"octavo_bench_{name}: {text}")


def build(arch: int) -> Path:
    """Return the library for a GPU, built unless these sources were before.

    Args:
        arch: Compute capability, times ten.

    Raises:
        BenchError: nvcc or a source is not as it has to be.
        UnsupportedError: There is no ninja.
    """
    text = ninja_file(sources(), INCLUDE_DIRS, [arch])
    folder = ROOT / "build" / "bench" / _content_hash(text)
    library = folder / "library.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(text)
        _run_ninja(folder)
    return library


def sources() -> list[Path]:
    """Return the kernels', their host code's and the benchmark's sources."""
    folders = (CSRC / "cuda", CSRC / "common", BENCH_SOURCES)
    return [path for folder in folders for path in _files(folder, (".cu", ".cpp"))]


def _run_ninja(folder: Path) -> None:
    ninja = shutil.which("ninja", path=path_with_ninja("cuda"))
    assert ninja is not None, "it is on that path"
    done = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"building the benchmark failed:\n{done.stdout[-4000:]}{done.stderr}")


def _content_hash(text: str) -> str:
    headers = [path for folder in INCLUDE_DIRS for path in _files(folder, (".h",))]
    parts = [text, *(path.read_text() for path in (*sources(), *headers))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def _address(value: Any) -> int:
    return ctypes.addressof(value)


def _value(handle: ctypes.c_void_p) -> int:
    assert handle.value is not None
    return handle.value
