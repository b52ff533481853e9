"""What the benchmark found: every race with its blocks, and how that is saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.cpu.memory import MODES, Mode
from tests.bench.cpu.race import Block, fraction, ratio, steady, times
from tests.bench.shapes import Case
from tests.bench.stats import Summary

FORMAT = 1
"""Of the JSON file."""


LEAST_ROUNDS = 3
"""A mode with fewer was not seen."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant of a race.

    Attributes:
        name: Unique in its race.
        dtype: What its cache holds.
        launch_bytes: What one launch has to read, or to move.
        num_copies: Copies that its launches rotate over.
        error: Relative L2 error against float64, or 0 where bits are compared; None where there is no answer.
        of_bound: Octavo's error over its bound; None for others.
    """

    name: str
    dtype: str
    launch_bytes: int
    num_copies: int
    error: float | None = None
    of_bound: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One race.

    Attributes:
        label: What was raced over, unique.
        entries: The contestants, Octavo first.
        blocks: In the order of time.
        num_tokens: Cached tokens of a launch.
        case: What was attended to; None for what is not decoding.
    """

    label: str
    entries: list[Entry]
    blocks: list[Block]
    num_tokens: int
    case: Case | None = None

    @property
    def ours(self) -> Entry:
        """Return Octavo's entry."""
        return self.entries[0]

    def entry(self, name: str) -> Entry | None:
        """Return a contestant, None when it did not take part."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def modes(self) -> list[Mode]:
        """Return the modes that were seen: those in which enough rounds count."""
        return [mode for mode in MODES if self.num_rounds(mode) >= LEAST_ROUNDS]

    def num_rounds(self, mode: Mode | None = None) -> int:
        """Return the rounds that count, of one mode or of both."""
        return sum(block.num_rounds for block in steady(self.blocks, mode))

    def fastest(self, names: Sequence[str], blocks: Sequence[Block]) -> str | None:
        """Return the fastest of some contestants in some blocks, None when none took part."""
        timed = ((times(blocks, name), name) for name in names)
        found = [(summary.median, name) for summary, name in timed if summary is not None]
        return min(found)[1] if found else None


@dataclass(slots=True)
class Results:
    """Everything, as it is found; `skipped` and `failed` are pairs of what and why."""

    machine: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    wall_s: float = 0.0

    def row(self, label: str) -> Row | None:
        """Return a race, None when it was not run."""
        return next((row for row in self.rows if row.label == label), None)

    def reason(self, what: str) -> str | None:
        """Return why something was skipped, None when it was not."""
        return next((reason for name, reason in self.skipped if name == what), None)


def as_json(results: Results, goals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results as they are saved: all samples, and what each mode makes of them."""
    return {
        "format": FORMAT,
        "machine": results.machine,
        "software": results.software,
        "wall_s": round(results.wall_s, 1),
        "goals": goals,
        "rows": [_saved_row(row) for row in results.rows],
        **{
            name: [{"what": what, "reason": reason} for what, reason in pairs]
            for name, pairs in (("skipped", results.skipped), ("failed", results.failed))
        },
    }


def _saved_row(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "num_tokens": row.num_tokens,
        "block_size": None if row.case is None else row.case.block_size,
        "contestants": [asdict(entry) for entry in row.entries],
        "modes": {mode: _saved_mode(row, mode) for mode in row.modes()},
        "blocks": [_saved_block(block) for block in row.blocks],
    }


def _saved_mode(row: Row, mode: Mode) -> dict[str, Any]:
    blocks = steady(row.blocks, mode)
    return {
        "read_gb_per_s": round(mean_limit(blocks), 2),
        "us": {entry.name: _saved(times(blocks, entry.name)) for entry in row.entries},
        "fraction_of_read": {
            entry.name: _saved(fraction(blocks, entry.name, entry.launch_bytes))
            for entry in row.entries
        },
        "ours_times_as_fast": dict(_saved_ratios(row, blocks)),
    }


def _saved_ratios(row: Row, blocks: Sequence[Block]) -> Iterator[tuple[str, Any]]:
    for entry in row.entries[1:]:
        yield entry.name, _saved(ratio(blocks, entry.name, row.ours.name))


def summary_line(row: Row) -> str:
    """Return Octavo's share of the limit in each mode seen, in words."""
    return ", ".join(_mode_words(row, mode) for mode in row.modes()) or "no limits that agree"


def _mode_words(row: Row, mode: Mode) -> str:
    blocks = steady(row.blocks, mode)
    share = fraction(blocks, row.ours.name, row.ours.launch_bytes)
    return f"{mode} at {mean_limit(blocks):.0f} GB/s" + (
        f", {share.median:.0%} of it" if share else ""
    )


def mean_limit(blocks: Sequence[Block]) -> float:
    """Return the mean limit of some blocks, GB/s."""
    return sum(block.read_gb_per_s for block in blocks) / len(blocks)


def _saved_block(block: Block) -> dict[str, Any]:
    return {
        "before": asdict(block.before),
        "after": asdict(block.after),
        "mode": block.mode,
        "counts": block.is_steady,
        "us": {name: [round(us, 2) for us in samples] for name, samples in block.samples.items()},
    }


def _saved(summary: Summary | None) -> dict[str, Any] | None:
    """Return a summary with the digits that it has."""
    if summary is None:
        return None
    fields = asdict(summary)
    return {name: float(f"{x:.5g}") if name != "num_samples" else x for name, x in fields.items()}
