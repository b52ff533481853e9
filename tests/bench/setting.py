"""What all measurements share: the device, the library, the clock, and where results go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tests.bench.bench_library import BenchLibrary
from tests.bench.device import Device
from tests.bench.results import Results

NUM_ROUNDS, NUM_QUICK_ROUNDS = 24, 20


@dataclass(slots=True)
class Progress:
    """Says what goes on, and whether there is time for more.

    Attributes:
        limit_s: When everything has to be over, seconds from the start.
    """

    limit_s: float
    _start_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Return seconds since the start."""
        return time.monotonic() - self._start_s

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{self.elapsed_s:5.0f} s] {text}", flush=True)

    def has(self, seconds: float) -> bool:
        """Return whether something that takes `seconds` would end in time."""
        return self.elapsed_s + seconds <= self.limit_s


@dataclass(frozen=True, slots=True)
class Setting:
    """See the module.

    Attributes:
        device: What is measured.
        kernels: The kernels on it.
        progress: The clock.
        quick: Whether only the cases of the goals are measured.
        results: Grows with each measurement.
    """

    device: Device
    kernels: BenchLibrary
    progress: Progress
    quick: bool = False
    results: Results = field(default_factory=Results)

    @property
    def num_rounds(self) -> int:
        """Return the samples of each contestant."""
        return NUM_QUICK_ROUNDS if self.quick else NUM_ROUNDS

    def skip(self, what: str, reason: str) -> None:
        """Say and record what was not measured."""
        self.progress.say(f"skipped {what}: {reason}")
        self.results.skipped.append((what, reason))

    def fail(self, what: str, reason: str) -> None:
        """Say and record what is not as it has to be."""
        self.progress.say(f"FAILED {what}: {reason}")
        self.results.failed.append((what, reason))
