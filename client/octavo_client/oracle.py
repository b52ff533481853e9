"""What answers are measured against: the quantiser in float32 and attention in float64.

Everything here is numpy, slow and meant to be read. Tests, the load test and anybody who doubts a
server keep an `OracleCache` beside a session, feed it the same K and V, and `check` what the server
returns:

    cache = OracleCache(AttentionOptions(sm_scale=head_dim**-0.5))
    cache.append(k, v)
    check(out, cache.attend(q, start_pos=0))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""An array of float16, bfloat16 or float32."""

TOLERANCES = {
    np.dtype(np.float32): 1e-4,
    np.dtype(np.float16): 1e-3,
    np.dtype(ml_dtypes.bfloat16): 4e-3,
}
"""Relative error that an answer of each dtype may have."""

MAX_CHECKED_SCORE = 100.0
"""The bound on the error holds while no attended score exceeds this."""

_SMALLEST_SCALE = np.float16(2.0**-24)
_SMALLEST_SUBNORMALS = {
    np.dtype(np.float32): 2.0**-149,
    np.dtype(np.float16): 2.0**-24,
    np.dtype(ml_dtypes.bfloat16): 2.0**-133,
}


class RowOffence(NamedTuple):
    """The first row that cannot be stored, in the order token, head.

    Attributes:
        token_idx: Token of the row.
        head_idx: Head of the row.
        is_overflow: True when the row is finite but its scale exceeds FP16, False when the row
            holds NaN or infinity.
    """

    token_idx: int
    head_idx: int
    is_overflow: bool


@dataclass(frozen=True, slots=True, eq=False)
class AttentionOptions:
    """The attention options of one layer.

    Attributes:
        sm_scale: Softmax scale.
        window: Tokens of the sliding window, 0 = none.
        soft_cap: Soft cap of the scores, 0 = none.
        sinks: [num_q_heads] float32 sink logits, or None.
    """

    sm_scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks: NDArray[np.float32] | None = None


class ExactAttention(NamedTuple):
    """Attention in float64, with what the bound on an answer's error needs.

    Attributes:
        out: [num_tokens, num_q_heads, head_dim] float64.
        lse: [num_tokens, num_q_heads] float64 log-sum-exp of the attended scores, sinks excluded.
        abs_out: [num_tokens, num_q_heads, head_dim] float64, the same attention over |v|.
        peak_score: [num_tokens, num_q_heads] float64 largest attended |score|, before the soft cap.
    """

    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    abs_out: NDArray[np.float64]
    peak_score: NDArray[np.float64]


