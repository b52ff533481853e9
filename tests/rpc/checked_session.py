"""A client's session with an oracle beside it: what is sent is drawn, what comes back is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo_client import AsyncSession, BatchResult, DecodeResult, Session
from octavo_client.oracle import AttentionOptions, OracleCache, check
from tests.rpc.wire import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS, SM_SCALE

Tensors = tuple[Any, Any, Any]

_rng = np.random.default_rng(11)


def draw(*shape: int, dtype: Any = np.float32) -> Any:
    """Return random heads."""
    return _rng.standard_normal((*shape, HEAD_DIM)).astype(dtype)


def draw_step(num_tokens: int = 1, dtype: Any = np.float32) -> Tensors:
    """Return q, k and v."""
    heads = (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (draw(num_tokens, num_heads, dtype=dtype) for num_heads in heads)
    return q, k, v


def draw_prompt(num_tokens: int) -> tuple[Any, Any]:
    """Return k and v of every layer."""
    k, v = (draw(NUM_LAYERS, num_tokens, NUM_KV_HEADS) for _ in "kv")
    return k, v


class Checked:
    """What a session must hold; steps are checked in the order in which they take effect."""

    def __init__(self, session: Session | AsyncSession) -> None:
        self.session = session
        self.layers = [OracleCache(AttentionOptions(SM_SCALE)) for _ in range(NUM_LAYERS)]

    def take_prompt(self, prompt: tuple[Any, Any]) -> None:
        """Note an append."""
        for cache, k, v in zip(self.layers, *prompt, strict=True):
            cache.append(k, v)

    def check(self, layer: int, tensors: Tensors, result: DecodeResult) -> None:
        """Note a step and check its answer."""
        q, k, v = tensors
        start_pos = len(self.layers[layer])
        self.layers[layer].append(k, v)
        exact = self.layers[layer].attend(q, start_pos=start_pos)
        check(result.out, exact)
        if result.lse is not None:
            np.testing.assert_allclose(result.lse, exact.lse, atol=1e-4)

    @property
    def lengths(self) -> tuple[int, ...]:
        """What the server must report."""
        return tuple(map(len, self.layers))


def check_batch(
    checked: Sequence[Checked], layer: int, tensors: Tensors, batch: BatchResult
) -> None:
    """Check a batch of one token for each session."""
    for entry_idx, session in enumerate(checked):
        q, k, v = (rows[entry_idx : entry_idx + 1] for rows in tensors)
        session.check(layer, (q, k, v), batch[entry_idx])
