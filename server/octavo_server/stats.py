"""What steps cost, one by one and in total, and what a server holds and has done. No clock: times are the caller's.

`ServerStats` is a value: whoever exports it, a call or a metrics endpoint, reads its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_US = 1e6


class StageTimes(NamedTuple):
    """What one step cost; the stages follow each other without a gap.

    Attributes:
        queue_us: From when the step was read until its launch was begun.
        batch_size: Entries that shared the launch.
        batch_tokens: Tokens of those entries.
        copy_in_us: Admitting, laying out, and joining tensors.
        kernel_us: In the backend.
        copy_out_us: From there until the step's answer was cut out.
    """

    queue_us: int
    batch_size: int
    batch_tokens: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int


@dataclass(slots=True)
class LaunchTimes:
    """When a launch passed its stages, in seconds on one monotonic clock, and how much it ran.

    Attributes:
        began_at: It was taken off the queue.
        staged_at: The backend was called.
        ran_at: The backend returned.
        num_steps: Steps that share it.
        num_entries: Entries of all its steps.
        num_tokens: Tokens of those entries.
        queued_s: What its steps waited before it, added up.
    """

    began_at: float
    staged_at: float = 0.0
    ran_at: float = 0.0
    num_steps: int = 0
    num_entries: int = 0
    num_tokens: int = 0
    queued_s: float = 0.0

    def of_step(self, arrived_at: float, answered_at: float) -> StageTimes:
        """Return what one of the launch's steps cost, once its answer is cut out."""
        return StageTimes(
            round((self.began_at - arrived_at) * _US),
            self.num_entries,
            self.num_tokens,
            round((self.staged_at - self.began_at) * _US),
            round((self.ran_at - self.staged_at) * _US),
            round((answered_at - self.ran_at) * _US),
        )


class LaunchStats(NamedTuple):
    """Launches of about one batch size, added up since the start.

    Attributes:
        max_batch_size: The largest batch size counted here, a power of two; the smallest is one more than half of it.
        num_launches: Launches.
        num_steps: Steps that shared them.
        num_entries: Entries of those steps.
        num_tokens: Tokens of those entries.
        queue_us: As in StageTimes, of every step.
        copy_in_us: As in StageTimes, of every launch.
        kernel_us: As in StageTimes, of every launch.
        copy_out_us: As in StageTimes, of every launch, until its last answer was handed over; that of a launch whose
            answers are being handed over is not in here yet.
    """

    max_batch_size: int
    num_launches: int
    num_steps: int
    num_entries: int
    num_tokens: int
    queue_us: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int


@dataclass(slots=True)
class SizeTotals:
    """Sums over the launches of about one batch size; times in seconds."""

    num_launches: int = 0
    num_steps: int = 0
    num_entries: int = 0
    num_tokens: int = 0
    queued_s: float = 0.0
    copy_in_s: float = 0.0
    kernel_s: float = 0.0
    copy_out_s: float = 0.0

    def add(self, times: LaunchTimes) -> None:
        """Add a launch, all but its copy out."""
        self.num_launches += 1
        self.num_steps += times.num_steps
        self.num_entries += times.num_entries
        self.num_tokens += times.num_tokens
        self.queued_s += times.queued_s
        self.copy_in_s += times.staged_at - times.began_at
        self.kernel_s += times.ran_at - times.staged_at

    def stats(self, max_batch_size: int) -> LaunchStats:
        """Return the sums as a value."""
        return LaunchStats(
            max_batch_size,
            self.num_launches,
            self.num_steps,
            self.num_entries,
            self.num_tokens,
            round(self.queued_s * _US),
            round(self.copy_in_s * _US),
            round(self.kernel_s * _US),
            round(self.copy_out_s * _US),
        )


@dataclass(slots=True)
class LaunchTotals:
    """Sums over all launches, by batch size.

    Attributes:
        num_appended_tokens: Tokens that launches stored, once for each layer.
    """

    num_appended_tokens: int = 0
    _by_log2_size: dict[int, SizeTotals] = field(default_factory=dict)

    def add(self, times: LaunchTimes, num_appended_tokens: int) -> SizeTotals:
        """Add a launch whose outcome is settled; return the sums that its copy out is still to be added to."""
        self.num_appended_tokens += num_appended_tokens
        log2_size = (times.num_entries - 1).bit_length()
        totals = self._by_log2_size.get(log2_size)
        if totals is None:
            totals = self._by_log2_size[log2_size] = SizeTotals()
        totals.add(times)
        return totals

    def stats(self) -> tuple[LaunchStats, ...]:
        """Return the sums as values, by ascending batch size; sizes that never ran are left out."""
        by_size = sorted(self._by_log2_size.items())
        return tuple(totals.stats(1 << log2_size) for log2_size, totals in by_size)


class PoolStats(NamedTuple):
    """A model's blocks at one moment."""

    model: str
    num_blocks: int
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done since its start, and what it holds at one moment.

    Attributes:
        launches: Launches by batch size, ascending.
        num_appended_tokens: Tokens stored, once for each layer.
        num_queued: Steps, truncates and closes that wait for their turn.
        max_queued_steps: How many may be queued before a step is refused.
        num_sessions: Open sessions.
        pools: Blocks by model, in the order of the configuration.
    """

    launches: tuple[LaunchStats, ...]
    num_appended_tokens: int
    num_queued: int
    max_queued_steps: int
    num_sessions: int
    pools: tuple[PoolStats, ...]

    @property
    def num_steps(self) -> int:
        """Steps that launches ran."""
        return sum(launch.num_steps for launch in self.launches)


@dataclass(frozen=True, slots=True)
class ServerStats:
    """What a server has done since its start, and what it holds at one moment.

    Attributes:
        engine: Of steps and sessions.
        refusals: Refused calls, steps and entries, by reason.
        received_bytes: Bytes of the messages received by the calls of OctavoService.
        sent_bytes: Bytes of the messages that they sent.
        num_streams: Open Decode, Append and reflection streams.
        max_streams: Streams that may be open.
    """

    engine: EngineStats
    refusals: Mapping[str, int]
    received_bytes: int
    sent_bytes: int
    num_streams: int
    max_streams: int
