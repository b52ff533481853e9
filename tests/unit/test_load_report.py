"""What the load test reports: figures, warnings, JSON, CSV, and an HTML page that needs no network."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from io import StringIO
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console

from octavo_client import ServerInfo
from octavo_client.load.arguments import make_parser, settings_of
from octavo_client.load.figures import figures_of, warnings_of
from octavo_client.load.fleet import cpu_shares
from octavo_client.load.histogram import Histogram
from octavo_client.load.page import render
from octavo_client.load.plan import LoadPoint
from octavo_client.load.plots import one_plot, plots
from octavo_client.load.record import describe, write_csv
from octavo_client.load.results import PointResult, RunResult, Settings, Status
from octavo_client.load.table import print_report
from octavo_client.load.tally import Tally
from octavo_client.load.view import live_view, status_line
from tests.unit.client_fakes import model

INFO = ServerInfo(
    "9.9", "i", "cpu", "cpu: many threads", MappingProxyType({"tiny": model()}), 1, 2, 0, 9
)
COMMAND = ["octavo-load", "--target", "<here>"]


def point_result(value: float = 4, latency_ms: float = 2.0) -> PointResult:
    """Return the result of 100 steps of two sessions in 10 seconds, each 1 ms slower than the one before."""
    latency = Histogram()
    for idx in range(100):
        latency.record(int((latency_ms + idx) * 1e6))
    tally = Tally(
        num_steps=100,
        num_layer_steps=200,
        num_tokens=100,
        context=200 * 77,
        sent_bytes=10**8,
        received_bytes=5 * 10**7,
        latency=latency,
        send_ns=100 * 30_000,
        receive_ns=100 * 20_000,
        num_staged=10,
        queue_ns=10 * 5_000,
        kernel_ns=10 * 40_000,
        copy_in_ns=10 * 1_000,
        copy_out_ns=10 * 2_000,
        staged_latency_ns=10 * 200_000,
        staged_send_ns=10 * 30_000,
        staged_receive_ns=10 * 20_000,
        batch_sizes=Counter({2: 5, 4: 5}),
        num_sampled=3,
    )
    point = LoadPoint("concurrency", value, int(value), int(value))
    return PointResult(point, tally, {0: latency, 1: latency}, 0.5, 10.0, [0.4], is_complete=True)


def settings() -> Settings:
    args = make_parser().parse_args(["--target", "x:1", "--prompt-tokens", "8", "--seed", "42"])
    return settings_of(args, "x:1", INFO)


def test_figures_are_per_second_and_per_step() -> None:
    figures = figures_of(point_result())
    expected = {
        "steps_per_s": 10,
        "layer_steps_per_s": 20,
        "tokens_per_s": 10,
        "sent_mb_per_s": 10,
        "received_mb_per_s": 5,
        "context": 77,
        "sessions_per_step": 2,
        "batch_size": 3,
        "client_send_us": 30,
        "network_us": 200 - 30 - 20 - 48,
        "queue_us": 5,
        "copy_in_us": 1,
        "kernel_us": 40,
        "copy_out_us": 2,
        "client_receive_us": 20,
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert figures["p50_us"] == pytest.approx(51_000, rel=0.01)
    assert figures["p99_us"] == pytest.approx(100_000, rel=0.01)
    assert figures["max_us"] == 101_000


def test_figures_that_are_not_there_are_none() -> None:
    figures = figures_of(PointResult(LoadPoint("rate", 1, 1, 1)))
    assert figures["kernel_us"] is None
    assert figures["p50_us"] is None
    assert figures["steps_per_s"] == 0


def late(milliseconds: int) -> Histogram:
    histogram = Histogram()
    for _ in range(100):
        histogram.record(milliseconds * 1_000_000)
    return histogram


@pytest.mark.parametrize(
    ("changes", "result_changes", "text"),
    [
        ({}, {"cpu_shares": [0.2, 0.97]}, "97% of a core"),
        ({"lateness": late(20)}, {}, "20.0"),
        ({"num_without_lane": 10}, {}, "--max-in-flight"),
        ({"num_unsent": 7}, {}, "7 steps were due and never sent"),
        ({"num_sampled": 0}, {}, "no answer was checked"),
    ],
)
def test_what_makes_figures_mean_less_is_said(
    changes: dict[str, Any], result_changes: dict[str, Any], text: str
) -> None:
    good = point_result()
    assert warnings_of(good) == []
    bad = replace(good, tally=replace(good.tally, **changes), **result_changes)
    (warning,) = warnings_of(bad)
    assert text in warning


def test_cores_are_those_of_the_measured_time() -> None:
    second = 10**9
    samples = [(0, 0.0), (second, 0.9), (2 * second, 1.0), (3 * second, 1.1), (4 * second, 2.0)]
    assert cpu_shares([samples, [(second, 1.0)]], second, 3 * second) == pytest.approx([0.1])


def run_result() -> RunResult:
    return RunResult([point_result(1), point_result(8, 5.0)], was_restored=True)


def test_json_has_shapes_seed_versions_and_command() -> None:
    record = json.loads(json.dumps(describe(settings(), INFO, run_result(), COMMAND)))
    assert (record["seed"], record["command"]) == (42, COMMAND)
    assert record["models"][0]["step"] == {
        "dtype": "float16",
        "q": [1, 4, 8],
        "k": [1, 2, 8],
        "v": [1, 2, 8],
        "out": [1, 4, 8],
    }
    assert {"python", "octavo", "grpcio", "numpy"} <= set(record["versions"])
    first = record["points"][0]
    assert sum(count for _, _, count in first["latency_ns"]) == 100
    assert first["figures"]["steps_per_s"] == 10
    assert first["over_time"][1]["at_s"] == 0.5


def test_csv_has_a_line_for_each_load() -> None:
    text = StringIO()
    write_csv(run_result(), text)
    rows = list(csv.DictReader(StringIO(text.getvalue())))
    assert [(row["kind"], row["value"], row["steps_per_s"]) for row in rows] == [
        ("concurrency", "1", "10.0"),
        ("concurrency", "8", "10.0"),
    ]


def test_the_page_needs_no_network_and_escapes_what_it_shows() -> None:
    run = run_result()
    page = render(describe(settings(), INFO, run, COMMAND), run, plots(run.points))
    assert page.count("<svg") == 3
    assert "&lt;here&gt;" in page
    assert "<here>" not in page
    for loads in ("<script", "<link", "src=", "@import", "<img", "url(http"):
        assert loads not in page
    assert "<!DOCTYPE svg" not in page


def test_one_load_has_no_plot_of_the_sweep() -> None:
    assert len(plots([point_result()])) == 2
    assert plots([PointResult(LoadPoint("rate", 1, 1, 1))]) == []
    assert one_plot(run_result().points).count("<svg") == 1
    assert one_plot(run_result().points) == one_plot(run_result().points)


def printed(run: RunResult) -> str:
    console = Console(file=StringIO(), width=180)
    print_report(console, run)
    file: Any = console.file
    text: str = file.getvalue()
    return text


def test_the_table_has_the_columns_of_perf_analyzer_and_ours() -> None:
    text = printed(run_result())
    for title in (
        *(
            "concurrency",
            "send",
            "queue",
            "compute",
            "receive",
            "p50",
            "p90",
            "p95",
            "p99",
            "p99.9",
        ),
        *("tokens/s", "layer steps/s", "MB/s out", "MB/s in", "context", "batch"),
    ):
        assert title in text


def test_faults_and_reasons_are_told() -> None:
    run = run_result()
    run.points[0].tally.faults["POSITION_MISMATCH: at 5"] = 3
    run.points[0].tally.refusals["QUEUE_FULL"] = 12
    run.points[1].checks.faults.append("the answer of model tiny is wrong")
    run.faults.append("2 sessions were left open")
    text = printed(run)
    assert "FAULT: POSITION_MISMATCH: at 5 (3 times)" in text
    assert "FAULT: the answer of model tiny is wrong" in text
    assert "FAULT: 2 sessions were left open" in text
    assert "errors by reason: QUEUE_FULL 12" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_view_shows_throughput_percentiles_errors_and_progress(is_terminal: bool) -> None:
    console = Console(
        file=StringIO(), width=120, force_terminal=is_terminal, _environ={"TERM": "xterm"}
    )
    result = point_result()
    status = Status("measuring", 0.5, result, 0, 2, result.tally.latency, 2.0, 0)
    with live_view(console) as view:
        view.show(status)
        view.end_point(result)
    file: Any = console.file
    text = file.getvalue()
    for part in ("concurrency 4 (1 of 2)", "50 steps/s", "p99", "wrong"):
        assert part in text
    assert "50%" in status_line(status)
