"""Exact causal attention in process, in FP32: what a server's answers are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from octavo_client.demo.model import FloatArray, IntArray, ModelConfig

__all__ = ["ExactAttention", "exact_attention", "softmax"]


class ExactAttention:
    """Causal grouped-query attention over an in-process FP32 KV cache; an `Attend`.

    It serves `num_seqs` sequences. Before each forward, `begin` says how many of the step's tokens
    belong to each sequence:

        model.forward(tokens, attention.begin([2, 1]), attention)
    """

    def __init__(self, config: ModelConfig, num_seqs: int = 1) -> None:
        """Reserve room for `max_context` tokens of each of `num_seqs` sequences."""
        shape = (config.num_layers, num_seqs, config.max_context)
        heads = (config.num_kv_heads, config.head_dim)
        self._keys = np.zeros(shape + heads, dtype=np.float32)
        self._values = np.zeros(shape + heads, dtype=np.float32)
        self._lengths = np.zeros(shape[:2], dtype=np.int64)
        self._counts: tuple[int, ...] = (0,) * num_seqs

    @property
    def num_seqs(self) -> int:
        """Number of sequences in the cache."""
        return len(self._keys[0])

    def lengths(self) -> IntArray:
        """Return the tokens cached for each sequence, `[num_seqs] int64`."""
        lengths: IntArray = self._lengths[-1]
        return lengths.copy()

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        """Announce a ragged step of `num_tokens[i]` new tokens for sequence i, zero allowed.

        Returns:
            The positions of the step's tokens, `[sum(num_tokens)] int64`, sequence after sequence.
        """
        if len(num_tokens) != self.num_seqs:
            raise ValueError(f"num_tokens must have {self.num_seqs} counts, got {len(num_tokens)}")
        self._counts = tuple(num_tokens)
        starts = self.lengths()
        runs = [start + np.arange(n) for start, n in zip(starts, num_tokens, strict=True)]
        return np.concatenate(runs).astype(np.int64)

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        """Append k and v, `[num_tokens, num_kv_heads, head_dim]`, and attend with q.

        Returns:
            `[num_tokens, num_q_heads, head_dim] float32`.
        """
        out = np.empty_like(q)
        for seq_idx, rows in self._runs(len(q)):
            keys, values = self._append(layer, seq_idx, k[rows], v[rows])
            out[rows] = exact_attention(q[rows], keys, values)
        return out

    def _runs(self, num_tokens: int) -> Iterator[tuple[int, slice]]:
        """Yield each sequence's index and its rows of the flat token axis."""
        if sum(self._counts) != num_tokens:
            raise ValueError(f"q must have the begun {sum(self._counts)} tokens, got {num_tokens}")
        start = 0
        for seq_idx, count in enumerate(self._counts):
            if count:
                yield seq_idx, slice(start, start + count)
            start += count

    def _append(
        self, layer: int, seq_idx: int, k: FloatArray, v: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Store k and v; return the sequence's all, `[context, num_kv_heads, head_dim]`."""
        start = int(self._lengths[layer, seq_idx])
        end = start + len(k)
        if end > self._keys.shape[2]:
            raise ValueError(f"sequence {seq_idx} must fit {self._keys.shape[2]} tokens, got {end}")
        self._keys[layer, seq_idx, start:end] = k
        self._values[layer, seq_idx, start:end] = v
        self._lengths[layer, seq_idx] = end
        return self._keys[layer, seq_idx, :end], self._values[layer, seq_idx, :end]


def exact_attention(q: FloatArray, keys: FloatArray, values: FloatArray) -> FloatArray:
    """Attend causally, the last query being at the last key.

    Args:
        q: `[num_tokens, num_q_heads, head_dim] float32`.
        keys: `[context, num_kv_heads, head_dim] float32`, with context >= num_tokens.
        values: Like `keys`.

    Returns:
        `[num_tokens, num_q_heads, head_dim] float32`.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    context, num_kv_heads, _ = keys.shape
    # Query head h reads kv head h // group: [num_kv_heads, group * num_tokens, head_dim].
    grouped = q.transpose(1, 0, 2).reshape(num_kv_heads, -1, head_dim)
    scores = grouped @ keys.transpose(1, 2, 0) * np.float32(head_dim**-0.5)
    scores = scores.reshape(num_q_heads, num_tokens, context)
    hidden = np.arange(context) > np.arange(context - num_tokens, context)[:, None]
    weights = softmax(np.where(hidden, np.float32(-np.inf), scores))
    mixed = weights.reshape(num_kv_heads, -1, context) @ values.transpose(1, 0, 2)
    return np.ascontiguousarray(mixed.reshape(num_q_heads, num_tokens, head_dim).transpose(1, 0, 2))


def softmax(x: FloatArray) -> FloatArray:
    """Return the softmax of `x` over its last axis."""
    exponents: FloatArray = np.exp(x - x.max(axis=-1, keepdims=True))
    total: FloatArray = exponents.sum(axis=-1, keepdims=True)
    return exponents / total
