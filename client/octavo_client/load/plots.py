"""The report's plots as SVG, drawn by matplotlib: latency over time, as a distribution, and against throughput."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from octavo_client.load.histogram import bucket_bounds
from octavo_client.load.results import PointResult

_INK, _FAINT, _GRID = "#22272e", "#8a929c", "#e3e6ea"
_COLORS = ("#c8102e", "#2b6cb0", "#2f8f5b", "#c98a1b", "#7b4fa3", "#6b7480")
_RC: Any = {
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
_TAIL_NINES = 4
_NS_PER_MS = 1e6

Draw = Callable[[Any, Sequence[PointResult]], None]


def plots(points: Sequence[PointResult]) -> list[str]:
    """Return the plots that there is data for, one SVG element each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    measured = [result for result in points if result.tally.latency.num_values]
    if not measured:
        return []
    draws: list[Draw] = [draw_over_time, draw_distribution]
    if len(measured) > 1:
        draws.insert(0, draw_throughput)
    return [_svg([draw], measured) for draw in draws]


def one_plot(points: Sequence[PointResult]) -> str:
    """Return all plots side by side as one SVG file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Nothing was measured.
    """
    measured = [result for result in points if result.tally.latency.num_values]
    if not measured:
        raise ValueError("there is nothing to draw: no step was measured")
    draws: list[Draw] = [draw_over_time, draw_distribution]
    if len(measured) > 1:
        draws.insert(0, draw_throughput)
    return _svg(draws, measured)


def draw_throughput(axis: Any, points: Sequence[PointResult]) -> None:
    """Draw latency against throughput, one point a load."""
    rates = [result.rate(result.tally.num_steps) for result in points]
    for percent, color in zip((50, 95, 99), _COLORS, strict=False):
        times = [result.tally.latency.percentile(percent) / _NS_PER_MS for result in points]
        axis.plot(rates, times, "o-", color=color, markersize=4, label=f"p{percent}")
    for result, rate in zip(points, rates, strict=True):
        time = result.tally.latency.percentile(99) / _NS_PER_MS
        axis.annotate(
            f"{result.point.value:g}",
            (rate, time),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=_FAINT,
        )
    axis.set_xlim(0, None)
    axis.set_yscale("log")
    _frame(axis, f"Latency against throughput, by {points[0].point.kind}", "steps/s")


def draw_over_time(axis: Any, points: Sequence[PointResult]) -> None:
    """Draw p50 and p99 of every interval."""
    for result, color in zip(points, _cycle(len(points)), strict=True):
        moments = sorted(result.moments.items())
        times = [(moment + 0.5) * result.moment_s for moment, _ in moments]
        for percent, style in ((50, "-"), (99, ":")):
            values = [latency.percentile(percent) / _NS_PER_MS for _, latency in moments]
            label = result.point.label if percent == 50 else None
            axis.plot(times, values, style, color=color, linewidth=1.4, label=label)
    axis.set_yscale("log")
    _frame(axis, "Latency over time: p50, dotted p99", "seconds")


def draw_distribution(axis: Any, points: Sequence[PointResult]) -> None:
    """Draw the percentiles of each load, with as much room for every further nine."""
    for result, color in zip(points, _cycle(len(points)), strict=True):
        shares, times = _tail(result)
        axis.plot(shares, times, color=color, linewidth=1.4, label=result.point.label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(1, 10**_TAIL_NINES)
    nines = range(_TAIL_NINES + 1)
    axis.set_xticks([10**n for n in nines], [f"{100 - 100 / 10**n:g}%" for n in nines])
    axis.minorticks_off()
    _frame(axis, "Latency distribution", "percentile")


def _tail(result: PointResult) -> tuple[list[float], list[float]]:
    """Return 1 / (share of slower steps) and milliseconds, by bucket."""
    latency = result.tally.latency
    shares, times, seen = [1.0], [latency.least / _NS_PER_MS], 0
    for bucket, count in sorted(latency.counts.items()):
        seen += count
        slower = max(latency.num_values - seen, 0.5)
        shares.append(latency.num_values / slower)
        times.append(min(bucket_bounds(bucket)[1], latency.most) / _NS_PER_MS)
    return shares, times


def _cycle(count: int) -> list[str]:
    return [_COLORS[idx % len(_COLORS)] for idx in range(count)]


def _frame(axis: Any, title: str, x_label: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415 - only who draws needs it

    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(x_label)
    axis.set_ylabel("milliseconds")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(axis="y", color=_GRID, linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(framealpha=0.8, edgecolor="none", fontsize=9)


def _svg(draws: Sequence[Draw], points: Sequence[PointResult]) -> str:
    import matplotlib as mpl  # noqa: PLC0415 - only who draws needs it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_RC):
        figure = Figure(figsize=(6.4 * len(draws), 4.2), layout="constrained")
        for axis, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            draw(axis, points)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
