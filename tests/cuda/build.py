"""Compiles CUDA sources for the emulator with g++, and keeps what it compiled by its content.

Objects and libraries live in `<cache>/emulated`, beside the kernels that the server builds; each is
compiled elsewhere and renamed into place, so that processes may build the same at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from octavo_server.kernel_build import cache_directory

_ROOT = Path(__file__).resolve().parents[2]
EMULATOR = _ROOT / "tests" / "cuda_emulator"
CSRC = _ROOT / "csrc"
KERNEL_SOURCES = (
    *sorted((CSRC / "cuda").glob("*.cu")),
    *sorted((CSRC / "cuda").glob("*.cpp")),
    *sorted((CSRC / "common").glob("*.cpp")),
)
"""The sources of the CUDA library."""

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
    command = [_compiler(), "-shared", *objects]
    return _build_once(_hash(command), ".so", lambda target: [*command, "-o", str(target)])


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
    key = _hash([_compiler_version(), *_FLAGS, _headers_hash(source.parent), source.read_text()])
    command = [_compiler(), *_FLAGS, "-c", str(source)]
    return _build_once(key, ".o", lambda target: [*command, "-o", str(target)])


def _headers_hash(beside: Path) -> str:
    folders = dict.fromkeys((*_INCLUDES, beside))
    headers = [path for folder in folders for path in sorted(folder.rglob("*.h"))]
    return _hash([text for path in headers for text in (str(path), path.read_text())])


def _build_once(key: str, suffix: str, command_for: Callable[[Path], list[str]]) -> Path:
    """Run the command that makes a file, unless the file is there."""
    folder = cache_directory().parent / "emulated"
    built = folder / f"{key}{suffix}"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
            target = Path(scratch) / built.name
            _run(command_for(target))
            target.rename(built)
    return built


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")


@cache
def _compiler_version() -> str:
    command = [_compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