def quantize(x: Array) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantise every row of `x` to INT8 codes and one FP16 scale.

    `scale = max|x| / 127` rounded up to FP16, so that no code clamps;
    `code = rint_even(x * (1 / scale))`. Every operation is IEEE float32.

    Args:
        x: [..., head_dim] float16, bfloat16 or float32.

    Returns:
        Codes [..., head_dim] int8 within [-127, 127], and scales [...] float16.

    Raises:
        ValueError: A row holds NaN or infinity, or needs a scale beyond FP16.
    """
    x = x.astype(np.float32)
    scales = _row_scales(x)
    if not np.isfinite(scales).all():
        raise ValueError("x must be finite and within 65504 * 127, see first_offence(x)")
    divisors = np.where(scales == 0, np.float16(1), scales).astype(np.float32)  # 0 / 1 = 0
    inverses = np.float32(1) / divisors
    codes = np.rint(x * inverses[..., None]).astype(np.int8)
    return codes, scales


def dequantize(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float64]:
    """Return codes * scales, exact in float64, in the shape of the codes."""
    return codes.astype(np.float64) * scales.astype(np.float64)[..., None]


def first_offence(x: Array) -> RowOffence | None:
    """Return the first row that cannot be quantised, None when all can.

    Args:
        x: [num_tokens, num_heads, head_dim] float16, bfloat16 or float32.
    """
    x = x.astype(np.float32)
    is_finite = np.asarray(np.isfinite(x).all(axis=-1))
    offences = np.argwhere(~np.isfinite(_row_scales(x)))
    if len(offences) == 0:
        return None
    token_idx, head_idx = (int(idx) for idx in offences[0])
    return RowOffence(token_idx, head_idx, bool(is_finite[token_idx, head_idx]))


def attention(
    q: Array,
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    options: AttentionOptions,
    *,
    start_pos: int,
    causal: bool = True,
) -> ExactAttention:
    """Attend from every query over dequantised keys and values, in float64.

    Args:
        q: [num_tokens, num_q_heads, head_dim] queries of start_pos, start_pos + 1, ...
        k: [length, num_kv_heads, head_dim] float64.
        v: Like k.
        options: The layer's.
        start_pos: Position of the first query.
        causal: Position p attends to [0, p], or within the window; False: every query attends to
            [0, length).

    Raises:
        ValueError: A query is past the length, or causal=False meets a window.
    """
    if options.window and not causal:
        raise ValueError(f"causal=False attends to everything, got window {options.window}")
    mask = _attended(len(q), len(k), start_pos, options.window if causal else None)
    num_tokens, num_q_heads, head_dim = q.shape
    grouped = q.astype(np.float64).reshape(num_tokens, k.shape[1], -1, head_dim)
    scores = np.einsum("nhgd,khd->nhgk", grouped, k, optimize=True) * options.sm_scale
    peak_score = np.where(mask, np.abs(scores), 0.0).max(axis=-1)
    if options.soft_cap:
        scores = options.soft_cap * np.tanh(scores / options.soft_cap)
    scores = np.where(mask, scores, -np.inf)
    peak = scores.max(axis=-1)
    weights = np.exp(scores - peak[..., None])
    total = weights.sum(axis=-1)
    lse = peak + np.log(total)
    if options.sinks is not None:
        total = total + np.exp(options.sinks.reshape(lse.shape[1:]) - peak)
    probs = weights / total[..., None]
    out, abs_out = (
        np.einsum("nhgk,khd->nhgd", probs, x, optimize=True).reshape(q.shape)
        for x in (v, np.abs(v))
    )
    per_head = (num_tokens, num_q_heads)
    return ExactAttention(out, lse.reshape(per_head), abs_out, peak_score.reshape(per_head))


def error_bound(exact: ExactAttention, dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """Return the error norm that an answer of `dtype` may have, [num_tokens, num_q_heads].

    tol * max(||o||, 0.02 * ||sum p|v| ||) + sqrt(head_dim) * half the smallest subnormal of dtype:
    the second term of the maximum allows for values that cancel, the last one for what rounding to
    dtype cannot avoid.
    """
    size = np.maximum(_norm(exact.out), 0.02 * _norm(exact.abs_out))
    smallest = _SMALLEST_SUBNORMALS[np.dtype(dtype)]
    half_steps = np.sqrt(exact.out.shape[-1]) * smallest / 2
    return np.asarray(TOLERANCES[np.dtype(dtype)] * size + half_steps)


def error_ratios(out: Array, exact: ExactAttention) -> NDArray[np.float64]:
    """Return error over `error_bound`, [num_tokens, num_q_heads]; a ratio over 1 misses the bound.

    A row with a score over MAX_CHECKED_SCORE is outside the bound, its ratio is 0. NaN or infinity
    in an answer gives an infinite ratio in any row.
    """
    actual = out.astype(np.float64)
    is_finite = np.asarray(np.isfinite(actual).all(axis=-1))
    errors = _norm(np.where(is_finite[..., None], actual - exact.out, 0.0))
    is_bounded = exact.peak_score <= MAX_CHECKED_SCORE
    ratios = np.where(is_bounded, errors / error_bound(exact, out.dtype), 0.0)
    return np.where(is_finite, ratios, np.inf)


def check(out: Array, exact: ExactAttention) -> None:
    """Raise AssertionError when an answer misses the bound, naming its worst row.

    Args:
        out: [num_tokens, num_q_heads, head_dim] float16, bfloat16 or float32.
        exact: What it should be.
    """
    if out.shape != exact.out.shape:
        raise AssertionError(f"out must be {list(exact.out.shape)}, got {list(out.shape)}")
    ratios = error_ratios(out, exact)
    worst = np.unravel_index(np.argmax(ratios), ratios.shape)
    if ratios[worst] > 1:
        raise AssertionError(
            f"token {worst[0]}, q head {worst[1]} has {ratios[worst]:.3g} times the error that "
            f"{out.dtype} may have ({np.count_nonzero(ratios > 1)} of {ratios.size} rows miss it)"
        )


@dataclass(slots=True, eq=False)
class OracleCache:
    """The cached tokens of one (session, layer), quantised as a server stores them.

    Attributes:
        options: The layer's attention options.
    """

    options: AttentionOptions
    _chunks: list[tuple[Array, Array, Array, Array]] = field(default_factory=list)

    def __len__(self) -> int:
        """Cached tokens."""
        return sum(len(chunk[0]) for chunk in self._chunks)

    def append(self, k: Array, v: Array) -> None:
        """Quantise and store tokens after those already cached.

        Args:
            k: [num_tokens, num_kv_heads, head_dim] float16, bfloat16 or float32.
            v: Like k.

        Raises:
            ValueError: A row cannot be quantised; nothing is stored.
        """
        self._chunks.append((*quantize(k), *quantize(v)))

    def stored(self) -> tuple[Array, Array, Array, Array]:
        """Return k_codes, k_scales, v_codes and v_scales of all tokens, in the order of `append`.

        Raises:
            ValueError: Nothing is cached.
        """
        if not self._chunks:
            raise ValueError("the cache is empty: append before attending")
        k_codes, k_scales, v_codes, v_scales = (
            np.concatenate(parts) for parts in zip(*self._chunks, strict=True)
        )
        return k_codes, k_scales, v_codes, v_scales

    def attend(self, q: Array, *, start_pos: int, causal: bool = True) -> ExactAttention:
        """Attend over the cached tokens; see `attention`."""
        k_codes, k_scales, v_codes, v_scales = self.stored()
        k, v = dequantize(k_codes, k_scales), dequantize(v_codes, v_scales)
        return attention(q, k, v, self.options, start_pos=start_pos, causal=causal)


def _row_scales(x: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return max|x| / 127 of each row rounded up to FP16; inf or NaN where there is none."""
    amax = np.abs(x).max(axis=-1)
    exact = amax / np.float32(127)
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float16)
        above = np.nextafter(nearest, np.float16(np.inf))
    rounded_up = np.where(nearest.astype(np.float32) < exact, above, nearest)
    return np.asarray(np.where(amax > 0, np.maximum(rounded_up, _SMALLEST_SCALE), rounded_up))


def _attended(
    num_tokens: int, length: int, start_pos: int, window: int | None
) -> NDArray[np.bool_]:
    """Return which keys each query attends to, [num_tokens, 1, 1, length]; window None = all."""
    if window is None:
        return np.ones((num_tokens, 1, 1, length), dtype=np.bool_)
    end = start_pos + num_tokens
    if end > length:
        raise ValueError(f"start_pos + num_tokens must be <= {length} cached tokens, got {end}")
    last = np.arange(start_pos, end).reshape(-1, 1, 1, 1)
    first = np.maximum(0, last - window + 1) if window else 0
    keys = np.arange(length)
    return np.asarray((first <= keys) & (keys <= last))


def _norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Euclidean norm of each row."""
    return np.asarray(np.sqrt((x * x).sum(axis=-1)))
