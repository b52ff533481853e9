"""The oracle against arithmetic by hand and a loop that anybody can check."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from octavo_client.oracle import (
    AttentionOptions,
    ExactAttention,
    OracleCache,
    RowOffence,
    attention,
    check,
    dequantize,
    error_bound,
    error_ratios,
    first_offence,
    quantize,
)
from tests.kernels.draws import BFLOAT16, DTYPES, FLOAT16, FLOAT32

MAX_STORABLE = np.float32(65504) * np.float32(127)

finite_rows = hnp.arrays(
    np.float32,
    (4, 8),
    elements=st.floats(-float(MAX_STORABLE), float(MAX_STORABLE), width=32),
)


def row(*values: float) -> NDArray[np.float32]:
    """Return a row of 8 values, the rest zeros."""
    return np.array([*values, *[0.0] * (8 - len(values))], dtype=np.float32)


@pytest.mark.parametrize(
    ("values", "scale", "codes"),
    [
        pytest.param([], 0.0, [], id="zeros"),
        pytest.param([-0.0, 0.0], 0.0, [], id="minus zero"),
        pytest.param([127, 0.5, 1.5, 2.5, -0.5, -1.5], 1.0, [127, 0, 2, 2, 0, -2], id="ties"),
        pytest.param([-127, 126.5], 1.0, [-127, 126], id="negative amax"),
        pytest.param([190.5, 1.5], 1.5, [127, 1], id="exact in FP16"),
        pytest.param([127.01, 127], 1.0009765625, [127, 127], id="rounded up, not to nearest"),
        pytest.param([1e-45], 2.0**-24, [0], id="smallest float32"),
        pytest.param([1e-10], 2.0**-24, [0], id="far below the smallest scale"),
        pytest.param([127 * 2.0**-24, -(2.0**-24)], 2.0**-24, [127, -1], id="subnormal scale"),
        pytest.param([65504], 516.0, [127], id="largest float16"),
        pytest.param([MAX_STORABLE], 65504.0, [127], id="largest scale"),
    ],
)
def test_quantize_by_hand(values: list[float], scale: float, codes: list[int]) -> None:
    actual_codes, actual_scale = quantize(row(*values))
    assert actual_scale == np.float16(scale)
    assert actual_codes.tolist() == codes + [0] * (8 - len(codes))


@given(finite_rows)
def test_quantize_stays_within_half_a_step(x: NDArray[np.float32]) -> None:
    codes, scales = quantize(x)
    assert np.abs(codes.astype(int)).max() <= 127
    allowed = scales.astype(np.float64) * (0.5 + 2.0**-15)
    assert (np.abs(x - dequantize(codes, scales)) <= allowed[:, None]).all()


@given(finite_rows)
def test_scale_is_the_smallest_that_is_large_enough(x: NDArray[np.float32]) -> None:
    _, scales = quantize(x)
    exact = np.abs(x).max(axis=-1) / np.float32(127)
    assert (scales.astype(np.float32) >= exact).all()
    below = np.nextafter(scales, np.float16(-1))
    assert ((below.astype(np.float32) < exact) | (below <= 0)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_offence_is_the_first_bad_row(bad: float) -> None:
    x = np.ones((3, 2, 8), dtype=np.float32)
    assert first_offence(x) is None
    x[2, 0, 1] = bad
    assert first_offence(x) == RowOffence(2, 0, is_overflow=False)
    x[1, 1, 7] = 1e38
    assert first_offence(x) == RowOffence(1, 1, is_overflow=True)
    x[1, 1, 0] = bad
    assert first_offence(x) == RowOffence(1, 1, is_overflow=False)
    with pytest.raises(ValueError, match="finite"):
        quantize(x)


def test_overflow_begins_above_the_largest_scale() -> None:
    above = np.full((1, 1, 8), 65505 * 127, dtype=np.float32)
    assert first_offence(np.full_like(above, MAX_STORABLE)) is None
    assert first_offence(above) == RowOffence(0, 0, is_overflow=True)


def attend_by_loop(
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    options: AttentionOptions,
    positions: range,
    head: int,
) -> tuple[NDArray[np.float64], float]:
    """Return one query's out [head_dim] and lse, key by key."""
    weights, total, out = [], 0.0, np.zeros(q.shape[-1])
    for position in positions:
        score = options.sm_scale * float(q @ k[position])
        if options.soft_cap:
            score = options.soft_cap * math.tanh(score / options.soft_cap)
        weights.append(math.exp(score))
        out += weights[-1] * v[position]
        total += weights[-1]
    sink = 0.0 if options.sinks is None else math.exp(options.sinks[head])
    return out / (total + sink), math.log(total)


