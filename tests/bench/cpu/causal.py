"""A causal step of many tokens on a cached context, beside torch's attention alone on an FP32 cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from octavo_client.oracle import ExactAttention
from tests.bench.contest import Contestant
from tests.bench.cpu.draws import (
    PEER_TOLERANCE,
    HalfArray,
    joined,
    normal,
    oracle_cache,
    relative_error,
    worst_ratio,
)
from tests.bench.cpu.octavo import OCTAVO, Sessions, octavo_contestant
from tests.bench.cpu.racers import rotating
from tests.bench.cpu.results import Entry, Row
from tests.bench.cpu.setting import Setting
from tests.bench.shapes import LLAMA

NUM_CACHED, NUM_NEW = 4096, 512
LENGTH = NUM_CACHED + NUM_NEW
CAUSAL = f"causal step of {NUM_NEW} tokens on {NUM_CACHED} cached, {LLAMA.label}"

SDPA_FOLDED, SDPA_GQA = "torch SDPA FP32, heads folded", "torch SDPA FP32, enable_gqa"

_CHECKED_TOKENS = 64
"""Queries that the oracle answers at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One session.

    Attributes:
        q: [NUM_NEW, num_q_heads, head_dim] float16.
        k: [LENGTH, num_kv_heads, head_dim] float16.
        v: Like k.
    """

    q: HalfArray
    k: HalfArray
    v: HalfArray


def measure_causal(setting: Setting) -> None:
    """Time both, checked first; Octavo stores the tokens as well."""
    tokens = _draw()
    exact = _exact(tokens)
    ours, out = _octavo(setting, tokens)
    of_bound = worst_ratio(out, exact)
    if setting.is_wrong(CAUSAL, of_bound):
        return
    error = relative_error(out, exact)
    contestants, entries = [ours], [Entry(OCTAVO, "int8", ours.launch_bytes, 1, error, of_bound)]
    for peer, answer in _sdpa(tokens) if setting.with_peers else ():
        error = relative_error(answer.numpy(), exact)
        assert error <= PEER_TOLERANCE, f"{peer.name} is set up wrongly: error {error:.2g}"
        contestants.append(peer)
        entries.append(Entry(peer.name, peer.dtype, peer.launch_bytes, 1, error))
    setting.add(Row(CAUSAL, entries, setting.race(contestants), LENGTH))


def _draw() -> Tokens:
    generator = torch.Generator().manual_seed(4)
    rows = (LENGTH, LLAMA.num_kv_heads, LLAMA.head_dim)
    q = normal(generator, (NUM_NEW, LLAMA.num_q_heads, LLAMA.head_dim))
    return Tokens(q, normal(generator, rows), normal(generator, rows))


def _exact(tokens: Tokens) -> ExactAttention:
    cache = oracle_cache(LLAMA, tokens.k, tokens.v)
    return joined(
        cache.attend(tokens.q[first : first + _CHECKED_TOKENS], start_pos=NUM_CACHED + first)
        for first in range(0, NUM_NEW, _CHECKED_TOKENS)
    )


def _octavo(setting: Setting, tokens: Tokens) -> tuple[Contestant, HalfArray]:
    """Return the step, which stores the same tokens again each time, and its answer."""
    sessions = Sessions(setting.backend, LLAMA, 1, LENGTH)
    sessions.fill([0], tokens.k[None, :NUM_CACHED], tokens.v[None, :NUM_CACHED])
    batch = sessions.batch([0], NUM_CACHED, NUM_NEW, appends=True)
    new = tokens.k[NUM_CACHED:], tokens.v[NUM_CACHED:]

    def step(_: int) -> HalfArray:
        return sessions.step(batch, tokens.q, new)

    return octavo_contestant(OCTAVO, LENGTH * LLAMA.token_bytes, 1, step), step(0)


def _sdpa(tokens: Tokens) -> Iterator[tuple[Contestant, torch.Tensor]]:
    """Return SDPA with the heads of a group folded into its rows, and with heads as they are."""
    q = torch.from_numpy(tokens.q).float().transpose(0, 1).contiguous()
    mask = torch.zeros(NUM_NEW, LENGTH)
    mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(NUM_CACHED + 1), -torch.inf)
    rows = (1, LLAMA.num_kv_heads, LLAMA.group_size * NUM_NEW, LLAMA.head_dim)
    yield _sdpa_by(SDPA_FOLDED, tokens, q.reshape(rows), mask.repeat(LLAMA.group_size, 1))
    yield _sdpa_by(SDPA_GQA, tokens, q[None], mask)


def _sdpa_by(
    name: str, tokens: Tokens, q: torch.Tensor, mask: torch.Tensor
) -> tuple[Contestant, torch.Tensor]:
    """Return SDPA from q [1, heads, rows, head_dim], and its answer as Octavo's is laid out."""
    k, v = (
        torch.from_numpy(x).float().transpose(0, 1).contiguous()[None] for x in (tokens.k, tokens.v)
    )
    is_grouped = q.shape[1] != k.shape[1]

    def attend(_: int) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=is_grouped
        )

    out = attend(0).reshape(LLAMA.num_q_heads, NUM_NEW, LLAMA.head_dim).transpose(0, 1)
    return rotating(name, "fp32", k.nbytes + v.nbytes, 1, attend), out
