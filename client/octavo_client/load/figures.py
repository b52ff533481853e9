"""The figures of a load point, in the order of the table, and what is to be said about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from octavo_client.load.results import PointResult
from octavo_client.load.tally import Tally

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

_BUSY_CORES = 0.85
"""Of a process, whose Python code can use one."""

_LATE_SHARE = 0.1
_LEAST_LATE_NS = 1_000_000
_WAITING_SHARE = 0.01
_NS_PER_US = 1e3
_BYTES_PER_MB = 1e6


@dataclass(frozen=True, slots=True)
class Column:
    """One figure.

    Attributes:
        key: Its name in CSV and JSON.
        title: Its name in the table.
        read: Takes it from a load point; None when there is none.
        digits: Digits after the point in the table.
    """

    key: str
    title: str
    read: Callable[[PointResult], float | None]
    digits: int = 0


def _per_s(read: Callable[[Tally], float]) -> Callable[[PointResult], float | None]:
    return lambda result: result.rate(read(result.tally))


def _of_steps(read: Callable[[Tally], float]) -> Callable[[PointResult], float | None]:
    def mean(result: PointResult) -> float | None:
        num_steps = result.tally.num_steps
        return read(result.tally) / num_steps if num_steps else None

    return mean


def _of_staged(read: Callable[[Tally], float]) -> Callable[[PointResult], float | None]:
    def mean(result: PointResult) -> float | None:
        num_staged = result.tally.num_staged
        return read(result.tally) / num_staged / _NS_PER_US if num_staged else None

    return mean


def _context(result: PointResult) -> float | None:
    tally = result.tally
    return tally.context / tally.num_layer_steps if tally.num_layer_steps else None


def _batch(result: PointResult) -> float | None:
    tally = result.tally
    total = sum(size * count for size, count in tally.batch_sizes.items())
    return total / tally.num_staged if tally.num_staged else None


def _rest_ns(tally: Tally) -> float:
    """Return what is left of the latency: gRPC and the network both ways, reading and answering on the server."""
    server = tally.queue_ns + tally.copy_in_ns + tally.kernel_ns + tally.copy_out_ns
    return tally.staged_latency_ns - tally.staged_send_ns - tally.staged_receive_ns - server


def _percentile(percent: float) -> Callable[[PointResult], float | None]:
    def read(result: PointResult) -> float | None:
        latency = result.tally.latency
        return latency.percentile(percent) / _NS_PER_US if latency.num_values else None

    return read


THROUGHPUT = (
    Column("steps_per_s", "steps/s", _per_s(lambda t: t.num_steps)),
    Column("layer_steps_per_s", "layer steps/s", _per_s(lambda t: t.num_layer_steps)),
    Column("tokens_per_s", "tokens/s", _per_s(lambda t: t.num_tokens), 1),
    Column("sent_mb_per_s", "MB/s out", _per_s(lambda t: t.sent_bytes / _BYTES_PER_MB), 2),
    Column("received_mb_per_s", "MB/s in", _per_s(lambda t: t.received_bytes / _BYTES_PER_MB), 2),
    Column("context", "context", _context),
    Column("sessions_per_step", "sessions/step", _of_steps(lambda t: t.num_layer_steps), 1),
    Column("batch_size", "batch", _batch, 1),
    Column("prompts", "prompts", lambda result: result.tally.prompts.num_values),
    Column("errors", "errors", lambda result: result.tally.refusals.total()),
    Column("checked", "checked", lambda result: result.checks.num_checked),
    Column("wrong", "wrong", lambda result: result.checks.num_wrong),
)

LATENCY = (
    Column("client_send_us", "send", _of_steps(lambda t: t.send_ns / _NS_PER_US)),
    Column("network_us", "network+rest", _of_staged(_rest_ns)),
    Column("queue_us", "queue", _of_staged(lambda t: t.queue_ns)),
    Column("copy_in_us", "copy in", _of_staged(lambda t: t.copy_in_ns)),
    Column("kernel_us", "compute", _of_staged(lambda t: t.kernel_ns)),
    Column("copy_out_us", "copy out", _of_staged(lambda t: t.copy_out_ns)),
    Column("client_receive_us", "receive", _of_steps(lambda t: t.receive_ns / _NS_PER_US)),
    Column("mean_us", "mean", lambda result: result.tally.latency.mean / _NS_PER_US),
    *(Column(f"p{p:g}_us", f"p{p:g}", _percentile(p)) for p in PERCENTILES),
    Column("max_us", "max", lambda result: result.tally.latency.most / _NS_PER_US),
)


def figures_of(result: PointResult) -> Mapping[str, float | None]:
    """Return all figures of a load point, by key."""
    return {column.key: column.read(result) for column in (*THROUGHPUT, *LATENCY)}


def warnings_of(result: PointResult) -> list[str]:
    """Return what makes the figures of a load point mean less than they seem to."""
    return [*_generator_warnings(result), *_rate_warnings(result), *_check_warnings(result)]


def _generator_warnings(result: PointResult) -> Iterator[str]:
    busiest = max(result.cpu_shares, default=0.0)
    if busiest >= _BUSY_CORES:
        yield (
            f"a process of the load test used {busiest:.0%} of a core, and Python code can use one: "
            "the load test may be what is slow; use more --processes, on cores that the server does not need"
        )
    lateness = result.tally.lateness
    late_ns = lateness.percentile(99)
    limit_ns = max(_LATE_SHARE * result.tally.latency.percentile(50), _LEAST_LATE_NS)
    if late_ns > limit_ns:
        yield (
            f"one in a hundred steps left {late_ns / 1e6:.2f} ms late or later though a lane was free: the load test "
            "may be what is slow; use more --processes"
        )


def _rate_warnings(result: PointResult) -> Iterator[str]:
    tally = result.tally
    share = tally.num_without_lane / tally.num_steps if tally.num_steps else 0.0
    if share > _WAITING_SHARE:
        yield (
            f"{share:.0%} of the steps were due when none of the {result.point.num_lanes} lanes was free, and waited "
            "(their latency says so): the server is slower than the rate, or --max-in-flight is too small"
        )
    if tally.num_unsent:
        yield (
            f"{tally.num_unsent} steps were due and never sent: the rate is beyond what the server can do, and "
            "the percentiles are too good"
        )
    if not tally.num_steps:
        yield "no step was measured: run longer, or give the server room for the sessions"


def _check_warnings(result: PointResult) -> Iterator[str]:
    checks, num_sampled = result.checks, result.tally.num_sampled
    if checks.num_dropped:
        yield f"{checks.num_dropped} answers were not checked, because too many waited: lower --check"
    if checks.num_unbounded:
        yield (
            f"{checks.num_unbounded} answers had scores beyond what the error bound is stated for: "
            "they were only seen to be finite"
        )
    if result.tally.num_steps and not num_sampled:
        yield "no answer was checked: raise --check, or run longer"
