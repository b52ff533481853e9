"""What all measurements share: the backend, memory, the clock, and where results go."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo_server.backends.cpu import CpuBackend
from tests.bench.contest import Contestant
from tests.bench.cpu.memory import Limit, Memory
from tests.bench.cpu.race import Block, Plan, race
from tests.bench.cpu.results import Results, Row, summary_line
from tests.bench.setting import Progress


@dataclass(frozen=True, slots=True)
class Setting:
    """See the module.

    Attributes:
        backend: What is measured.
        memory: Measures the limit.
        llc_bytes: The cache that must not help.
        progress: The clock.
        plan: How long each race takes.
        with_peers: Whether others than Octavo take part in decoding.
        results: Grows with each race.
    """

    backend: CpuBackend
    memory: Memory
    llc_bytes: int
    progress: Progress
    plan: Plan
    with_peers: bool = True
    results: Results = field(default_factory=Results)

    @property
    def num_threads(self) -> int:
        """Return the threads of every contestant."""
        return self.backend.num_threads

    def limit(self) -> Limit:
        """Measure the limit."""
        return self.memory.limit()

    def race(self, contestants: list[Contestant]) -> list[Block]:
        """Time contestants for as long as the plan and the clock allow."""
        return race(contestants, self.limit, self.plan, lambda: self.progress.has(0))

    def skip(self, what: str, reason: str) -> None:
        """Say and record what was not measured, once."""
        if (what, reason) not in self.results.skipped:
            self.progress.say(f"skipped {what}: {reason}")
            self.results.skipped.append((what, reason))

    def fail(self, what: str, reason: str) -> None:
        """Say and record what is not as it has to be."""
        self.progress.say(f"FAILED {what}: {reason}")
        self.results.failed.append((what, reason))

    def is_wrong(self, what: str, of_bound: float) -> bool:
        """Return whether an error exceeds its bound; it is then recorded."""
        is_right = of_bound <= 1
        if not is_right:
            self.fail(what, f"an answer has {of_bound:.3g} times the error that it may have")
        return not is_right

    def add(self, row: Row) -> None:
        """Record a race and say what came of it."""
        self.results.rows.append(row)
        self.progress.say(f"{row.label}: {summary_line(row)}")
