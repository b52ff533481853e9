"""What steps cost, one by one and in total, and what a server holds and has done. No clock: times are the caller's.

`ServerStats` is a value: whoever exports it, a call or a metrics endpoint, reads its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo_server.tenant import TenantStats

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
        arrivals: [num_steps] when each step was read.
        cache_bytes: What it read and wrote of the cache, each entry's counted once.
    """

    began_at: float
    staged_at: float = 0.0
    ran_at: float = 0.0
    num_steps: int = 0
    num_entries: int = 0
    num_tokens: int = 0
    arrivals: Sequence[float] = ()
    cache_bytes: int = 0

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
        cache_bytes: What attention read of the cache and appends wrote to it.
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
    cache_bytes: int


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
    cache_bytes: int = 0

    def add(self, times: LaunchTimes) -> None:
        """Add a launch, all but its copy out."""
        self.num_launches += 1
        self.num_steps += times.num_steps
        self.num_entries += times.num_entries
        self.num_tokens += times.num_tokens
        self.queued_s += times.num_steps * times.began_at - sum(times.arrivals)
        self.copy_in_s += times.staged_at - times.began_at
        self.kernel_s += times.ran_at - times.staged_at
        self.cache_bytes += times.cache_bytes

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
            self.cache_bytes,
        )


class Durations(NamedTuple):
    """How long something took, each time since the start.

    Attributes:
        total_s: Seconds, added up.
        counts: counts[i] took less than 2**i microseconds, and at least half of that unless i is 0.
    """

    total_s: float
    counts: tuple[int, ...]


_NUM_COUNTS = 64
"""More than any clock lasts, so that nothing need be cut off where it is counted."""


def _no_counts() -> list[int]:
    return [0] * _NUM_COUNTS


@dataclass(slots=True)
class LaunchTotals:
    """Sums over all launches, by batch size; of what steps wait for most, queue and kernel, also how often how long.

    Attributes:
        num_appended_tokens: Tokens that launches stored, once for each layer.
    """

    num_appended_tokens: int = 0
    _by_log2_size: dict[int, SizeTotals] = field(default_factory=dict)
    _queue: list[int] = field(default_factory=_no_counts)
    _kernel: list[int] = field(default_factory=_no_counts)

    def add(self, times: LaunchTimes, num_appended_tokens: int) -> SizeTotals:
        """Add a launch whose outcome is settled; return the sums that its copy out is still to be added to."""
        self.num_appended_tokens += num_appended_tokens
        log2_size = (times.num_entries - 1).bit_length()
        totals = self._by_log2_size.get(log2_size)
        if totals is None:
            totals = self._by_log2_size[log2_size] = SizeTotals()
        totals.add(times)
        for arrived_at in times.arrivals:
            self._queue[int((times.began_at - arrived_at) * 1e6).bit_length()] += 1
        self._kernel[int((times.ran_at - times.staged_at) * 1e6).bit_length()] += 1
        return totals

    @property
    def queue(self) -> Durations:
        """How long each step waited."""
        total_s = sum(totals.queued_s for totals in self._by_log2_size.values())
        return Durations(total_s, tuple(self._queue))

    @property
    def kernel(self) -> Durations:
        """How long each launch was in the backend."""
        total_s = sum(totals.kernel_s for totals in self._by_log2_size.values())
        return Durations(total_s, tuple(self._kernel))

    def stats(self) -> tuple[LaunchStats, ...]:
        """Return the sums as values, by ascending batch size; sizes that never ran are left out."""
        by_size = sorted(self._by_log2_size.items())
        return tuple(totals.stats(1 << log2_size) for log2_size, totals in by_size)


class PoolStats(NamedTuple):
    """A model's blocks at one moment.

    Attributes:
        model: Name of the model.
        num_blocks: Blocks in the pool.
        num_free_blocks: Blocks that no session holds.
        block_size: Tokens of one block.
        block_bytes: Bytes of one block, in all layers.
    """

    model: str
    num_blocks: int
    num_free_blocks: int
    block_size: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done since its start, and what it holds at one moment.

    Attributes:
        launches: Launches by batch size, ascending.
        queue: How long each step waited.
        kernel: How long each launch was in the backend.
        num_appended_tokens: Tokens stored, once for each layer.
        num_queued: Steps, truncates and closes that wait for their turn.
        max_queued_steps: How many may be queued before a step is refused.
        num_sessions: Open sessions.
        num_opened_sessions: Sessions opened, restored and imported ones among them.
        num_expired_sessions: Sessions closed because their lease ended.
        pools: Blocks by model, in the order of the configuration.
        tenants: What each tenant holds.
        device_free_bytes: Bytes that are free on the device beside the pools.
    """

    launches: tuple[LaunchStats, ...]
    queue: Durations
    kernel: Durations
    num_appended_tokens: int
    num_queued: int
    max_queued_steps: int
    num_sessions: int
    num_opened_sessions: int
    num_expired_sessions: int
    pools: tuple[PoolStats, ...]
    tenants: tuple[TenantStats, ...]
    device_free_bytes: int

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
        max_sessions: Sessions that may be open.
        num_streams: Open Decode, Append and reflection streams.
        max_streams: Streams that may be open.
        uptime_s: Seconds since the start.
    """

    engine: EngineStats
    refusals: Mapping[str, int]
    received_bytes: int
    sent_bytes: int
    max_sessions: int
    num_streams: int
    max_streams: int
    uptime_s: float
