"""Compiles CUDA sources for the emulator with g++, and keeps objects and libraries in `<cache>/emulated`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.native_build import build_once, compiler, compiler_version, content_key, headers_key

_ROOT = Path(__file__).resolve().parents[2]
EMULATOR = _ROOT / "tests" / "cuda_emulator"
CSRC = _ROOT / "csrc"
KERNEL_SOURCES = (
    *sorted((CSRC / "cuda").glob("*.cu")),
    *sorted((CSRC / "cuda").glob("*.cpp")),
    *sorted((CSRC / "common").glob("*.cpp")),
)
"""The sources of the CUDA library."""

_FOLDER = "emulated"
_INCLUDES = (EMULATOR, _ROOT / "csrc" / "include", _ROOT / "csrc")
_FLAGS = (
    *("-x", "c++", "-std=c++17", "-O2", "-g", "-fPIC", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{include}" for include in _INCLUDES),
)


def load_emulated(sources: Sequence[Path]) -> ctypes.CDLL:
    """Compile the emulator and these sources into one library, unless it is cached, and load it.

    The library has a device of its own: its memory, settings and faults are shared with no other's.

    Args:
        sources: .cu files, and .cpp files of the host's side.

    Raises:
        RuntimeError: The compiler failed; the text is its output.
    """
    return open_emulated(build_emulated(sources))


def open_emulated(path: Path) -> ctypes.CDLL:
    """Load a library that `build_emulated` made."""
    library = ctypes.CDLL(str(path))
    _declare(library)
    return library


def build_emulated(sources: Sequence[Path]) -> Path:
    """Return the library that `load_emulated` loads."""
    every = [*sorted(EMULATOR.glob("*.cpp")), *sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(_build_object, every)]
    command = [compiler(), "-shared", *objects]
    name = f"{content_key(command)}.so"
    return build_once(_FOLDER, name, lambda target: [*command, "-o", str(target)])


def _declare(library: ctypes.CDLL) -> None:
    """Declare the emulator's own functions."""
    library.octavo_emulator_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.octavo_emulator_unregister.argtypes = [ctypes.c_void_p]
    library.octavo_emulator_set_written.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.octavo_emulator_set_device.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.octavo_emulator_set_seed.argtypes = [ctypes.c_uint64]
    library.octavo_emulator_set_seed.restype = None
    library.octavo_emulator_error.restype = ctypes.c_char_p
    library.octavo_emulator_clear_error.restype = None
    library.octavo_emulator_num_switches.restype = ctypes.c_uint64


def _build_object(source: Path) -> Path:
    """Return the object of a source, by the content of it and of every header."""
    headers = headers_key(dict.fromkeys((*_INCLUDES, source.parent)))
    key = content_key([compiler_version(), *_FLAGS, headers, source.read_text()])
    command = [compiler(), *_FLAGS, "-c", str(source)]
    return build_once(_FOLDER, f"{key}.o", lambda target: [*command, "-o", str(target)])