SINKS = np.array([0.5, -1.0, 2.0, 0.0], dtype=np.float32)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_attention_equals_the_loop(
    window: int, soft_cap: float, sinks: NDArray[np.float32] | None
) -> None:
    rng = np.random.default_rng(1)
    q = rng.standard_normal((3, 4, 8))
    k, v = rng.standard_normal((7, 2, 8)), rng.standard_normal((7, 2, 8))
    options = AttentionOptions(0.3, window, soft_cap, sinks)
    exact = attention(q, k, v, options, start_pos=2)
    for token_idx, head in np.ndindex(3, 4):
        last = 2 + token_idx
        positions = range(max(0, last - window + 1) if window else 0, last + 1)
        kv_head = head // 2
        out, lse = attend_by_loop(
            q[token_idx, head], k[:, kv_head], v[:, kv_head], options, positions, head
        )
        np.testing.assert_allclose(exact.out[token_idx, head], out, rtol=1e-12)
        np.testing.assert_allclose(exact.lse[token_idx, head], lse, rtol=1e-12)


def test_attention_without_causality_sees_the_whole_cache() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((5, 1, 8)) for _ in range(3))
    options = AttentionOptions(1.0)
    exact = attention(q, k, v, options, start_pos=0, causal=False)
    out, lse = attend_by_loop(q[0, 0], k[:, 0], v[:, 0], options, range(5), 0)
    np.testing.assert_allclose(exact.out[0, 0], out, rtol=1e-12)
    np.testing.assert_allclose(exact.lse[0, 0], lse, rtol=1e-12)


def test_attention_refuses_what_it_cannot_answer() -> None:
    x = np.ones((2, 1, 8))
    with pytest.raises(ValueError, match="must be <= 2 cached tokens, got 3"):
        attention(x, x, x, AttentionOptions(1.0), start_pos=1)
    with pytest.raises(ValueError, match="window 4"):
        attention(x, x, x, AttentionOptions(1.0, window=4), start_pos=0, causal=False)
    with pytest.raises(ValueError, match="empty"):
        OracleCache(AttentionOptions(1.0)).attend(x, start_pos=0)


def test_cache_attends_to_what_it_dequantises() -> None:
    rng = np.random.default_rng(3)
    k, v, q = (rng.standard_normal((4, 2, 8), dtype=np.float32) for _ in range(3))
    cache = OracleCache(AttentionOptions(0.5))
    cache.append(k[:3], v[:3])
    cache.append(k[3:], v[3:])
    assert len(cache) == 4
    expected = attention(
        q, dequantize(*quantize(k)), dequantize(*quantize(v)), cache.options, start_pos=0
    )
    np.testing.assert_array_equal(cache.attend(q, start_pos=0).out, expected.out)


def exact_answer(out: float, abs_out: float, peak_score: float = 1.0) -> ExactAttention:
    """Return the exact answer of one query and head whose 4 values are all `out`."""
    row_shape = (1, 1, 4)
    return ExactAttention(
        np.full(row_shape, out), np.zeros((1, 1)), np.full(row_shape, abs_out),
        np.full((1, 1), peak_score),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "tolerance", "subnormal"),
    [
        (FLOAT32, 1e-4, np.finfo(np.float32).smallest_subnormal),
        (FLOAT16, 1e-3, np.finfo(np.float16).smallest_subnormal),
        (BFLOAT16, 4e-3, ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_subnormal),  # type: ignore[no-untyped-call]
    ],
    ids=str,
)
def test_error_bound_by_hand(dtype: np.dtype[Any], tolerance: float, subnormal: float) -> None:
    # Norms of 4 equal values are twice the value; 0.02 * 200 > 2 * 1 where values cancel.
    assert error_bound(exact_answer(1, 1), dtype) == pytest.approx(2 * tolerance + float(subnormal))
    assert error_bound(exact_answer(1, 100), dtype) == pytest.approx(4 * tolerance, rel=1e-3)
    assert error_bound(exact_answer(0, 0), dtype) == pytest.approx(float(subnormal), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_tells_good_answers_from_bad_ones(dtype: np.dtype[Any]) -> None:
    exact = exact_answer(1, 1)
    check(np.ones((1, 1, 4), dtype=dtype), exact)
    with pytest.raises(AssertionError, match="token 0, q head 0 has"):
        check(np.full((1, 1, 4), 1.02, dtype=dtype), exact)
    with pytest.raises(AssertionError, match=r"must be \[1, 1, 4\], got \[1, 4\]"):
        check(np.ones((1, 4), dtype=dtype), exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_answer_beyond_the_bounded_scores_must_still_be_finite(bad: float) -> None:
    exact = exact_answer(1, 1, peak_score=101)
    assert error_ratios(np.full((1, 1, 4), 2, dtype=np.float32), exact) == 0
    with pytest.raises(AssertionError, match="inf times"):
        check(np.full((1, 1, 4), bad, dtype=np.float32), exact)
