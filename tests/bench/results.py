"""What the benchmark found, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.contest import Entrant, speedup
from tests.bench.shapes import Case
from tests.bench.stats import Summary

FORMAT = 1
"""Of the JSON file."""

OURS, OURS_IN_GRAPH, ORIGINAL = "octavo", "octavo, in a graph", "three passes"
"""Names among the contestants."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One contestant's time in one case.

    Attributes:
        name: Contestant.
        dtype: Of its cache.
        launch_bytes: What a launch has to read, or to move.
        us: Microseconds a launch.
        gb_per_s: launch_bytes over the median.
        num_launches: Launches of one sample.
        in_graph: Whether they were replayed from a CUDA graph.
        note: Error against float64, or why it was not captured.
        speedup: How many times as fast as this the kernels were, round by round; None for themselves.
    """

    name: str
    dtype: str
    launch_bytes: int
    us: Summary
    gb_per_s: float
    num_launches: int
    in_graph: bool
    note: str
    speedup: Summary | None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """All contestants in one case.

    Attributes:
        label: The case.
        heads: q heads / kv heads / head_dim.
        workload: Name of the contexts.
        block_size: Of the paged cache.
        num_entries: Contexts.
        num_tokens: Tokens of them all.
        num_copies: Caches that launches rotate among.
        worst_error: Of the kernels, over the bound, where it was checked.
        plan: How a launch is split.
        figures: One a contestant, the kernels first.
    """

    label: str
    heads: str
    workload: str
    block_size: int
    num_entries: int
    num_tokens: int
    num_copies: int
    worst_error: float
    plan: dict[str, int]
    figures: list[Figure]

    def figure(self, name: str) -> Figure | None:
        """Return a contestant's figure, None when it did not take part."""
        return next((figure for figure in self.figures if figure.name == name), None)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What the memory did, GB/s; a copy counts bytes read and written."""

    read_gb_per_s: Summary
    copy_gb_per_s: Summary
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AppendRow:
    """The append kernel in one shape; `figure.launch_bytes` are read and written."""

    label: str
    num_tokens: int
    figure: Figure


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step of 64 sessions, in microseconds.

    Attributes:
        label: Its shape.
        in_bytes: What is copied in, roughly: q, k and v.
        out_bytes: What is copied out.
        kernels: The kernels alone, append and decode, inputs and outputs on the device.
        resident: From pinned inputs to pinned outputs, the event waited on.
        host: From host arrays to host arrays: planning and host copies too.
        overhead: resident less kernels, round by round.
        host_copies: host less resident, round by round.
    """

    label: str
    in_bytes: int
    out_bytes: int
    kernels: Summary
    resident: Summary
    host: Summary
    overhead: Summary
    host_copies: Summary


@dataclass(slots=True)
class Results:
    """Everything, as it is found; `skipped` and `failed` are pairs of what and why."""

    device: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    bandwidth: list[Bandwidth] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    append: list[AppendRow] = field(default_factory=list)
    step: StepRow | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def read_gb_per_s(self) -> float | None:
        """Return the read bandwidth, before and after averaged; None when it was not measured."""
        medians = [found.read_gb_per_s.median for found in self.bandwidth]
        return sum(medians) / len(medians) if medians else None

    @property
    def nominal_gb_per_s(self) -> float | None:
        """Return the device's nominal bandwidth, None when it is not known."""
        nominal = self.device.get("nominal_bytes_per_s")
        return None if nominal is None else nominal / 1e9

    def row(self, workload: str, heads: str, block_size: int = 32) -> DecodeRow | None:
        """Return a case's row, None when it was not measured."""
        key = (workload, heads, block_size)
        rows = (r for r in self.decode if (r.workload, r.heads, r.block_size) == key)
        return next(rows, None)

    def fractions(self, figure: Figure) -> dict[str, float | None]:
        """Return a figure's bandwidth over the measured and the nominal one."""
        return {
            "fraction_of_read": _over(figure.gb_per_s, self.read_gb_per_s),
            "fraction_of_nominal": _over(figure.gb_per_s, self.nominal_gb_per_s),
        }


def figures_of(entrants: list[Entrant], notes: dict[str, str]) -> list[Figure]:
    """Return the entrants' figures; the first one is the one that speedups are of."""
    return [_figure(entrant, entrants[0], notes) for entrant in entrants]


def decode_row(
    case: Case, num_copies: int, worst_error: float, plan: dict[str, int], figures: list[Figure]
) -> DecodeRow:
    """Return a case's row."""
    workload = case.workload
    return DecodeRow(
        case.label,
        case.heads.label,
        workload.name,
        case.block_size,
        len(workload.lengths),
        workload.num_tokens,
        num_copies,
        worst_error,
        plan,
        figures,
    )


def as_json(results: Results, goals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results as they are saved: every figure with its fractions, and the goals."""
    saved: dict[str, Any] = {"format": FORMAT, **asdict(results)}
    for row, saved_row in zip(results.decode, saved["decode"], strict=True):
        for figure, saved_figure in zip(row.figures, saved_row["figures"], strict=True):
            saved_figure.update(results.fractions(figure))
    for append, saved_append in zip(results.append, saved["append"], strict=True):
        saved_append["figure"].update(results.fractions(append.figure))
    for name in ("skipped", "failed"):
        saved[name] = [{"what": what, "reason": reason} for what, reason in saved[name]]
    saved["goals"] = goals
    return saved


def save(path: Path, saved: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the results; a file that was there is replaced once the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(saved, indent=1) + "\n")
    scratch.replace(path)
    say(f"saved {path}")


def _figure(entrant: Entrant, ours: Entrant, notes: dict[str, str]) -> Figure:
    contestant, summary = entrant.contestant, entrant.summary
    note = ", ".join(text for text in (notes.get(contestant.name), entrant.note) if text)
    return Figure(
        contestant.name,
        contestant.dtype,
        contestant.launch_bytes,
        summary,
        contestant.launch_bytes / summary.median / 1e3,
        entrant.num_launches,
        entrant.replay is not None,
        note,
        None if entrant is ours else speedup(ours, entrant),
    )


def _over(rate: float, limit: float | None) -> float | None:
    return None if limit is None else rate / limit
