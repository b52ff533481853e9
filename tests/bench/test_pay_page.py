"""The page on when it pays: its arithmetic on figures that can be checked by hand, and that it is up to date."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from tests.bench.rpc.pay import (
    Network,
    StepCost,
    cache_gb,
    even_tokens,
    fp16_token_bytes,
    read_costs,
    read_ms,
    read_rate,
    step_bytes,
    wire_ms,
)
from tests.bench.rpc.pay_page import LAYERS, PAGE, PLOT, Figures, drawing, page, read_figures
from tests.bench.shapes import LLAMA


def results(octavo: float, echoes: tuple[float, float]) -> dict[str, Any]:
    """Return results of bench-rpc: each contestant's p50 with one session; with 64 it is ten times that."""
    names = ("Octavo, null backend", "echo", "echo, asyncio server")
    return {
        "rows": [
            {
                "label": f"one stream, {sessions} a step, p50",
                "rounds": {
                    name: [us * factor - 1, us * factor, us * factor + 90]
                    for name, us in zip(names, (octavo, *echoes), strict=True)
                },
            }
            for sessions, factor in (("1 session", 1), ("64 sessions", 10))
        ]
    }


def test_costs_are_the_medians_and_the_better_echo_s() -> None:
    octavo, echo = read_costs(results(800, (300, 350)))
    assert octavo == StepCost(800, 8000)
    assert echo == StepCost(300, 3000)
    with pytest.raises(ValueError, match="run make bench-rpc again"):
        read_costs({"rows": []})


def test_a_step_between_the_two_that_were_measured() -> None:
    cost = StepCost(100, 730)
    assert [cost.of(n) for n in (1, 2, 64)] == [100, 110, 730]


def test_the_wire_is_round_trip_step_and_bytes_in_every_layer() -> None:
    assert step_bytes(1) == 12_288 + 8_192
    network = Network("", 50, "")
    alone = wire_ms(StepCost(100, 730), network, 1, 1, link_gb_per_s=20.48)
    assert alone == pytest.approx((50 + 100 + 1) / 1e3)
    assert wire_ms(StepCost(100, 730), network, 80, 1, 20.48) == pytest.approx(80 * alone)
    many = wire_ms(StepCost(100, 730), network, 1, 64, 20.48)
    assert many == pytest.approx((50 + 730 + 64) / 1e3)


def test_bytes_and_reads() -> None:
    assert (LLAMA.token_bytes, fp16_token_bytes()) == (2080, 4096)
    assert cache_gb(32, 64 * 8192, fp16_token_bytes()) == pytest.approx(68.72, abs=0.01)
    assert read_ms(32, 1_000_000, 2080, 4800) == pytest.approx(13.87, abs=0.01)
    tokens = even_tokens(1000, 2080, 4800)
    assert read_ms(1, int(tokens), 2080, 4800) == pytest.approx(1, abs=1e-3)


def test_the_kernels_rate() -> None:
    row = {
        "label": "race",
        "contestants": [{"name": "Octavo", "launch_bytes": 3_000_000}, {"name": "other"}],
        "modes": {"narrow": {"us": {"Octavo": {"median": 100.0}}}},
    }
    assert read_rate({"rows": [row]}, "race") == pytest.approx(30)
    with pytest.raises(ValueError, match="run make bench-cpu again"):
        read_rate({"rows": [row]}, "another")


def test_the_committed_page_and_plot_are_those_of_the_committed_results() -> None:
    figures = read_figures()
    assert PAGE.read_text(encoding="utf-8") == page(figures), "run make pay-page"
    assert PLOT.read_text(encoding="utf-8") == drawing(figures), "run make pay-page"


def test_the_page_follows_its_figures() -> None:
    dear, cheap = (
        Figures(StepCost(us, 2 * us), StepCost(10, 20), 25.0, "here", "there") for us in (5000, 50)
    )
    assert page(dear) != page(cheap)
    assert drawing(dear) != drawing(cheap)
    first = re.search(r"^\| the same host \| ([\d.]+) \(", page(cheap), re.MULTILINE)
    assert first is not None
    assert float(first[1]) == pytest.approx(16 * 0.0566, abs=0.06)


def test_the_plot_is_whole() -> None:
    root = ET.fromstring(drawing(read_figures()))
    curves = [element for element in root if element.tag.endswith("polyline")]
    assert len(curves) == 2 * len(LAYERS)
    for curve in curves:
        for point in curve.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 70 <= x <= 630
            assert 50 <= y <= 360, "a curve leaves the axes"
