"""What is shown while a run goes on: a panel on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from octavo_client.load.figures import LATENCY, THROUGHPUT
from octavo_client.load.results import PointResult, Status, View
from octavo_client.load.table import format_figure

__all__ = ["live_view", "status_line"]

LINE_INTERVAL_S = 2.0
"""Between two lines where there is no terminal."""

REFRESHES_PER_S = 5
_PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@contextmanager
def live_view(console: Console) -> Iterator[View]:
    """Yield what shows a run on this console."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, refresh_per_second=REFRESHES_PER_S, transient=True) as live:
            yield _Panel(live)
    else:
        yield _Lines(console)


def status_line(status: Status) -> str:
    """Return a state in one line."""
    tally = status.result.tally
    head = f"{_title(status)}: {status.phase}"
    if status.phase == "checking answers":
        return f"{head}, {status.num_to_check} to go"
    if not status.recent.num_values:
        return head
    p50, p99 = (value / 1e6 for value in status.recent.percentiles([50, 99]))
    rate = status.recent.num_values / status.recent_s
    return (
        f"{head} {status.done:.0%}, {rate:,.0f} steps/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms, "
        f"errors {tally.refusals.total()}, unexpected {tally.faults.total()}, "
        f"checked {status.result.checks.num_checked}, wrong {status.result.checks.num_wrong}"
    )


class _Lines:
    """Prints the latest state now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_s = 0.0
        self._phase = ""

    def show(self, status: Status) -> None:
        """Print a line when the phase is another one, or it is time."""
        phase = status.phase.partition(":")[0]
        if phase != self._phase or time.monotonic() >= self._next_s:
            self._console.print(status_line(status), markup=False, highlight=False, soft_wrap=True)
            self._next_s = time.monotonic() + LINE_INTERVAL_S
            self._phase = phase

    def end_point(self, result: PointResult) -> None:
        """Print the most important figures."""
        print_point(self._console, result)


class _Panel:
    """Draws the state over and over."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, status: Status) -> None:
        """Draw a state."""
        self._live.update(panel(status))

    def end_point(self, result: PointResult) -> None:
        """Print the most important figures above the panel."""
        print_point(self._live.console, result)


def panel(status: Status) -> RenderableType:
    """Return a state as it is drawn."""
    tally, checks = status.result.tally, status.result.checks
    grid = Table.grid(padding=(0, 2))
    grid.add_row(f"[bold]{_title(status)}[/bold]", status.phase)
    grid.add_row("progress", ProgressBar(total=1, completed=min(status.done, 1), width=40))
    rate = status.recent.num_values / status.recent_s
    grid.add_row("throughput", f"{rate:,.0f} steps/s, {tally.num_steps:,} steps so far")
    now, so_far = (
        "  ".join(
            f"p{percent:g} {value / 1e6:,.2f}"
            for percent, value in zip(_PERCENTILES, h.percentiles(_PERCENTILES), strict=True)
        )
        for h in (status.recent, tally.latency)
    )
    grid.add_row("latency now, ms", now)
    grid.add_row("latency so far, ms", so_far)
    grid.add_row(
        "sessions", f"{tally.num_opened - tally.num_closed:,} open, {tally.num_opened:,} opened"
    )
    errors = ", ".join(f"{name} {count}" for name, count in tally.refusals.most_common(5))
    grid.add_row("errors", errors or "none")
    grid.add_row("unexpected", _alarming(tally.faults.total()))
    if tally.chaos:
        grid.add_row("chaos", ", ".join(f"{k} {n}" for k, n in sorted(tally.chaos.items())))
    waiting = f", {status.num_to_check:,} wait" if status.num_to_check else ""
    grid.add_row("answers", f"{checks.num_checked:,} checked{waiting}")
    grid.add_row("wrong", _alarming(checks.num_wrong))
    return Group(grid)


def print_point(console: Console, result: PointResult) -> None:
    """Print a load point's most important figures in one line."""
    wanted = {"steps_per_s", "tokens_per_s", "p50_us", "p99_us"}
    figures = ", ".join(
        f"{column.title} {format_figure(column, result)}"
        for column in (*THROUGHPUT, *LATENCY)
        if column.key in wanted
    )
    console.print(f"{result.point.label}: {figures}", markup=False, highlight=False)


def _title(status: Status) -> str:
    return f"{status.result.point.label} ({status.point_idx + 1} of {status.num_points})"


def _alarming(count: int) -> str:
    return f"[bold red]{count}[/bold red]" if count else "0"
