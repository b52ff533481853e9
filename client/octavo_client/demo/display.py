"""What the demo shows: bars and panels on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["show_phase", "show_texts", "show_waiting", "text_panels"]

LINE_INTERVAL_S = 2.0
"""Between two lines where there is no terminal."""

REFRESHES_PER_S = 10
PANEL_LINES = 6
_BORDER_COLUMNS = 4

Update = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


class PlainLines:
    """Prints the latest of many lines, now and then: at once at first, then every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_s = 0.0

    def offer(self, line: str) -> None:
        """Print a line if it is time."""
        if time.monotonic() >= self._next_s:
            self._console.print(line, markup=False, highlight=False)
            self._next_s = time.monotonic() + LINE_INTERVAL_S


@contextmanager
def show_phase(console: Console, title: str) -> Iterator[Update]:
    """Show how far a phase is, and how long it took."""
    started = time.monotonic()
    if _can_redraw(console):
        with _bar(console) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        lines = PlainLines(console)
        lines.offer(f"{title} ...")
        yield lambda done, total: lines.offer(f"{title}: {done:,} of {total:,}")
        console.print(f"{title}: done in {time.monotonic() - started:.1f} s", highlight=False)


def _can_redraw(console: Console) -> bool:
    """Whether lines can be drawn over, which a terminal that calls itself dumb cannot."""
    return console.is_terminal and not console.is_dumb_terminal


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, refresh_per_second=REFRESHES_PER_S)


@contextmanager
def show_waiting(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Show that something is waited for, and for how long.

    Yields:
        What to call several times a second with the latest news, which may be empty.
    """
    started = time.monotonic()

    def line(news: str) -> str:
        elapsed = f"{title}: {time.monotonic() - started:.0f} s"
        return f"{elapsed}, {news}"[: console.width - 2] if news else elapsed

    if _can_redraw(console):
        with console.status(title) as status:
            yield lambda news: status.update(escape(line(news)))
    else:
        lines = PlainLines(console)
        yield lambda news: lines.offer(line(news))


@contextmanager
def show_texts(
    console: Console, prompts: Sequence[str], num_tokens: int
) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """Show texts while they grow to `num_tokens` tokens each: all their ends on a terminal, one elsewhere.

    Yields:
        What to call with the tokens drawn for each text, and every text's continuation so far.
    """
    if _can_redraw(console):
        with Live(console=console, refresh_per_second=REFRESHES_PER_S, transient=True) as live:
            tail = PANEL_LINES * (console.width - _BORDER_COLUMNS)
            yield lambda _drawn, texts: live.update(text_panels(prompts, texts, tail))
    else:
        lines = PlainLines(console)
        title = f"decoding {len(prompts)} at once"
        yield lambda drawn, texts: lines.offer(
            f"{title}: {drawn:,} of {num_tokens:,} tokens each, ... {texts[0][-40:]!r}"
        )


def text_panels(prompts: Sequence[str], texts: Sequence[str], tail: int | None = None) -> Group:
    """Return a panel per session, with the last `tail` characters of prompt and continuation."""
    return Group(*(_panel(*pair, tail) for pair in zip(prompts, texts, strict=True)))


def _panel(prompt: str, text: str, tail: int | None) -> Panel:
    content = Text(prompt, style="bold") + Text(text)
    return Panel(content if tail is None else content[-tail:])
