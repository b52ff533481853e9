"""The plot of the page: what the wire adds to a token against the network's round trip, a curve for each depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 90, 50, 60
X_RANGE, Y_RANGE = (10.0, 2000.0), (1.0, 1000.0)
INK, FAINT = "#22272e", "#c9ced4"


@dataclass(frozen=True, slots=True)
class Curve:
    """Milliseconds a token against microseconds of round trip.

    Attributes:
        label: Written at its right end.
        color: Of the line.
        is_dashed: Whether it is.
        points: (microseconds, milliseconds), by microseconds.
    """

    label: str
    color: str
    is_dashed: bool
    points: Sequence[tuple[float, float]]


def plot(title: str, curves: Sequence[Curve], marks: Sequence[tuple[str, float]]) -> str:
    """Return an SVG with logarithmic axes; `marks` are named round trips in microseconds."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 18, title, "start"),
        *_grid(),
        *_marks(marks),
        *(part for curve in curves for part in _curve(curve)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid() -> Iterator[str]:
    for power in range(4):
        y = _y(10.0**power)
        yield _line(LEFT, y, WIDTH - RIGHT, y)
        yield _text(LEFT - 8, y + 4, f"{10**power:,}", "end")
    for us in (10, 20, 50, 100, 200, 500, 1000, 2000):
        x = _x(us)
        yield _line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5)
        yield _text(x, HEIGHT - BOTTOM + 18, f"{us:,}", "middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield _text(middle, HEIGHT - 20, "network round trip, microseconds", "middle")
    yield _text(10, TOP - 10, "ms a token", "start")


def _marks(marks: Sequence[tuple[str, float]]) -> Iterator[str]:
    for idx, (name, us) in enumerate(marks):
        x = _x(us)
        yield _line(x, TOP, x, HEIGHT - BOTTOM, dash="2 3")
        yield _text(
            x, TOP - 4 - 12 * (idx % 2), name, "middle"
        )  # two rows: neighbours do not touch


def _curve(curve: Curve) -> Iterator[str]:
    points = " ".join(f"{_x(us):.1f},{_y(ms):.1f}" for us, ms in curve.points)
    dash = ' stroke-dasharray="6 4"' if curve.is_dashed else ""
    yield f'<polyline points="{points}" fill="none" stroke="{curve.color}" stroke-width="2"{dash}/>'
    _, last_ms = curve.points[-1]
    yield _text(WIDTH - RIGHT + 8, _y(last_ms) + 4, curve.label, "start", curve.color)


def _x(us: float) -> float:
    return LEFT + _share(us, *X_RANGE) * (WIDTH - LEFT - RIGHT)


def _y(ms: float) -> float:
    return HEIGHT - BOTTOM - _share(ms, *Y_RANGE) * (HEIGHT - TOP - BOTTOM)


def _share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _line(x1: float, y1: float, x2: float, y2: float, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{FAINT}"{dashed}/>'
    )


def _text(x: float, y: float, text: str, anchor: str, color: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{text}</text>'
