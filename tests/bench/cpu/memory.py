"""What this machine's memory does, by a small library of the benchmark's own (memory.cpp)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tests.bench.bench_library import ROOT
from tests.bench.stats import summarize

Mode = Literal["narrow", "wide"]
MODES: tuple[Mode, ...] = ("narrow", "wide")

WIDE_RATIO = 1.45
"""All threads read at least this many times as fast as one: the wide mode."""

BUFFER_BYTES = 384 << 20
NUM_PASSES, NUM_ONE_THREAD_PASSES = 3, 1

STRATEGIES = (
    "in order",
    "in order, 1 KB ahead",
    "in order, 4 KB ahead",
    "four streams, 1 KB ahead",
    "8 KB chunks here and there, the next one ahead",
)
"""Names of kStrategies in memory.cpp."""

SOURCE = Path(__file__).with_name("memory.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror")


@dataclass(frozen=True, slots=True)
class Limit:
    """What pure reads did at one moment, in GB/s.

    Attributes:
        read_gb_per_s: All threads, in the best way.
        one_thread_gb_per_s: One thread, in its best way.
        strategy: The way of all threads.
    """

    read_gb_per_s: float
    one_thread_gb_per_s: float
    strategy: str

    @property
    def mode(self) -> Mode:
        """Return how memory answered: whether more threads read much faster than one."""
        return mode_of(self.read_gb_per_s, self.one_thread_gb_per_s)


def mode_of(read_gb_per_s: float, one_thread_gb_per_s: float) -> Mode:
    """Return the mode that the two rates tell of."""
    return "wide" if read_gb_per_s >= WIDE_RATIO * one_thread_gb_per_s else "narrow"


class Memory:
    """The library with a buffer of random bytes.

    Args:
        num_threads: What `limit` calls all threads.
        num_bytes: The buffer; several times the last-level cache.
    """

    def __init__(self, num_threads: int, num_bytes: int = BUFFER_BYTES) -> None:
        self.num_threads = num_threads
        self._library = _load(build())
        granule = 4 * 8192 * num_threads
        self._buffer = random_bytes(max(1, num_bytes // granule) * granule)

    def limit(self) -> Limit:
        """Measure now; takes some 150 ms."""
        one_thread, _ = self._best(1, NUM_ONE_THREAD_PASSES)
        all_threads, strategy = self._best(self.num_threads, NUM_PASSES)
        return Limit(all_threads, one_thread, STRATEGIES[strategy])

    def read_gb_per_s(self, strategy: int, num_threads: int, num_passes: int) -> float:
        """Return the median rate of a few passes over the buffer."""
        seconds = [self._read_s(strategy, num_threads) for _ in range(num_passes)]
        return self._buffer.nbytes / summarize(seconds).median / 1e9

    def checksum(self, strategy: int, num_threads: int) -> int:
        """Return the sum of the buffer's 64-bit words as a strategy reads them."""
        return self._read(strategy, num_threads)[1]

    @property
    def buffer(self) -> NDArray[np.uint8]:
        """What is read."""
        return self._buffer

    def copy(self, target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        """Copy bytes with all threads."""
        assert target.nbytes == source.nbytes
        self._library.octavo_copy(
            target.ctypes.data, source.ctypes.data, source.nbytes, self.num_threads
        )

    def _best(self, num_threads: int, num_passes: int) -> tuple[float, int]:
        """Return GB/s of the fastest strategy, and which it is."""
        strategies = range(len(STRATEGIES))
        return max((self.read_gb_per_s(idx, num_threads, num_passes), idx) for idx in strategies)

    def _read_s(self, strategy: int, num_threads: int) -> float:
        return self._read(strategy, num_threads)[0]

    def _read(self, strategy: int, num_threads: int) -> tuple[float, int]:
        total = ctypes.c_uint64()
        seconds = self._library.octavo_read(
            self._buffer.ctypes.data,
            self._buffer.nbytes,
            1,
            num_threads,
            strategy,
            ctypes.byref(total),
        )
        return float(seconds), total.value


def random_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Return random bytes that start at a cache line."""
    room = np.random.default_rng(7).integers(0, 2**64, num_bytes // 8 + 8, dtype=np.uint64)
    skipped = -room.ctypes.data % 64
    return room.view(np.uint8)[skipped : skipped + num_bytes]


def build() -> Path:
    """Compile memory.cpp unless that was done before; returns the library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *_FLAGS, str(SOURCE)]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    library = ROOT / "build" / "bench-cpu" / f"memory-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        scratch = library.with_suffix(f".{os.getpid()}.part")
        subprocess.run([*command, "-o", str(scratch)], check=True)
        scratch.replace(library)
    return library


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.octavo_read.argtypes = [pointer, size, count, count, count, pointer]
    library.octavo_read.restype = ctypes.c_double
    library.octavo_copy.argtypes = [pointer, pointer, size, count]
    library.octavo_copy.restype = ctypes.c_double
    assert library.octavo_num_strategies() == len(STRATEGIES)
    return library
