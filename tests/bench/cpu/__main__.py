"""Benchmarks the cpu backend here: checked against the oracle, then timed in turn beside its peers.

    python -m tests.bench.cpu [--quick] [--output FOLDER]

Takes under 8 minutes on 2 cores; --quick, a first look at two shapes and the steps, about one. Peers that are not
installed are skipped with the reason. The exit status is 1 when an answer of Octavo's is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from octavo_server.backends.cpu import CpuBackend
from tests.bench.bench_library import ROOT
from tests.bench.cpu.append import measure_append
from tests.bench.cpu.call import measure_call
from tests.bench.cpu.cases import FULL, GOAL_CASES, QUICK, QUICK_CASES, SWEEP_CASES
from tests.bench.cpu.causal import measure_causal
from tests.bench.cpu.decode import measure_case
from tests.bench.cpu.goals import goals
from tests.bench.cpu.machine import describe_machine, describe_software, llc_bytes
from tests.bench.cpu.memory import Memory
from tests.bench.cpu.plot import save_plot
from tests.bench.cpu.racers import LLC_MULTIPLE
from tests.bench.cpu.report import PLOT_NAME, as_markdown
from tests.bench.cpu.results import Results, as_json
from tests.bench.cpu.setting import Setting
from tests.bench.goals import goals_table
from tests.bench.results import save
from tests.bench.setting import Progress
from tests.bench.shapes import Case

LIMIT_S = 450.0
"""Under 8 minutes with what comes before and after."""

RESULTS = ROOT / "tests" / "bench" / "results"
QUICK_RESULTS = ROOT / "build" / "bench-cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parse(arguments)
    setting = set_up(Progress(LIMIT_S), is_quick=options.quick)
    steps = (measure_call, measure_append, measure_causal)
    measure(setting, QUICK_CASES if options.quick else GOAL_CASES, steps)
    measure(setting, () if options.quick else SWEEP_CASES)
    folder = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    finish(setting.results, folder, setting.progress)
    return 1 if setting.results.failed else 0


def set_up(progress: Progress, *, is_quick: bool = False) -> Setting:
    """Build the kernels and everything that measures."""
    progress.say("building the kernels, where that was not done before")
    backend = CpuBackend(pin_threads=True)
    torch.set_num_threads(backend.num_threads)
    memory = Memory(backend.num_threads, LLC_MULTIPLE * llc_bytes())
    machine = describe_machine(backend.description, backend.num_threads)
    results = Results(machine=machine, software=describe_software())
    for facts in (results.machine, results.software):
        progress.say(", ".join(f"{name} {value}" for name, value in facts.items()))
    plan = QUICK if is_quick else FULL
    return Setting(backend, memory, llc_bytes(), progress, plan, results=results)


def measure(
    setting: Setting, cases: Sequence[Case], steps: Sequence[Callable[[Setting], None]] = ()
) -> None:
    """Measure steps and cases, into the setting's results."""
    for step in steps:
        step(setting)
    for case in cases:
        measure_case(setting, case)


def finish(results: Results, folder: Path, progress: Progress) -> None:
    """Print the goals, and save JSON, Markdown and the plot."""
    results.wall_s = progress.elapsed_s
    found = goals(results)
    print("", *goals_table(found), sep="\n")
    for what, reason in results.failed:
        print(f"FAILED {what}: {reason}")
    has_plot = save_plot(results, folder / PLOT_NAME, progress.say)
    save(folder / "cpu.json", as_json(results, [goal.as_dict() for goal in found]), progress.say)
    (folder / "cpu.md").write_text(as_markdown(results, found, with_plot=has_plot))
    progress.say(f"saved {folder / 'cpu.md'}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="two shapes and the steps, few samples"
    )
    parser.add_argument("--output", type=Path, help="folder for JSON, Markdown and plot")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
