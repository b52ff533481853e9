"""A run as a table, and as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from octavo_client.load.record import versions
from tests.bench.stats import summarize
from tests.chaos.form import DTYPE, NUM_LAYERS, Form
from tests.chaos.results import Results

_COLUMNS = ("fault", "injected", "recoveries", "median s", "p90 s", "max s")


class Origin(NamedTuple):
    """What was run."""

    command: tuple[str, ...]
    commit: str


def table(results: Results) -> str:
    """Return faults and recoveries as a Markdown table, then the counts."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(tuple, _rows(results))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    counts = [f"| {name} | {value} |" for name, value in _counts(results)]
    return "\n".join([*lines, "", "| count | |", "| --- | --- |", *counts])


def as_json(
    form: Form, seed: int, origin: Origin, results: Results, failures: Sequence[str]
) -> dict[str, Any]:
    """Return all that is known of a run."""
    return {
        "command": list(origin.command),
        "commit": origin.commit,
        "seed": seed,
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": versions(),
        "form": {
            "name": form.name,
            "model": form.model_flag,
            "dtype": DTYPE,
            "num_layers": NUM_LAYERS,
            "num_clients": form.num_clients,
            "lanes_per_client": form.lanes_per_client,
            "num_sessions": form.num_sessions,
            "prompt_tokens": str(form.prompt_tokens),
            "lease_s": form.lease_s,
        },
        "seconds": round(results.seconds, 1),
        "faults": dict(sorted(results.faults.items())),
        "num_faults": results.faults.total(),
        "num_calls": results.num_calls,
        "checks": asdict(results.checks),
        "num_sessions_opened": results.num_opened,
        "num_sessions_said_lost": results.num_losses,
        "num_tokens_said_lost": results.num_said_lost_tokens,
        "num_tokens_lost_unsaid": results.num_lost_tokens,
        "num_left_sessions": results.num_left_sessions,
        "num_leaked_blocks": results.num_leaked_blocks,
        "errors": dict(results.errors.most_common()),
        "refusals": dict(results.refusals.most_common()),
        "recovery_s": {
            kind: [round(s, 4) for s in seconds] for kind, seconds in results.recoveries.items()
        },
        "failures": list(failures),
    }


def commit() -> str:
    """Return the commit that is checked out, with "+" when files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        is_dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _rows(results: Results) -> list[list[str]]:
    rows = []
    for kind, count in sorted(results.faults.items()):
        seconds = results.recoveries.get(kind, [])
        times = ["", "", ""]
        if seconds:
            summary = summarize(seconds)
            times = [f"{value:.2f}" for value in (summary.median, summary.p90, max(seconds))]
        rows.append([kind, str(count), str(len(seconds)), *times])
    return rows


def _counts(results: Results) -> list[tuple[str, str]]:
    checks = results.checks
    errors = ", ".join(f"{reason} {count:,}" for reason, count in results.errors.most_common())
    return [
        ("faults", f"{results.faults.total():,}"),
        ("calls", f"{results.num_calls:,}"),
        ("answers checked", f"{checks.num_checked:,}"),
        ("wrong answers", f"{checks.num_wrong:,}"),
        ("longest context of a checked answer", f"{checks.longest_context:,} tokens"),
        ("sessions opened", f"{results.num_opened:,}"),
        (
            "sessions said to be lost or expired",
            f"{results.num_losses:,} ({results.num_said_lost_tokens:,} tokens)",
        ),
        ("lost tokens that were not said to be lost", f"{results.num_lost_tokens:,}"),
        ("leaked blocks", f"{results.num_leaked_blocks:,}"),
        ("errors that clients saw", errors or "none"),
        ("hostile messages and probes", f"{results.refusals.total():,}"),
        ("took", f"{results.seconds:.0f} s"),
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
