"""What a server did and holds, for people and as JSON: the view of `octavo-server status`. Pure.

Totals become rates over an interval: between two samples, or since the server's start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from octavo_client import LaunchStats, ServerInfo, ServerStats

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_NAME_WIDTH = 12


@dataclass(frozen=True, slots=True)
class Interval:
    """What a server did between two samples.

    Attributes:
        stats: The later sample.
        before: The earlier one; None = the server's start.
    """

    stats: ServerStats
    before: ServerStats | None = None

    @property
    def seconds(self) -> float:
        """Its length, by the server's clock; above 0."""
        return max(self.stats.uptime_s - (self.before.uptime_s if self.before else 0.0), 1e-9)

    def total(self, count: Callable[[ServerStats], float]) -> float:
        """Return how much a total grew."""
        return count(self.stats) - (count(self.before) if self.before else 0)

    def launches(self, count: Callable[[LaunchStats], float]) -> float:
        """Return how much a total of all launches grew."""
        return self.total(lambda stats: sum(map(count, stats.launches)))

    def rate(self, count: Callable[[ServerStats], float]) -> float:
        """Return how much a total grew a second."""
        return self.total(count) / self.seconds

    @property
    def num_launches(self) -> float:
        """Launches."""
        return self.launches(lambda launch: launch.num_launches)

    @property
    def stage_us(self) -> dict[str, float]:
        """Mean microseconds of each stage: queue of a step, the others of a launch."""
        num_steps = max(self.launches(lambda launch: launch.num_steps), 1)
        num_launches = max(self.num_launches, 1)
        return {
            "queue": self.launches(lambda launch: launch.queue_us) / num_steps,
            "copy_in": self.launches(lambda launch: launch.copy_in_us) / num_launches,
            "kernel": self.launches(lambda launch: launch.kernel_us) / num_launches,
            "copy_out": self.launches(lambda launch: launch.copy_out_us) / num_launches,
        }

    @property
    def kernel_bytes_per_s(self) -> float:
        """Bytes of the cache that went through the kernels, a second of their time."""
        kernel_us = self.launches(lambda launch: launch.kernel_us)
        cache_bytes = self.launches(lambda launch: launch.cache_bytes)
        return cache_bytes / kernel_us * 1e6 if kernel_us else 0.0

    @property
    def batch_sizes(self) -> dict[int, float]:
        """Launches by the largest batch size that is counted with theirs; sizes that did not run are left out."""
        before = self.before.launches if self.before else ()
        earlier = {launch.max_batch_size: launch.num_launches for launch in before}
        counts = {
            launch.max_batch_size: launch.num_launches - earlier.get(launch.max_batch_size, 0)
            for launch in self.stats.launches
        }
        return {size: count for size, count in counts.items() if count}

    @property
    def refusals(self) -> dict[str, int]:
        """Refusals by reason."""
        earlier = self.before.refusals if self.before else {}
        grown = {
            reason: count - earlier.get(reason, 0) for reason, count in self.stats.refusals.items()
        }
        return {reason: count for reason, count in grown.items() if count}


def interval(stats: ServerStats, before: ServerStats | None) -> Interval:
    """Return the interval between samples; since the start when there is no earlier one of the same server process."""
    is_same = before is not None and before.uptime_s < stats.uptime_s
    return Interval(stats, before if is_same else None)


def render(target: str, info: ServerInfo, span: Interval) -> str:
    """Return the view as text, without a newline at its end.

    Args:
        target: What the server was asked at.
        info: What it is.
        span: What it did.
    """
    stats = span.stats
    since = f"in the last {duration(span.seconds)}" if span.before else "since its start"
    head = [
        f"octavo {info.version} at {target}, up {duration(stats.uptime_s)}, incarnation {info.incarnation}",
        info.backend_description,
        "",
    ]
    rows = [*_holds(info, stats), ("", ""), (f"{since}:", ""), *_did(span)]
    lines = [f"{name:<{_NAME_WIDTH}}{text}".rstrip() for name, text in rows]
    return "\n".join([*head, *_pools(stats), "", *lines])


