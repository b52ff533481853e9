"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.bench.cpu.memory import Mode
from tests.bench.cpu.race import fraction, ratio, steady, times
from tests.bench.cpu.results import Entry, Results, Row, mean_limit
from tests.bench.goals import Goal

PLOT_NAME = "cpu-context.svg"

_METHOD = """\
One token of each session, every contestant with the same number of threads over caches that hold the same tokens.
Octavo's threads are bound to a core each (`pin_threads`), its caller with them, as in the server; the others' are where
their libraries and the system put them.
Answers are checked first: Octavo's against its bound, the others' against 3% of relative error. Then contestants are
timed in turn, round by round, over copies of their caches, 12 times the last-level cache or 1 GiB, and the limit
(pure reads by all threads, the best of several ways) is measured before and after each round. A round whose two limits
differ by more than 10% does not count. "Wide" is memory in which all threads read at least 1.45 times as fast as one,
"narrow" the rest; it flips by itself, and a mode was seen when at least three rounds count. Times are medians with p10
and p90; "Octavo is" so many times as fast, the median of the ratios round by round."""


def as_markdown(results: Results, goals: Sequence[Goal], *, with_plot: bool) -> str:
    """Return the whole report."""
    parts = [
        "# CPU benchmark",
        _facts(results),
        _METHOD,
        "## Goals",
        _table(
            ("goal", "target", "found", "verdict"),
            [(goal.name, goal.target, goal.found, goal.verdict) for goal in goals],
        ),
        *(
            [f"## Time against context\n\n![Time against context]({PLOT_NAME})"]
            if with_plot
            else []
        ),
        "## Races",
        *(_race(row) for row in results.rows),
        *_list("Not measured", results.skipped),
        *_list("Failed", results.failed),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(results: Results) -> str:
    facts = {**results.machine, **results.software, "wall_s": f"{results.wall_s:.0f}"}
    return _table(("fact", "value"), [(name, str(value)) for name, value in facts.items()])


def _race(row: Row) -> str:
    modes = row.modes()
    lines = [f"### {row.label}", _about(row)]
    lines += [f"**{mode.capitalize()}.** {_mode(row, mode)}" for mode in modes]
    return "\n\n".join(lines if modes else [*lines, "Too few rounds whose limits agree."])


def _about(row: Row) -> str:
    all_rounds = sum(block.num_rounds for block in row.blocks)
    text = f"{row.num_tokens:,} tokens; {row.num_rounds()} of {all_rounds} rounds count."
    bound = row.ours.of_bound
    return text if bound is None else f"{text} Octavo's worst error is {bound:.2f} of its bound."


def _mode(row: Row, mode: Mode) -> str:
    blocks = steady(row.blocks, mode)
    head = f"Limit {mean_limit(blocks):.1f} GB/s, {row.num_rounds(mode)} samples each."
    table = _table(
        ("contestant", "cache", "ms", "p10", "p90", "MB", "of the limit", "Octavo is", "error"),
        [tuple(_cells(row, entry, mode)) for entry in row.entries],
    )
    return f"{head}\n\n{table}"


def _cells(row: Row, entry: Entry, mode: Mode) -> Iterator[str]:
    blocks = steady(row.blocks, mode)
    us, share = times(blocks, entry.name), fraction(blocks, entry.name, entry.launch_bytes)
    ours = None if entry is row.ours else ratio(blocks, entry.name, row.ours.name)
    yield entry.name
    yield entry.dtype
    yield from (f"{x / 1e3:.3f}" for x in (us.median, us.p10, us.p90)) if us else ("-",) * 3
    yield f"{entry.launch_bytes / 1e6:.1f}"
    yield f"{share.median:.0%}" if share else "-"
    yield f"{ours.median:.2f}x" if ours else "-"
    yield "-" if entry.error is None else f"{entry.error:.1e}"


def _list(title: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    if not pairs:
        return []
    return [f"## {title}", "\n".join(f"- {what}: {reason}" for what, reason in pairs)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
