"""Random tokens of a case, and what attention over them has to answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo_client.oracle import (
    AttentionOptions,
    ExactAttention,
    OracleCache,
    error_ratios,
)
from octavo_server.model import default_sm_scale
from tests.bench.shapes import Case, Heads

HalfArray = NDArray[np.float16]

PEER_TOLERANCE = 3e-2
"""Relative error that tells a peer that is set up wrongly; an 8-bit cache of its own costs up to 1e-2."""


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """The tokens of a case; its contexts are of one length.

    Attributes:
        case: Whose.
        q: [num_sessions, num_q_heads, head_dim] float16, the last token of each session asks.
        k: [num_sessions, length, num_kv_heads, head_dim] float16.
        v: Like k.
        exact: What Octavo has to answer, num_tokens being num_sessions.
    """

    case: Case
    q: HalfArray
    k: HalfArray
    v: HalfArray
    exact: ExactAttention

    @property
    def num_sessions(self) -> int:
        """Return the contexts."""
        return len(self.q)

    @property
    def length(self) -> int:
        """Return the tokens of each context."""
        return self.case.workload.lengths[0]


def draw_case(case: Case, seed: int = 1) -> Draw:
    """Draw normal tokens and attend to them by the oracle."""
    assert case.workload.is_uniform, "peers take contexts of one length"
    generator = torch.Generator().manual_seed(seed)
    heads, lengths = case.heads, case.workload.lengths
    rows = (len(lengths), lengths[0], heads.num_kv_heads, heads.head_dim)
    q = normal(generator, (len(lengths), heads.num_q_heads, heads.head_dim))
    k, v = normal(generator, rows), normal(generator, rows)
    return Draw(case, q, k, v, _exact(heads, q, k, v))


def normal(generator: torch.Generator, shape: Sequence[int]) -> HalfArray:
    """Return normal values as float16."""
    drawn: HalfArray = torch.randn(*shape, generator=generator).half().numpy()
    return drawn


def oracle_cache(heads: Heads, k: HalfArray, v: HalfArray) -> OracleCache:
    """Return the oracle with one session's tokens.

    Args:
        heads: Of the layer.
        k: [num_tokens, num_kv_heads, head_dim].
        v: Like k.
    """
    cache = OracleCache(AttentionOptions(default_sm_scale(heads.head_dim)))
    cache.append(k, v)
    return cache


def worst_ratio(out: HalfArray, exact: ExactAttention) -> float:
    """Return the largest error over its bound; over 1 misses it, NaN counts as infinite."""
    return float(error_ratios(out, exact).max())


def relative_error(out: NDArray[Any], exact: ExactAttention) -> float:
    """Return the error of all answers together, relative to their norm; infinite for NaN."""
    error = np.linalg.norm(out.astype(np.float64) - exact.out) / np.linalg.norm(exact.out)
    return float(error) if np.isfinite(error) else float("inf")


def joined(answers: Iterable[ExactAttention]) -> ExactAttention:
    """Return answers one after the other."""
    return ExactAttention(*(np.concatenate(parts) for parts in zip(*answers, strict=True)))


def _exact(heads: Heads, q: HalfArray, k: HalfArray, v: HalfArray) -> ExactAttention:
    return joined(
        oracle_cache(heads, k[idx], v[idx]).attend(q[idx : idx + 1], start_pos=k.shape[1] - 1)
        for idx in range(len(q))
    )