def as_json(info: ServerInfo, span: Interval) -> dict[str, Any]:
    """Return the view as values that JSON has: `info` and `stats` by their fields, and what follows from them."""
    return {
        "info": _plain(info),
        "stats": _plain(span.stats),
        "interval": {
            "seconds": span.seconds,
            "is_since_start": span.before is None,
            "steps_per_s": span.rate(lambda stats: stats.num_steps),
            "appended_tokens_per_s": span.rate(lambda stats: stats.num_appended_tokens),
            "received_bytes_per_s": span.rate(lambda stats: stats.received_bytes),
            "sent_bytes_per_s": span.rate(lambda stats: stats.sent_bytes),
            "stage_us": span.stage_us,
            "kernel_bytes_per_s": span.kernel_bytes_per_s,
            "batch_sizes": span.batch_sizes,
            "refusals": span.refusals,
        },
    }


def _holds(info: ServerInfo, stats: ServerStats) -> Iterator[tuple[str, str]]:
    yield (
        "sessions",
        f"{stats.num_sessions:,} of {info.max_sessions:,}; {stats.num_opened_sessions:,} were opened, "
        f"{stats.num_expired_sessions:,} expired",
    )
    yield "streams", f"{stats.num_streams:,} of {stats.max_streams:,}"
    yield "queue", f"{stats.num_queued:,} of {stats.max_queued_steps:,} steps wait"
    pool_bytes = sum(pool.num_blocks * pool.block_bytes for pool in stats.pools.values())
    yield "device", f"{size(pool_bytes)} in pools, {size(stats.device_free_bytes)} free beside them"


def _did(span: Interval) -> Iterator[tuple[str, str]]:
    steps = span.total(lambda stats: stats.num_steps)
    appended = span.total(lambda stats: stats.num_appended_tokens)
    yield "steps", f"{steps:,.0f}, {steps / span.seconds:,.1f} a second"
    yield (
        "appended",
        f"{appended:,.0f} tokens, counted in each layer, {appended / span.seconds:,.1f} a second",
    )
    yield "launches", _batch_sizes(span)
    stages = ", ".join(f"{name} {us:,.0f}" for name, us in span.stage_us.items())
    yield "stages", f"{stages} us on average"
    yield "kernels", f"{span.kernel_bytes_per_s / 1e9:,.2f} GB of cache a second of kernel time"
    received, sent = (
        span.rate(lambda stats: stats.received_bytes),
        span.rate(lambda stats: stats.sent_bytes),
    )
    yield "wire", f"{size(received)}/s received, {size(sent)}/s sent"
    refusals = ", ".join(f"{reason} {count:,}" for reason, count in span.refusals.items())
    yield "refusals", refusals or "none"


def _batch_sizes(span: Interval) -> str:
    num_launches = span.num_launches
    if not num_launches:
        return "none"
    shares = [
        f"{_size_range(size)}: {count / num_launches:.0%}"
        for size, count in span.batch_sizes.items()
    ]
    return f"{num_launches:,.0f}; by entries {', '.join(shares)}"


def _size_range(max_batch_size: int) -> str:
    least = max_batch_size // 2 + 1
    return str(max_batch_size) if least >= max_batch_size else f"{least}-{max_batch_size}"


def _pools(stats: ServerStats) -> list[str]:
    table = [("model", "blocks held", "of", "tokens held", "of", "memory")]
    for name, pool in stats.pools.items():
        num_held = pool.num_blocks - pool.num_free_blocks
        table.append(
            (
                name,
                f"{num_held:,} ({num_held / pool.num_blocks:.0%})",
                f"{pool.num_blocks:,}",
                f"{num_held * pool.block_size:,}",
                f"{pool.num_blocks * pool.block_size:,}",
                size(pool.num_blocks * pool.block_bytes),
            )
        )
    return _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return rows with the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]


def size(num_bytes: float) -> str:
    """Return a number of bytes for people."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {name}"
    return f"{num_bytes:,.0f} B"


def duration(seconds: float) -> str:
    """Return a time for people: its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours < 1:
        return f"{minutes:.0f} min {seconds % 60:.0f} s"
    if days < 1:
        return f"{hours:.0f} h {minutes % 60:.0f} min"
    return f"{days:.0f} d {hours % 24:.0f} h"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
