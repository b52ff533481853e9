"""Metrics for Prometheus: a server's `ServerStats` under the names that its docs list, read when they are asked for.

Nothing is counted here. Names are in base units; what only grows ends in `_total`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from octavo_server.errors import REASONS
from octavo_server.service import Identity
from octavo_server.stats import Durations, EngineStats, LaunchStats, ServerStats
from octavo_server.tenant import TenantStats

Value = float | int

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

MAX_LOG2_BATCH_SIZE = 12
"""Launches of more than 4,096 entries, which is as many as one step has, are counted in the last bucket."""

MAX_LOG2_US = 24
"""Stages of more than 2**24 us, 17 s, are counted in the last bucket."""


def create_exposition(
    identity: Identity, read_stats: Callable[[], ServerStats]
) -> Callable[[], bytes]:
    """Return what writes a server's metrics, and its process's, in Prometheus's text format.

    Args:
        identity: What the server says of itself.
        read_stats: Called each time.
    """
    registry = CollectorRegistry()
    registry.register(_StatsCollector(identity, read_stats))
    ProcessCollector(registry=registry)
    return lambda: generate_latest(registry)


class _StatsCollector:
    def __init__(self, identity: Identity, read_stats: Callable[[], ServerStats]) -> None:
        self._identity = identity
        self._read_stats = read_stats

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known without reading the stats."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        stats = self._read_stats()
        yield _build_info(self._identity)
        yield from _launches(stats.engine)
        yield _stages(stats.engine.launches)
        text = "Seconds that a step waited for its launch."
        yield _durations("octavo_step_queue_seconds", text, stats.engine.queue)
        text = "Seconds that a launch was in the backend."
        yield _durations("octavo_launch_kernel_seconds", text, stats.engine.kernel)
        yield from _sessions(stats)
        yield from _tenants(stats.engine.tenants)
        yield from _pools(stats.engine)
        yield from _server(stats)


def _build_info(identity: Identity) -> Metric:
    info = InfoMetricFamily("octavo_build", "The server's software, process and backend.")
    labels = {
        "version": identity.version,
        "incarnation": identity.incarnation,
        "backend": identity.backend,
        "backend_description": identity.backend_description,
    }
    info.add_metric([], labels)
    return info


def _launches(engine: EngineStats) -> Iterator[Metric]:
    launches = engine.launches
    num_entries = sum(launch.num_entries for launch in launches)
    yield _counter("octavo_steps", "Steps that launches ran.", engine.num_steps)
    yield _counter("octavo_entries", "Entries of those steps.", num_entries)
    num_tokens = sum(launch.num_tokens for launch in launches)
    yield _counter("octavo_step_tokens", "Tokens of those entries.", num_tokens)
    yield _counter(
        "octavo_appended_tokens", "Tokens stored, once for each layer.", engine.num_appended_tokens
    )
    num_launches = sum(launch.num_launches for launch in launches)
    yield _counter(
        "octavo_launches", "Runs of the backend, each for one step or more.", num_launches
    )
    cache_bytes = sum(launch.cache_bytes for launch in launches)
    yield _counter(
        "octavo_kernel_cache_bytes",
        "Bytes of the cache that launches read and wrote, each entry's counted once.",
        cache_bytes,
    )
    sizes = {launch.max_batch_size: launch.num_launches for launch in launches}
    yield _batch_sizes(sizes, num_entries)


def _batch_sizes(counts: Mapping[int, int], num_entries: int) -> Metric:
    bounds = [1 << log2 for log2 in range(MAX_LOG2_BATCH_SIZE + 1)]
    cumulated = accumulate(counts.get(bound, 0) for bound in bounds)
    buckets = [(f"{bound}.0", float(count)) for bound, count in zip(bounds, cumulated, strict=True)]
    buckets.append(("+Inf", float(sum(counts.values()))))
    name, text = "octavo_launch_batch_size", "Entries of a launch."
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=num_entries)


def _stages(launches: Iterable[LaunchStats]) -> Metric:
    text = "Seconds by stage: queue of all steps; copy_in, kernel and copy_out of all launches."
    family = CounterMetricFamily("octavo_stage_seconds", text, labels=["stage"])
    for stage in ("queue", "copy_in", "kernel", "copy_out"):
        total_us = sum(getattr(launch, f"{stage}_us") for launch in launches)
        family.add_metric([stage], total_us / 1e6)
    return family


def _durations(name: str, text: str, durations: Durations) -> Metric:
    cumulated = list(accumulate(durations.counts))
    buckets = [
        (repr(2**log2_us / 1e6), float(count))
        for log2_us, count in enumerate(cumulated[: MAX_LOG2_US + 1])
    ]
    buckets.append(("+Inf", float(cumulated[-1])))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=durations.total_s)


def _sessions(stats: ServerStats) -> Iterator[Metric]:
    engine = stats.engine
    yield _gauge("octavo_sessions", "Open sessions.", engine.num_sessions)
    text = "Sessions that may be open before one is refused."
    yield _gauge("octavo_sessions_limit", text, stats.max_sessions)
    yield _counter(
        "octavo_sessions_opened",
        "Sessions opened, restored and imported ones among them.",
        engine.num_opened_sessions,
    )
    yield _counter(
        "octavo_sessions_expired",
        "Sessions closed because their lease ended.",
        engine.num_expired_sessions,
    )


def _tenants(tenants: Iterable[TenantStats]) -> Iterator[Metric]:
    """Yield what tenants hold; the one of a server without tenants has the name ""."""
    for unit, text in (
        ("sessions", "Open sessions of a tenant."),
        ("tokens", "Tokens that the blocks of a tenant's sessions hold, full or not."),
        ("bytes", "Bytes of those blocks."),
    ):
        family = GaugeMetricFamily(f"octavo_tenant_{unit}", text, labels=["tenant"])
        for tenant in tenants:
            family.add_metric([tenant.name], getattr(tenant, f"num_{unit}"))
        yield family


def _pools(engine: EngineStats) -> Iterator[Metric]:
    blocks = GaugeMetricFamily(
        "octavo_blocks", "Blocks of a model's pool, by who has them.", labels=["model", "state"]
    )
    size = GaugeMetricFamily("octavo_block_tokens", "Tokens of one block.", labels=["model"])
    block_bytes = GaugeMetricFamily(
        "octavo_block_bytes", "Bytes of one block, in all layers.", labels=["model"]
    )
    for pool in engine.pools:
        blocks.add_metric([pool.model, "free"], pool.num_free_blocks)
        blocks.add_metric([pool.model, "held"], pool.num_blocks - pool.num_free_blocks)
        size.add_metric([pool.model], pool.block_size)
        block_bytes.add_metric([pool.model], pool.block_bytes)
    yield from (blocks, size, block_bytes)
    pool_bytes = sum(pool.num_blocks * pool.block_bytes for pool in engine.pools)
    yield _gauge("octavo_device_pool_bytes", "Bytes of all pools.", pool_bytes)
    yield _gauge(
        "octavo_device_free_bytes",
        "Bytes that are free on the backend's device beside the pools.",
        engine.device_free_bytes,
    )


def _server(stats: ServerStats) -> Iterator[Metric]:
    engine = stats.engine
    text = "Steps, truncates and closes that wait for their turn."
    yield _gauge("octavo_queue_depth", text, engine.num_queued)
    text = "Steps that may wait before one is refused."
    yield _gauge("octavo_queue_limit", text, engine.max_queued_steps)
    yield _gauge("octavo_streams", "Open Decode, Append and reflection streams.", stats.num_streams)
    text = "Streams that may be open before one is refused."
    yield _gauge("octavo_streams_limit", text, stats.max_streams)
    text = "Bytes of the messages that calls received, without what gRPC adds."
    yield _counter("octavo_received_bytes", text, stats.received_bytes)
    yield _counter("octavo_sent_bytes", "Bytes of the messages that they sent.", stats.sent_bytes)
    refusals = CounterMetricFamily(
        "octavo_refusals", "Refused calls, steps and entries.", labels=["reason"]
    )
    # Reasons that never came up as well: Prometheus sees an increase only from a value that was there.
    for reason in REASONS:
        refusals.add_metric([reason], stats.refusals.get(reason, 0))
    yield refusals
    yield _gauge("octavo_uptime_seconds", "Seconds since the server's start.", stats.uptime_s)


def _counter(name: str, text: str, value: Value) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: Value) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
