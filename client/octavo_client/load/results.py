"""What is run, what comes of it, and what is shown meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from octavo_client.load.book import shorten
from octavo_client.load.checks import CheckCounts
from octavo_client.load.histogram import Histogram
from octavo_client.load.plan import LoadPoint, Workload
from octavo_client.load.tally import Tally
from octavo_client.load.watch import Watch

_MOST_FAULTS = 20
"""Of each kind that are told one by one."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run, and how.

    Attributes:
        workload: What the sessions do.
        points: The sweep.
        num_processes: Processes that make the load.
        duration_s: Measured seconds of each point; None = as long as `max_steps` take.
        warm_up_s: Seconds before that, which do not count.
        max_steps: Most measured steps of each point; None = any number.
        num_checkers: Processes that check answers.
        checks_at_once: Whether answers are checked while load is made; False: after each point.
        kill_every_s: Seconds between two kills of chaos.
        is_shared: Whether others use the server meanwhile, so that what it holds at the end proves nothing.
        watched_id: The server's process on this machine, whose memory and threads are to be watched.
    """

    workload: Workload
    points: tuple[LoadPoint, ...]
    num_processes: int
    duration_s: float | None
    warm_up_s: float
    max_steps: int | None
    num_checkers: int
    checks_at_once: bool
    kill_every_s: float
    is_shared: bool
    watched_id: int | None = None


@dataclass(slots=True)
class PointResult:
    """What one load point gave.

    Attributes:
        point: The load.
        tally: Counts and times of all processes.
        moments: Latency of steps by interval since the start, each of `moment_s`.
        moment_s: Seconds of an interval.
        elapsed_s: Measured seconds.
        cpu_shares: Cores that each process used.
        checks: What came of the checks.
        is_complete: Whether it ran to its end.
    """

    point: LoadPoint
    tally: Tally = field(default_factory=Tally)
    moments: dict[int, Histogram] = field(default_factory=dict)
    moment_s: float = 0.5
    elapsed_s: float = 0.0
    cpu_shares: list[float] = field(default_factory=list)
    checks: CheckCounts = field(default_factory=CheckCounts)
    is_complete: bool = False

    def rate(self, count: float) -> float:
        """Return how much there was of something a second."""
        return count / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(slots=True)
class RunResult:
    """What a run gave.

    Attributes:
        points: Of the sweep, as far as it came.
        faults: What failed it besides wrong answers: unexpected errors, things left on the server.
        num_left_open: Sessions that killed processes left behind and that were closed at the end.
        watch: How the server's process fared, where it was watched.
        was_restored: Whether the server holds what it held before; None when that was not judged.
        is_interrupted: Whether it was ended early.
    """

    points: list[PointResult] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_left_open: int = 0
    watch: Watch | None = None
    was_restored: bool | None = None
    is_interrupted: bool = False

    @property
    def num_wrong(self) -> int:
        """Wrong answers."""
        return sum(result.checks.num_wrong for result in self.points)

    @property
    def all_faults(self) -> list[str]:
        """Everything that fails the run, as lines."""
        errors: Counter[str] = Counter()
        for result in self.points:
            errors.update(result.tally.faults)
        wrong = [fault for result in self.points for fault in result.checks.faults]
        return [*wrong[:_MOST_FAULTS], *shorten(errors, _MOST_FAULTS), *self.faults]


@dataclass(frozen=True, slots=True)
class Status:
    """What the view shows.

    Attributes:
        phase: What goes on.
        done: How far it is, from 0 to 1.
        result: What the load point gave so far.
        point_idx: Of the sweep.
        num_points: Of the sweep.
        recent: Latency of the steps of the last seconds.
        recent_s: How many seconds.
        num_to_check: Answers that wait to be checked.
    """

    phase: str
    done: float
    result: PointResult
    point_idx: int
    num_points: int
    recent: Histogram
    recent_s: float
    num_to_check: int


class View(Protocol):
    """Shows a run while it goes on."""

    def show(self, status: Status) -> None:
        """Show a state; called ten times a second."""

    def end_point(self, result: PointResult) -> None:
        """Show what a load point gave."""
