"""Writes docs/when-it-pays.md and its plot from the committed results: `make pay-page`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.bench_library import ROOT
from tests.bench.rpc.pay import (
    Network,
    StepCost,
    cache_gb,
    even_tokens,
    fp16_token_bytes,
    read_costs,
    read_ms,
    read_rate,
    wire_ms,
)
from tests.bench.rpc.pay_plot import X_RANGE, Curve, plot
from tests.bench.shapes import LLAMA

RESULTS = ROOT / "tests" / "bench" / "results"
PAGE = ROOT / "docs" / "when-it-pays.md"
PLOT = ROOT / "docs" / "when-it-pays.svg"

JONES = "[measured by E. Jones, 2021](https://www.evanjones.ca/network-latencies-2021.html)"
NETWORKS = (
    Network("the same host", 0, "loopback; it is in the step's own cost"),
    Network("the same rack", 50, "assumed; Lamina publishes 33 us over RDMA, 67 us over NCCL"),
    Network("the same zone", 100, "assumed for a quiet network"),
    Network(
        "the same region",
        500,
        f"TCP echoes between cloud hosts, about the 80th percentile, {JONES}",
    ),
    Network("another zone", 1000, "assumed; AWS speaks of single-digit milliseconds"),
)
LAYERS = (16, 32, 80)
BATCHES = (1, 64)
CONTEXTS = (2048, 8192, 32768)
LINK_GB_PER_S = 3.125
"""25 Gbit/s."""

H200_GB_PER_S = 4800.0
CPU_ROW = "8x4k 32/8/128 block 32"
COLORS = ("#2b6cb0", "#2f8f5b", "#c8102e")


@dataclass(frozen=True, slots=True)
class Figures:
    """What the page is made of.

    Attributes:
        octavo: A step's cost.
        echo: An echo's of the same bytes, the floor.
        cpu_gb_per_s: Rate at which the cpu backend attends.
        wire_run: What the costs were measured on and when.
        cpu_run: Likewise, of the rate.
    """

    octavo: StepCost
    echo: StepCost
    cpu_gb_per_s: float
    wire_run: str
    cpu_run: str


def read_figures(folder: Path = RESULTS) -> Figures:
    """Read the committed results of bench-rpc and bench-cpu."""
    rpc, cpu = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("rpc.json", "cpu.json")
    )
    return Figures(*read_costs(rpc), read_rate(cpu, CPU_ROW), _run(rpc), _run(cpu))


def _run(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['processor']}, {machine['num_threads']} cores, {machine['date']}"


def page(figures: Figures) -> str:
    """Return the page as Markdown."""
    lines = [
        *_introduction(figures),
        *_networks(),
        *_wire(figures),
        *_memory(),
        *_reading(figures),
        *_even(figures),
        *_pipeline(),
    ]
    return "\n".join(lines) + "\n"


def _introduction(figures: Figures) -> list[str]:
    return [
        "# When does it pay",
        "",
        "Written by `make pay-page` from the results of `make bench-rpc` and `make bench-cpu`; do not edit. Shapes are "
        f"Llama 3.1 8B's in each layer ({LLAMA.label}: q heads, kv heads, head_dim), one new token a session, FP16 on "
        "the wire. The arithmetic is in [pay.py](../tests/bench/rpc/pay.py).",
        "",
        "A token waits for one step per layer. A step costs the network's round trip, and what client, server and gRPC "
        f"take beside it, measured over loopback with a backend that computes nothing ({figures.wire_run}; both sides "
        f"share the cores): **{figures.octavo.one_us:,.0f} us with one session, {figures.octavo.many_us:,.0f} us with "
        f"64**. An echo of the same bytes in grpcio, the floor of a Python server, takes {figures.echo.one_us:,.0f} "
        f"and {figures.echo.many_us:,.0f} us.",
        "",
    ]


def _networks() -> Iterator[str]:
    yield "## What it costs"
    yield ""
    rows = [(n.name, f"{n.round_trip_us:,.0f}", n.source) for n in NETWORKS]
    yield from _table(("the server is in", "round trip, us", "from"), rows)
    yield f"A link carries {LINK_GB_PER_S * 8:g} Gbit/s here (assumed). Measure your own network before you decide."
    yield ""


def _wire(figures: Figures) -> Iterator[str]:
    yield (
        "Milliseconds that the wire adds to a token, whatever the context; in brackets, with the echo's cost in the "
        "place of Octavo's:"
    )
    yield ""
    head = ["the server is in"]
    head += [f"{n} layers, batch of {batch}" for batch in BATCHES for n in LAYERS]
    rows = []
    for network in NETWORKS:
        cells = [
            "{:.1f} ({:.1f})".format(
                *(
                    wire_ms(cost, network, num_layers, batch, LINK_GB_PER_S)
                    for cost in (figures.octavo, figures.echo)
                )
            )
            for batch in BATCHES
            for num_layers in LAYERS
        ]
        rows.append((network.name, *cells))
    yield from _table(head, rows)
    ratio = figures.octavo.many_us / figures.octavo.one_us
    yield (
        f"A step of 64 sessions costs {ratio:.1f} times one of a single session on the same host, so a batch of 64 "
        f"decodes {64 / ratio:.0f} times the tokens a second, as far as the wire goes. Batches hide it from "
        "throughput, never from latency."
    )
    yield ""
    yield "![What the wire adds to a token, by network and layers](when-it-pays.svg)"
    yield ""


def _memory() -> Iterator[str]:
    int8, fp16 = LLAMA.token_bytes, fp16_token_bytes()
    yield "## What it gains: memory"
    yield ""
    yield (
        f"A cached token takes {fp16:,} bytes a layer in FP16 and {int8:,} in INT8, so a pool holds {fp16 / int8:.2f} "
        "times the tokens. 64 sessions, gigabytes (10^9) that the machine with the weights no longer holds, and what "
        "the server holds instead:"
    )
    yield ""
    head = ["context", *(f"{n} layers: FP16 freed, INT8 held" for n in LAYERS)]
    rows = [
        (
            f"{context:,}",
            *(
                f"{cache_gb(n, 64 * context, fp16):,.1f}, {cache_gb(n, 64 * context, int8):,.1f}"
                for n in LAYERS
            ),
        )
        for context in CONTEXTS
    ]
    yield from _table(head, rows)


def _reading(figures: Figures) -> Iterator[str]:
    yield "## What attention takes"
    yield ""
    yield (
        "Reading the cache once is what attention costs a token at the least, wherever it runs. Milliseconds for 64 "
        "sessions and 32 layers, FP16 against INT8:"
    )
    yield ""
    rates = _rates(figures)
    rows = [
        (
            f"{context:,}",
            *(
                "{:,.1f} against {:,.1f}".format(
                    *(
                        read_ms(32, 64 * context, size, rate)
                        for size in (fp16_token_bytes(), LLAMA.token_bytes)
                    )
                )
                for _, rate in rates
            ),
        )
        for context in CONTEXTS
    ]
    yield from _table(("context", *(name for name, _ in rates)), rows)
    yield (
        f"The CPU's rate is what Octavo's kernels reached with two threads ({figures.cpu_run}). The GPU's is nominal: "
        "the CUDA kernels have not run on one yet."
    )
    yield ""


def _rates(figures: Figures) -> Sequence[tuple[str, float]]:
    return (
        (f"2 CPU cores, {figures.cpu_gb_per_s:.1f} GB/s", figures.cpu_gb_per_s),
        (f"H200, {H200_GB_PER_S:,.0f} GB/s", H200_GB_PER_S),
    )


def _even(figures: Figures) -> Iterator[str]:
    yield "## Where the two meet"
    yield ""
    yield (
        "Cached tokens of a batch of 64 from which on the wire costs less than the attention itself. In brackets: from "
        "which on the shorter read of INT8 has paid for the wire, where the memory at both ends is equally fast."
    )
    yield ""
    saved = fp16_token_bytes() - LLAMA.token_bytes
    rows = []
    for network in NETWORKS:
        us = wire_ms(figures.octavo, network, 1, 64, LINK_GB_PER_S) * 1e3
        cells = (
            f"{_tokens(us, LLAMA.token_bytes, rate)} ({_tokens(us, saved, rate)})"
            for _, rate in _rates(figures)
        )
        rows.append((network.name, *cells))
    yield from _table(("the server is in", *(name for name, _ in _rates(figures))), rows)
    yield (
        "So on latency alone a cache that fits beside the weights on a fast GPU is best left there. A cache elsewhere "
        "pays when it does not fit: when memory for the cache, not arithmetic, keeps the batch or the context small. "
        "Then the gigabytes above are batch or context gained, for the milliseconds above on each token."
    )
    yield ""


def _tokens(us: float, size: int, rate: float) -> str:
    count = even_tokens(us, size, rate)
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{round(count, -3):,.0f}"


def _pipeline() -> list[str]:
    return [
        "## What a pipeline hides",
        "",
        "`client.pipeline` has one micro-batch's step under way while the other computes. Where a layer of the whole "
        "batch takes c at the orchestrator, and a step of half the batch w, network and attention included, two "
        "micro-batches take max(c, c / 2 + w) a layer at best; one after the other, c and a whole step. That needs c "
        "to halve with the batch, as where it is bound by compute. Where c is the time to read the weights, each "
        "micro-batch takes all of it, and two of them take max(2 c, c + w). To try it: "
        "`python -m octavo_client.examples.pipelining`, `--fixed-us` for what does not halve.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""


def drawing(figures: Figures) -> str:
    """Return the plot as SVG."""
    low, high = X_RANGE
    steps = [low * (high / low) ** (idx / 40) for idx in range(41)]
    curves = [
        Curve(
            "" if is_echo else f"{num_layers} layers",
            color,
            is_echo,
            [
                (us, wire_ms(cost, Network("", us, ""), num_layers, 1, LINK_GB_PER_S))
                for us in steps
            ],
        )
        for num_layers, color in zip(LAYERS, COLORS, strict=True)
        for cost, is_echo in ((figures.octavo, False), (figures.echo, True))
    ]
    marks = [(n.name.removeprefix("the "), n.round_trip_us) for n in NETWORKS if n.round_trip_us]
    return plot("What the wire adds to a token, one session a step; dashed: an echo", curves, marks)


def main() -> None:
    """Write the page and its plot."""
    figures = read_figures()
    PAGE.write_text(page(figures), encoding="utf-8")
    PLOT.write_text(drawing(figures), encoding="utf-8")
    print(f"wrote {PAGE} and {PLOT}")


if __name__ == "__main__":
    main()
