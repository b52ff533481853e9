"""What the kernels are to reach on an H200, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.bench.device import is_h200
from tests.bench.results import ORIGINAL, OURS, DecodeRow, Figure, Results
from tests.bench.shapes import LLAMA
from tests.bench.stats import Summary

Verdict = Literal["met", "missed", "not measured", "not seen"]


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal with what was found.

    Attributes:
        name: What is measured.
        target: The goal, in words.
        found: What was found, in words.
        verdict: Whether that meets it; "not measured" also on a device that the goals are not for.
    """

    name: str
    target: str
    found: str
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {
            "name": self.name,
            "target": self.target,
            "found": self.found,
            "verdict": self.verdict,
        }


LARGE = ("8x32k", "64x8k")
SHORT = ("32x4k", "128x4k")
MIN_FRACTION = 0.80
MIN_BF16_RATIO = 1.7
MAX_LATENCY_US = 7.6
MIN_ORIGINAL_RATIO = 20.0
MAX_OVERHEAD_US = 40.0


def goals(results: Results) -> list[Goal]:
    """Hold the results against the goals."""
    return [
        *_fractions(results),
        *_bf16(results),
        _latency(results),
        *_original(results),
        _step(results),
    ]


def _fractions(results: Results) -> Iterator[Goal]:
    for workload in LARGE:
        figure = _ours(results, workload)
        fraction = None if figure is None else results.fractions(figure)["fraction_of_nominal"]
        text = (
            "" if fraction is None else f"{fraction:.1%} ({_rate(figure)} of {_nominal(results)})"
        )
        yield _judge(
            results,
            f"{workload} {LLAMA.label}, fraction of the nominal bandwidth",
            f"{MIN_FRACTION:.0%} or more",
            text,
            None if fraction is None else fraction >= MIN_FRACTION,
        )


def _bf16(results: Results) -> Iterator[Goal]:
    for workload in LARGE:
        row = results.row(workload, LLAMA.label)
        best = None if row is None else best_bf16(row)
        ratio = None if best is None or best.speedup is None else best.speedup.median
        yield _judge(
            results,
            f"{workload} {LLAMA.label}, against the best BF16 kernel",
            f"{MIN_BF16_RATIO}x or more",
            "" if ratio is None or best is None else f"{ratio:.2f}x ({best.name})",
            None if ratio is None else ratio >= MIN_BF16_RATIO,
        )


def _latency(results: Results) -> Goal:
    figure = _ours(results, "1x1k")
    us = None if figure is None else figure.us.median
    return _judge(
        results,
        f"1x1k {LLAMA.label}, time",
        f"{MAX_LATENCY_US} us or less",
        "" if us is None else f"{us:.2f} us",
        None if us is None else us <= MAX_LATENCY_US,
    )


def _original(results: Results) -> Iterator[Goal]:
    for workload in SHORT:
        row = results.row(workload, LLAMA.label)
        figure = None if row is None else row.figure(ORIGINAL)
        ratio = None if figure is None or figure.speedup is None else figure.speedup.median
        yield _judge(
            results,
            f"{workload} {LLAMA.label}, against the original's algorithm",
            f"{MIN_ORIGINAL_RATIO:.0f}x or more",
            "" if ratio is None else f"{ratio:.1f}x",
            None if ratio is None else ratio >= MIN_ORIGINAL_RATIO,
        )


def _step(results: Results) -> Goal:
    row = results.step
    us = None if row is None else row.overhead.median
    return _judge(
        results,
        "a step of 64 sessions from pinned inputs to pinned outputs, over its kernels",
        f"+ {MAX_OVERHEAD_US:.0f} us or less",
        "" if us is None or row is None else f"+ {us:.1f} us ({row.label})",
        None if us is None else us <= MAX_OVERHEAD_US,
    )


def _judge(results: Results, name: str, target: str, found: str, is_met: bool | None) -> Goal:
    if is_met is None:
        return Goal(name, target, found, "not measured")
    device = str(results.device.get("name"))
    if not is_h200(device):
        return Goal(name, target, f"{found}, on a {device}", "not measured")
    return Goal(name, target, found, "met" if is_met else "missed")


def best_bf16(row: DecodeRow) -> Figure | None:
    """Return the fastest BF16 contestant, None when there was none."""
    figures = [figure for figure in row.figures if figure.dtype == "bf16"]
    return min(figures, key=lambda figure: figure.us.median, default=None)


def _ours(results: Results, workload: str) -> Figure | None:
    row = results.row(workload, LLAMA.label)
    return None if row is None else row.figure(OURS)


def _rate(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.gb_per_s / 1e3:.2f} TB/s"


def _nominal(results: Results) -> str:
    nominal = results.nominal_gb_per_s
    return "an unknown bandwidth" if nominal is None else f"{nominal / 1e3:.2f} TB/s"


# ---- Tables -------------------------------------------------------------------------------------


def decode_table(results: Results) -> list[str]:
    """Return the kernels' figures beside those of the fastest BF16 kernel and the original's algorithm."""
    head = ("case", "us", "p10", "p90", "GB/s", "of read", "nominal", "best BF16", "original")
    return align([head, *(_decode_cells(results, row) for row in results.decode)])


def goals_table(found: Sequence[Goal]) -> list[str]:
    """Return the goals as a table."""
    return align(
        [("goal", "target", "found", ""), *((g.name, g.target, g.found, g.verdict) for g in found)]
    )


def step_table(results: Results) -> list[str]:
    """Return the step path's and the append kernel's figures."""
    lines = [
        (f"append, {append.label}", _microseconds(append.figure.us), _rate(append.figure))
        for append in results.append
    ]
    if results.step is not None:
        for name in ("kernels", "resident", "host", "overhead", "host_copies"):
            summary = getattr(results.step, name)
            lines.append((f"step, {name.replace('_', ' ')}", _microseconds(summary), ""))
    return align(lines)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines whose columns start below each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def _decode_cells(results: Results, row: DecodeRow) -> tuple[str, ...]:
    ours = row.figure(OURS)
    assert ours is not None, "every row has the kernels"
    fractions = results.fractions(ours)
    us = ours.us
    return (
        row.label,
        *(f"{value:.2f}" for value in (us.median, us.p10, us.p90)),
        f"{ours.gb_per_s:.0f}",
        _percent(fractions["fraction_of_read"]),
        _percent(fractions["fraction_of_nominal"]),
        _times(best_bf16(row)),
        _times(row.figure(ORIGINAL)),
    )


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _times(figure: Figure | None) -> str:
    return "-" if figure is None or figure.speedup is None else f"{figure.speedup.median:.2f}x"


def _microseconds(summary: Summary) -> str:
    return f"{summary.median:.1f} us ({summary.p10:.1f} to {summary.p90:.1f})"
