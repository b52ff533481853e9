"""When it pays: what the wire costs a token, and what a cache elsewhere gains. Pure arithmetic over measured figures.

A token is one step per layer, and each step waits for the network's round trip R, for the step's own cost on both hosts
s(batch) as measured over loopback with a backend that computes nothing, and for its bytes on the link:

    wire = num_layers * (R + s(batch) + batch * step_bytes / link)

s is linear between the two batches that are measured. Loopback moves the bytes through memory too, so the link's time
is, if anything, counted twice. Attention reads every cached token once:

    read = num_layers * cached_tokens * token_bytes / bandwidth
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.shapes import FP16_BYTES, LLAMA, Heads

ECHOES = ("echo", "echo, asyncio server")
OCTAVO = "Octavo, null backend"


@dataclass(frozen=True, slots=True)
class Network:
    """A way between an orchestrator and its server.

    Attributes:
        name: Where the server is.
        round_trip_us: Microseconds there and back.
        source: Where the figure is from.
    """

    name: str
    round_trip_us: float
    source: str


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step of one token a session costs beside the network: microseconds at two batch sizes.

    Attributes:
        one_us: Of a step of one session.
        many_us: Of a step of num_many sessions.
        num_many: The larger batch.
    """

    one_us: float
    many_us: float
    num_many: int = 64

    def of(self, num_sessions: int) -> float:
        """Return the microseconds of a step of some sessions."""
        slope = (self.many_us - self.one_us) / (self.num_many - 1)
        return self.one_us + (num_sessions - 1) * slope


def read_costs(results: Mapping[str, Any]) -> tuple[StepCost, StepCost]:
    """Read what a step costs, and an echo of its bytes (the better one's), from the results of bench-rpc.

    Raises:
        ValueError: A row or a contestant is missing.
    """
    found = {
        name: StepCost(_p50(results, 1, name), _p50(results, 64, name))
        for name in (*ECHOES, OCTAVO)
    }
    echo = StepCost(
        min(found[name].one_us for name in ECHOES), min(found[name].many_us for name in ECHOES)
    )
    return found[OCTAVO], echo


def _p50(results: Mapping[str, Any], num_sessions: int, name: str) -> float:
    label = f"one stream, {num_sessions} session{'s' * (num_sessions > 1)} a step, p50"
    for row in results["rows"]:
        if row["label"] == label and name in row["rounds"]:
            rounds: list[float] = row["rounds"][name]
            return statistics.median(rounds)
    raise ValueError(f"the results have no {name!r} in {label!r}; run make bench-rpc again")


def step_bytes(num_sessions: int, heads: Heads = LLAMA) -> int:
    """Return the bytes of a step's q, k, v and output in FP16, both ways together."""
    return num_sessions * 2 * (heads.num_q_heads + heads.num_kv_heads) * heads.head_dim * FP16_BYTES


def wire_ms(
    cost: StepCost, network: Network, num_layers: int, num_sessions: int, link_gb_per_s: float
) -> float:
    """Return the milliseconds that the wire adds to a token of each of the batch's sessions."""
    link_us = step_bytes(num_sessions) / (link_gb_per_s * 1e3)
    return num_layers * (network.round_trip_us + cost.of(num_sessions) + link_us) / 1e3


def fp16_token_bytes(heads: Heads = LLAMA) -> int:
    """Return what a cached token of one layer takes in FP16."""
    return 2 * heads.num_kv_heads * heads.head_dim * FP16_BYTES


def cache_gb(num_layers: int, num_tokens: int, token_bytes: int) -> float:
    """Return gigabytes (10^9) of a cache of all layers."""
    return num_layers * num_tokens * token_bytes / 1e9


def read_ms(num_layers: int, num_tokens: int, token_bytes: int, gb_per_s: float) -> float:
    """Return the milliseconds in which attention reads a cache of all layers once, at a bandwidth."""
    return cache_gb(num_layers, num_tokens, token_bytes) / gb_per_s * 1e3


def even_tokens(wire_layer_us: float, bytes_per_token: int, gb_per_s: float) -> float:
    """Return the cached tokens of a batch whose `bytes_per_token` take as long to read as the wire in a layer.

    With a token's INT8 bytes: where the wire costs as much as the attention itself. With the bytes that INT8 saves over
    FP16: where the shorter read has paid for the wire, on a device of the same bandwidth.
    """
    return wire_layer_us * gb_per_s * 1e3 / bytes_per_token


def read_rate(results: Mapping[str, Any], label: str) -> float:
    """Read the GB/s of cache at which the cpu backend attended in a row of bench-cpu's results, in narrow memory.

    Raises:
        ValueError: There is no such row.
    """
    for row in results["rows"]:
        if row["label"] == label:
            ours = row["contestants"][0]
            us: float = row["modes"]["narrow"]["us"][ours["name"]]["median"]
            return float(ours["launch_bytes"]) / us / 1e3
    raise ValueError(f"the results have no row {label!r}; run make bench-cpu again")
