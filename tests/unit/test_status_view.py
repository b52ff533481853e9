"""The view of `octavo-server status`: what totals say of an interval, and how it is told."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

import pytest

from octavo_client import LaunchStats, Model, PoolStats, ServerInfo, ServerStats
from octavo_server.status_view import as_json, duration, interval, render, size

MODEL = Model(
    name="llama",
    num_layers=4,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=32,
    max_context=8192,
    num_blocks=4096,
    num_free_blocks=3072,
    sm_scale=(0.1,) * 4,
    window=(0,) * 4,
    soft_cap=(0.0,) * 4,
    sinks=None,
    deterministic=False,
)
INFO = ServerInfo(
    version="0.1.0",
    incarnation="0badcafe",
    backend="cpu",
    backend_description="cpu: AVX-512, 2 threads",
    models=MappingProxyType({"llama": MODEL}),
    max_message_bytes=64,
    max_steps_in_flight=32,
    num_sessions=3,
    max_sessions=1024,
)
STATS = ServerStats(
    num_steps=300,
    num_appended_tokens=5000,
    launches=(
        LaunchStats(1, 80, 80, 80, 80, 800, 1600, 8000, 80, 40_000_000),
        LaunchStats(4, 20, 60, 70, 70, 600, 400, 2000, 20, 10_000_000),
    ),
    received_bytes=10 * 2**20,
    sent_bytes=5 * 2**20,
    refusals=MappingProxyType({"POSITION_MISMATCH": 2, "QUEUE_FULL": 7}),
    num_queued=5,
    max_queued_steps=1024,
    num_sessions=3,
    num_streams=2,
    max_streams=64,
    pools=MappingProxyType({"llama": PoolStats(4096, 3072, 32, 266_240)}),
    device_free_bytes=3 * 2**30,
    num_opened_sessions=12,
    num_expired_sessions=4,
    uptime_s=100.0,
)
LATER = replace(
    STATS,
    num_steps=340,
    launches=(
        STATS.launches[0],
        LaunchStats(4, 30, 100, 110, 110, 1600, 900, 4000, 120, 30_000_000),
    ),
    refusals=MappingProxyType({"POSITION_MISMATCH": 2, "QUEUE_FULL": 9}),
    received_bytes=12 * 2**20,
    uptime_s=102.0,
)


def test_without_an_earlier_sample_it_is_since_the_start() -> None:
    lines = render("host:1", INFO, interval(STATS, None)).splitlines()
    assert lines == [
        "octavo 0.1.0 at host:1, up 1 min 40 s, incarnation 0badcafe",
        "cpu: AVX-512, 2 threads",
        "",
        "model  blocks held     of  tokens held       of   memory",
        "llama  1,024 (25%)  4,096       32,768  131,072  1.0 GiB",
        "",
        "sessions    3 of 1,024; 12 were opened, 4 expired",
        "streams     2 of 64",
        "queue       5 of 1,024 steps wait",
        "device      1.0 GiB in pools, 3.0 GiB free beside them",
        "",
        "since its start:",
        "steps       300, 3.0 a second",
        "appended    5,000 tokens, counted in each layer, 50.0 a second",
        "launches    100; by entries 1: 80%, 3-4: 20%",
        "stages      queue 10, copy_in 20, kernel 100, copy_out 1 us on average",
        "kernels     5.00 GB of cache a second of kernel time",
        "wire        102.4 KiB/s received, 51.2 KiB/s sent",
        "refusals    POSITION_MISMATCH 2, QUEUE_FULL 7",
    ]


def test_between_two_samples_it_is_what_happened_there() -> None:
    lines = render("host:1", INFO, interval(LATER, STATS)).splitlines()
    assert lines[11:] == [
        "in the last 2.0 s:",
        "steps       40, 20.0 a second",
        "appended    0 tokens, counted in each layer, 0.0 a second",
        "launches    10; by entries 3-4: 100%",
        "stages      queue 25, copy_in 50, kernel 200, copy_out 10 us on average",
        "kernels     10.00 GB of cache a second of kernel time",
        "wire        1.0 MiB/s received, 0 B/s sent",
        "refusals    QUEUE_FULL 2",
    ]


def test_a_server_that_started_anew_has_no_earlier_sample() -> None:
    assert interval(STATS, LATER).before is None


def test_a_server_that_did_nothing_is_told_of_as_well() -> None:
    idle = replace(STATS, launches=(), refusals=MappingProxyType({}), num_steps=0, uptime_s=0.0)
    text = render("host:1", INFO, interval(idle, None))
    assert "launches    none" in text
    assert "refusals    none" in text
    assert "kernels     0.00 GB" in text


def test_json_has_every_field_and_what_follows_from_them() -> None:
    told = json.loads(json.dumps(as_json(INFO, interval(LATER, STATS))))
    assert told["info"]["models"]["llama"]["window"] == [0, 0, 0, 0]
    assert told["stats"]["launches"][0]["cache_bytes"] == 40_000_000
    assert told["stats"]["pools"]["llama"]["block_bytes"] == 266_240
    assert told["interval"]["seconds"] == 2.0
    assert told["interval"]["steps_per_s"] == 20.0
    assert told["interval"]["kernel_bytes_per_s"] == 1e10
    assert told["interval"]["batch_sizes"] == {"4": 10}


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3599.4, "59 min 59 s"),
        (7260, "2 h 1 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
