"""The report in the terminal: two tables and what is to be said about them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table

from octavo_client.load.figures import LATENCY, THROUGHPUT, Column, warnings_of
from octavo_client.load.results import PointResult, RunResult

__all__ = ["format_figure", "print_report", "tables"]


def tables(points: Sequence[PointResult]) -> list[RenderableType]:
    """Return the tables of throughput and latency."""
    return [
        _table("Throughput", points, THROUGHPUT),
        _table("Latency, microseconds (stages are means)", points, LATENCY),
    ]


def print_report(console: Console, run: RunResult) -> None:
    """Print everything that there is to say about a run."""
    for table in tables(run.points):
        console.print(table)
    for line in report_lines(run):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def report_lines(run: RunResult) -> list[str]:
    """Return warnings, counts of errors and chaos, and faults."""
    lines = []
    for result in run.points:
        label = result.point.label
        lines += [f"{label}: {text}" for text in point_lines(result)]
        lines += [f"{label}: warning: {text}" for text in warnings_of(result)]
    if run.watch is not None and run.watch.sights:
        lines.append(run.watch.line())
    if run.num_left_open:
        lines.append(f"{run.num_left_open} sessions that were left open are closed")
    if run.was_restored:
        lines.append("the server holds what it held before: sessions and free blocks")
    lines += [f"FAULT: {fault}" for fault in run.all_faults]
    return lines


def point_lines(result: PointResult) -> list[str]:
    """Return what a load point has to say beside its figures."""
    lines = []
    tally, checks = result.tally, result.checks
    if tally.refusals:
        lines.append(f"errors by reason: {_counts(tally.refusals.most_common())}")
    if tally.chaos:
        lines.append(f"chaos: {_counts(sorted(tally.chaos.items()))}")
    if tally.num_stored_unanswered:
        lines.append(
            f"{tally.num_stored_unanswered} tokens were stored though their answer was lost"
        )
    if tally.lateness.num_values:
        p50, p99 = (value / 1e3 for value in tally.lateness.percentiles([50, 99]))
        lines.append(
            f"steps left {p50:.0f} us (p50) and {p99:.0f} us (p99) after they were due; "
            f"{tally.num_without_lane} waited for a lane"
        )
    if checks.num_checked:
        lines.append(
            f"{checks.num_checked} answers checked in contexts up to {checks.longest_context}, "
            f"{checks.num_wrong} wrong; worst error {checks.worst_ratio:.2f} of its bound; "
            f"at most {checks.most_waiting} waited"
        )
    if result.cpu_shares:
        shares = ", ".join(f"{share:.0%}" for share in result.cpu_shares)
        lines.append(f"the load test's processes used {shares} of a core")
    return lines


def format_figure(column: Column, result: PointResult) -> str:
    """Return a figure as the table shows it."""
    value = column.read(result)
    return "-" if value is None else f"{value:,.{column.digits}f}"


def _table(title: str, points: Sequence[PointResult], columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column(points[0].point.kind if points else "", justify="right")
    for column in columns:
        table.add_column(column.title, justify="right")
    for result in points:
        cells = [format_figure(column, result) for column in columns]
        table.add_row(f"{result.point.value:g}", *cells)
    return table


def _counts(items: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in items)
