"""What the demo shows, with and without a terminal."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from octavo_client.demo.display import show_phase, show_texts, show_waiting, text_panels


def console_of(*, is_terminal: bool, kind: str = "xterm") -> tuple[Console, io.StringIO]:
    """Return a console, whatever terminal the tests run on, and what it writes to."""
    file = io.StringIO()
    console = Console(
        file=file,
        force_terminal=is_terminal,
        width=80,
        color_system=None,
        _environ={"TERM": kind},
    )
    return console, file


def test_lines_come_at_once_and_then_in_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console, file = console_of(is_terminal=False)
    with show_phase(console, "scoring") as progress:
        for done in range(50):
            progress(done, 50)
            now += 0.125
    lines = file.getvalue().splitlines()
    assert lines[0] == "scoring ..."
    assert lines[1:-1] == ["scoring: 16 of 50", "scoring: 32 of 50", "scoring: 48 of 50"]
    assert lines[-1] == "scoring: done in 6.2 s"


def test_bar_on_a_terminal() -> None:
    console, file = console_of(is_terminal=True)
    with show_phase(console, "scoring") as progress:
        progress(7, 7)
    assert "scoring" in file.getvalue()
    assert "7/7" in file.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_waiting_tells_the_news(is_terminal: bool) -> None:
    console, file = console_of(is_terminal=is_terminal)
    with show_waiting(console, "starting") as tell:
        tell("compiling [bold]now[/bold]")
    assert "starting" in file.getvalue()
    assert is_terminal or "0 s, compiling [bold]now[/bold]" in file.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_texts_while_they_grow(is_terminal: bool) -> None:
    console, file = console_of(is_terminal=is_terminal)
    with show_texts(console, ["And", "In"], num_tokens=30) as show:
        show(12, [" he said [to] them", " the city"])
    assert "he said [to] them" in file.getvalue()
    assert is_terminal == ("In the city" in file.getvalue())
    assert is_terminal or "decoding 2 at once: 12 of 30 tokens each" in file.getvalue()


def test_a_dumb_terminal_gets_lines() -> None:
    console, file = console_of(is_terminal=True, kind="dumb")
    with show_waiting(console, "starting") as tell:
        tell("compiling")
    with show_phase(console, "scoring") as progress:
        progress(7, 7)
    with show_texts(console, ["In"], num_tokens=30) as show:
        show(12, [" the city"])
    assert "starting: 0 s, compiling\nscoring ...\n" in file.getvalue()
    assert "decoding 1 at once: 12 of 30 tokens each" in file.getvalue()


def test_panels_keep_the_end_and_no_control_characters() -> None:
    console, file = console_of(is_terminal=False)
    console.print(text_panels(["A prompt: "], ["its \x1b[31mtext"], tail=8))
    assert "[31mtext" in file.getvalue()
    assert "\x1b" not in file.getvalue()
    assert "prompt" not in file.getvalue()
