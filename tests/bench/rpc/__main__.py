"""What a step costs on the wire, beside the floor of grpcio: `make bench-rpc`.

Servers are processes of their own on loopback; the clients' process shares the cores with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.bench.bench_library import ROOT
from tests.bench.cpu.machine import describe_machine, describe_software
from tests.bench.goals import Goal, align, goals_table
from tests.bench.results import save
from tests.bench.rpc import pay_page
from tests.bench.rpc.figures import (
    BESIDE_PYTRITON,
    FEW,
    MANY,
    OCTAVO,
    OCTAVO_CPU,
    OVER_SHARED,
    OVER_TCP,
    PYTRITON,
    Row,
    measure,
    rig,
)
from tests.bench.setting import Progress
from tests.bench.stats import Summary, ratios

LIMIT_S = 450.0
FORMAT = 1
RESULTS = ROOT / "tests" / "bench" / "results" / "rpc.json"
QUICK_RESULTS = ROOT / "build" / "bench-rpc" / "rpc.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few samples of everything")
    parser.add_argument("--output", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    progress = Progress(LIMIT_S)
    progress.say("starting the servers")
    with rig(is_quick=options.quick) as the_rig:
        rows = list(measure(the_rig, progress.say))
    found = goals(rows)
    print("", *figures_table(rows), "", *goals_table(found), sep="\n")
    facts = {"machine": describe_machine("loopback", 2), "software": describe_software()}
    results = {
        "format": FORMAT,
        **facts,
        "wall_s": round(progress.elapsed_s, 1),
        "goals": [goal.as_dict() for goal in found],
        "rows": [asdict(row) for row in rows],
    }
    output = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    save(output, results, progress.say)
    if output == RESULTS:
        pay_page.main()
    return 0


def figures_table(rows: Sequence[Row]) -> list[str]:
    """Return every contestant's median and spread."""
    lines = [("figure", "contestant", "median", "p10", "p90", "")]
    for row in rows:
        if row.skipped:
            lines.append((row.label, "skipped", "", "", "", row.skipped))
        for name in row.rounds:
            summary = row.summary(name)
            median, p10, p90 = (
                f"{value:.4g}" for value in (summary.median, summary.p10, summary.p90)
            )
            lines.append((row.label, name, median, p10, p90, row.unit))
    return align(lines)


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Hold the figures against the goals."""
    by_label = {row.label: row for row in rows}
    return [
        *_echo_goals(by_label),
        *_own_goals(by_label),
        _pytriton_goal(by_label[BESIDE_PYTRITON]),
    ]


def _echo_goals(rows: Mapping[str, Row]) -> Iterator[Goal]:
    for label, most in (
        ("one stream, 1 session a step, p50", 1.25),
        ("one stream, 1 session a step, p99", 1.5),
        ("one stream, 64 sessions a step, p50", 1.3),
    ):
        found = rows[label].over_best_echo()
        yield _goal(
            f"{label}, over the better echo", f"{most}x or less", found, found.median <= most
        )
    for label in ("8 streams of one session", "upload of a prompt of 8,192 tokens"):
        found = rows[label].over_best_echo(is_rate=True)
        yield _goal(f"{label}, over the echo's", "0.8x or more", found, found.median >= 0.8)


def _own_goals(rows: Mapping[str, Row]) -> Iterator[Goal]:
    row = rows["server CPU time of a step of 64 sessions"]
    found = ratios(row.rounds[MANY], row.rounds[FEW])
    yield _goal(f"{row.label}, {MANY}, over {FEW}", "1.05x or less", found, found.median <= 1.05)
    row = rows["one machine, 64 sessions a step, p50"]
    found = ratios(row.rounds[OVER_SHARED], row.rounds[OVER_TCP])
    name = f"{row.label}, {OVER_SHARED}, over TCP"
    yield _goal(name, "0.5x or less", found, found.median <= 0.5)
    row = next(row for row in rows.values() if row.label.startswith("launches a step"))
    launches = row.summary(OCTAVO_CPU)
    yield _goal(row.label, "0.1 or less", launches, launches.median <= 0.1)


def _pytriton_goal(row: Row) -> Goal:
    name, target = "one stream, 1 session a step, p50, PyTriton's over Octavo's", "8x or more"
    if row.skipped:
        return Goal(name, target, f"skipped: {row.skipped}", "not measured")
    found = ratios(row.rounds[PYTRITON], row.rounds[OCTAVO])
    return _goal(name, target, found, found.median >= 8)


def _goal(name: str, target: str, found: Summary, is_met: bool) -> Goal:
    text = f"{found.median:.2f} ({found.p10:.2f} to {found.p90:.2f}, n={found.num_samples})"
    return Goal(name, target, text, "met" if is_met else "missed")


if __name__ == "__main__":
    sys.exit(main())
