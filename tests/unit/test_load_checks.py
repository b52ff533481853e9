"""The load test's content, made again from its key, and the check of answers against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_client.load.checks import Checker, CheckPool, Sample, host_row
from octavo_client.load.content import NUM_KV_ROWS, Rows, draw_rows, session_key, walk_of
from octavo_client.oracle import AttentionOptions, OracleCache
from tests.unit.client_fakes import model

SEED = 3
MODEL = replace(model(), window=(0, 5), soft_cap=(0.0, 20.0))
KEYS = st.integers(0, 2**64 - 1)


def exact_sample(rows: Rows, key: int, layer: int, position: int) -> Sample:
    """Return what a server answers that stored the tokens one by one, by the oracle's own cache."""
    walk = walk_of(key, layer)
    cache = OracleCache(
        AttentionOptions(MODEL.sm_scale[layer], MODEL.window[layer], MODEL.soft_cap[layer])
    )
    for token in range(position + 1):
        q, k, v = rows.step([walk], [token])
        cache.append(k, v)
    out = cache.attend(q, start_pos=position).out.astype(rows.q.dtype)
    return Sample(MODEL.name, key, layer, position, host_row(out, 0))


# ---- Content ------------------------------------------------------------------------------------


@given(KEYS, st.integers(0, 31), st.integers(0, 20_000), st.integers(1, 300))
def test_rows_of_a_span_are_those_of_its_tokens(
    key: int, layer: int, start_pos: int, num_tokens: int
) -> None:
    walk = walk_of(key, layer)
    span = walk.kv_rows(start_pos, num_tokens)
    assert span.tolist() == [walk.kv_row(start_pos + idx) for idx in range(num_tokens)]


@given(KEYS, st.integers(0, 31))
def test_a_walk_meets_every_row_once(key: int, layer: int) -> None:
    assert len(set(walk_of(key, layer).kv_rows(0, NUM_KV_ROWS).tolist())) == NUM_KV_ROWS


def test_sessions_and_layers_walk_differently() -> None:
    keys = [session_key(SEED, 0, process, 0, lane, 0) for process in range(4) for lane in range(50)]
    walks = {
        (walk.offset, walk.stride) for key in keys for walk in (walk_of(key, 0), walk_of(key, 31))
    }
    assert len(walks) == 2 * len(keys)
    assert session_key(1, 2) == session_key(1, 2) != session_key(2, 1)


def test_another_process_draws_the_same_rows() -> None:
    first, again, other = (draw_rows(seed, MODEL, "float16") for seed in (SEED, SEED, SEED + 1))
    for name in ("q", "k", "v"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_prompt_is_its_tokens_and_a_step_has_a_row_a_session(dtype: str) -> None:
    rows = draw_rows(SEED, MODEL, dtype)
    walks = [walk_of(key, 1) for key in (5, 6)]
    k, v = rows.prompt(walks, 7)
    assert k.shape == (2, 7, MODEL.num_kv_heads, MODEL.head_dim)
    for idx, walk in enumerate(walks):
        for token in range(7):
            _, k_row, v_row = rows.step([walk], [token])
            assert np.array_equal(k[idx, token], k_row[0])
            assert np.array_equal(v[idx, token], v_row[0])
    q, k, v = rows.step(walks, [3, 9])
    for idx, (walk, position) in enumerate(zip(walks, [3, 9], strict=True)):
        alone = rows.step([walk], [position])
        assert [np.array_equal(x[idx], y[0]) for x, y in zip((q, k, v), alone, strict=True)] == [
            True
        ] * 3
    assert str(q.dtype) == dtype


# ---- Checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("layer", "position"), [(0, 0), (0, 40), (1, 40)])
def test_the_right_answer_passes(dtype: str, layer: int, position: int) -> None:
    rows = draw_rows(SEED, MODEL, dtype)
    finding = Checker(SEED, {MODEL.name: MODEL}, dtype).check(
        exact_sample(rows, 77, layer, position)
    )
    assert finding.fault == ""
    assert finding.error_ratio < 1
    assert finding.is_bounded


def test_the_answer_to_any_other_cache_fails() -> None:
    rows = draw_rows(SEED, MODEL, "float16")
    checker = Checker(SEED, {MODEL.name: MODEL}, "float16")
    right = exact_sample(rows, 77, 0, 40)
    wrong = {
        "another session": right._replace(session_key=78),
        "another layer": right._replace(layer=1),
        "a token less": right._replace(position=39),
        "another head": right._replace(out=right.out[::-1].copy()),
        "1% more": right._replace(out=(right.out * np.float16(1.01)).astype(np.float16)),
        "NaN": right._replace(out=np.full_like(right.out, np.nan)),
        "another shape": right._replace(out=right.out[:1]),
        "another dtype": right._replace(out=right.out.astype(np.float32)),
    }
    found = {name: bool(checker.check(sample).fault) for name, sample in wrong.items()}
    assert found == dict.fromkeys(wrong, True)


def test_scores_beyond_the_bound_are_said() -> None:
    steep = replace(MODEL, sm_scale=(1e4, 1e4))
    rows = draw_rows(SEED, MODEL, "float16")
    finding = Checker(SEED, {MODEL.name: steep}, "float16").check(exact_sample(rows, 77, 0, 40))
    assert (finding.fault, finding.is_bounded) == ("", False)


def checked(samples: list[Sample], *, is_eager: bool) -> Any:
    about = (SEED, {MODEL.name: MODEL}, "float16")
    pool = CheckPool(about, 1, is_eager=is_eager)
    try:
        pool.add(samples)
        assert pool.num_waiting == len(samples)
        assert pool.counts.num_checked == 0
        while not pool.finish_some(5):
            pass
        return pool.counts
    finally:
        pool.close()


def test_a_pool_checks_all_and_tells_what_is_wrong() -> None:
    rows = draw_rows(SEED, MODEL, "float16")
    right = exact_sample(rows, 77, 0, 20)
    counts = checked([right] * 20 + [right._replace(position=21)] * 3, is_eager=False)
    assert (counts.num_checked, counts.num_wrong, counts.num_dropped) == (23, 3, 0)
    assert counts.longest_context == 22
    assert len(counts.faults) == 3
    assert "position 21" in counts.faults[0]
