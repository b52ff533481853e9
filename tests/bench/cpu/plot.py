"""Time against context, Octavo beside its peers, with the floor that the bandwidth sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.cpu.cases import SWEEP_BATCH, is_in_sweep
from tests.bench.cpu.ggml_peer import GGML_F16, GGML_Q8_0
from tests.bench.cpu.memory import MODES, Mode
from tests.bench.cpu.octavo import OCTAVO
from tests.bench.cpu.openvino_peer import OPENVINO
from tests.bench.cpu.race import steady, times
from tests.bench.cpu.results import Results, Row, mean_limit
from tests.bench.cpu.torch_peers import INT8_IN_PLACE, INT8_WAY
from tests.bench.shapes import LLAMA

FLOOR = "floor: a pure read of Octavo's bytes"
LEAST_POINTS = 4
"""A mode with fewer is no curve."""

_INK, _FAINT = "#22272e", "#8a929c"
_RC: dict[str, Any] = {
    "svg.hashsalt": "octavo",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _FAINT,
    "axes.linewidth": 0.8,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_STYLES: dict[str, tuple[str, str]] = {
    OCTAVO: ("#c8102e", "-"),
    FLOOR: (_INK, (0, (5, 3))),  # type: ignore[dict-item]
    OPENVINO: ("#7b4fa3", "-"),
    GGML_F16: ("#2f8f5b", "-"),
    GGML_Q8_0: ("#2f8f5b", "--"),
    "torch SDPA FP32": ("#c98a1b", "-"),
    "torch bmm FP32": ("#c98a1b", ":"),
    "torch SDPA BF16": ("#2b6cb0", "-"),
    "torch bmm BF16": ("#2b6cb0", ":"),
    INT8_WAY: ("#6b7480", "-"),
    INT8_IN_PLACE: ("#6b7480", ":"),
}
_LABELS = {
    OPENVINO: "OpenVINO u8",
    GGML_F16: "ggml F16",
    GGML_Q8_0: "ggml Q8_0",
    INT8_WAY: "torch INT8, SDPA",
    INT8_IN_PLACE: "torch INT8, kept buffers",
}
_LINE_SPACING = 0.043
"""Least distance of two labels, of the axis."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve.

    Attributes:
        name: Contestant, or FLOOR.
        points: (tokens of each context, milliseconds), by context.
    """

    name: str
    points: tuple[tuple[int, float], ...]


def series(results: Results, mode: Mode) -> list[Series]:
    """Return the curves of one mode: the floor, then contestants in the order of the races."""
    rows = _rows(results, mode)
    names = dict.fromkeys(entry.name for row in rows for entry in row.entries)
    floor = Series(FLOOR, tuple((_context(row), _floor_ms(row, mode)) for row in rows))
    return [floor, *(Series(name, tuple(_points(rows, name, mode))) for name in names)]


def save_plot(results: Results, path: Path, say: Callable[[str], None]) -> bool:
    """Draw the modes that have a curve; returns whether there was anything to draw, and to draw with."""
    modes = [mode for mode in MODES if len(_rows(results, mode)) >= LEAST_POINTS]
    if not modes:
        say("no plot: too few contexts were measured")
        return False
    try:
        figure = draw(results, modes)
    except ImportError as error:
        say(f"no plot: {error}")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    say(f"saved {path}")
    return True


def draw(results: Results, modes: Sequence[Mode]) -> Any:
    """Return the figure, one panel a mode; the same results give the same file."""
    import matplotlib as mpl  # noqa: PLC0415 - only who draws needs it
    from matplotlib.figure import Figure  # noqa: PLC0415

    rc: Any = mpl.rcParams
    rc.update(_RC)
    figure = Figure(figsize=(9.6, 0.5 + 5.7 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    for axis, mode in zip(panels, modes, strict=True):
        _draw_panel(axis, results, mode)
    threads = results.machine.get("num_threads", "?")
    title = f"Decode attention, {LLAMA.label} heads, {SWEEP_BATCH} sessions, {threads} threads"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def spread(positions: Sequence[float], distance: float) -> list[float]:
    """Return positions, ascending, moved as little as it takes to lie `distance` apart."""
    clusters: list[list[float]] = []
    for position in positions:
        clusters.append([position])
        while len(clusters) > 1 and _top(clusters[-2], distance) + distance > _bottom(
            clusters[-1], distance
        ):
            last = clusters.pop()
            clusters[-1] += last
    return [
        _bottom(cluster, distance) + idx * distance
        for cluster in clusters
        for idx in range(len(cluster))
    ]


def _bottom(cluster: Sequence[float], distance: float) -> float:
    return sum(cluster) / len(cluster) - distance * (len(cluster) - 1) / 2


def _top(cluster: Sequence[float], distance: float) -> float:
    return _bottom(cluster, distance) + distance * (len(cluster) - 1)


# ---- Curves -------------------------------------------------------------------------------------


def _rows(results: Results, mode: Mode) -> list[Row]:
    found = [
        row
        for row in results.rows
        if row.case is not None and is_in_sweep(row.case) and mode in row.modes()
    ]
    return sorted(found, key=lambda row: row.num_tokens)


def _context(row: Row) -> int:
    return row.num_tokens // SWEEP_BATCH


def _floor_ms(row: Row, mode: Mode) -> float:
    return row.ours.launch_bytes / mean_limit(steady(row.blocks, mode)) / 1e6


def _points(rows: Sequence[Row], name: str, mode: Mode) -> Iterator[tuple[int, float]]:
    for row in rows:
        summary = times(steady(row.blocks, mode), name)
        if summary is not None:
            yield _context(row), summary.median / 1e3


# ---- Drawing ------------------------------------------------------------------------------------


def _draw_panel(axis: Any, results: Results, mode: Mode) -> None:
    curves = series(results, mode)
    contexts, floor = zip(*curves[0].points, strict=True)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for curve in curves:
        _draw_curve(axis, curve)
    bottom = 0.6 * min(floor)
    axis.set_ylim(bottom, None)
    axis.fill_between(contexts, bottom, floor, color="#e9ecef", linewidth=0, zorder=0)
    limits = [mean_limit(steady(row.blocks, mode)) for row in _rows(results, mode)]
    axis.set_title(_title(mode, limits), loc="left", fontsize=10, color=_FAINT)
    _frame(axis, contexts)
    _label_ends(axis, curves)


def _frame(axis: Any, contexts: Sequence[int]) -> None:
    axis.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.08)
    axis.set_xticks(contexts, [_tokens(context) for context in contexts])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("context of each session, tokens")
    axis.set_ylabel("milliseconds a call")


def _title(mode: Mode, limits: Sequence[float]) -> str:
    low, high = min(limits), max(limits)
    rates = f"{low:.0f} GB/s" if round(low) == round(high) else f"{low:.0f} to {high:.0f} GB/s"
    return f"{mode} memory: pure reads at {rates}"


def _draw_curve(axis: Any, curve: Series) -> None:
    color, style = _STYLES.get(curve.name, (_FAINT, "-"))
    is_ours = curve.name == OCTAVO
    axis.plot(
        *zip(*curve.points, strict=True),
        color=color,
        linestyle=style,
        linewidth=2.8 if is_ours else 1.4,
        marker=None if curve.name == FLOOR else "o",
        markersize=6 if is_ours else 3.5,
        zorder=5 if is_ours else 3,
    )


def _label_ends(axis: Any, curves: Sequence[Series]) -> None:
    """Name each curve at its right end, with its time there."""
    low, high = (math.log(limit) for limit in axis.get_ylim())
    ends = sorted((curve.points[-1][::-1], curve.name) for curve in curves if curve.points)
    heights = [(math.log(ms) - low) / (high - low) for (ms, _), _ in ends]
    for ((ms, context), name), place in zip(ends, spread(heights, _LINE_SPACING), strict=True):
        _label(axis, name, (context, ms), place)


def _label(axis: Any, name: str, end: tuple[float, float], place: float) -> None:
    """Write at a height of the axis, with a line to the end of the curve."""
    color, _ = _STYLES.get(name, (_FAINT, "-"))
    axis.annotate(
        f"{_LABELS.get(name, name)}  {end[1]:.3g} ms",
        xy=end,
        xytext=(1.05, place),
        textcoords="axes fraction",
        color=color,
        fontweight="bold" if name == OCTAVO else "normal",
        va="center",
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.6,
            "relpos": (0, 0.5),
            "shrinkA": 2,
            "shrinkB": 3,
        },
    )


def _tokens(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
