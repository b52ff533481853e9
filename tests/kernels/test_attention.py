"""int8_paged_decode_attention against the oracle, over shapes, lengths, dtypes and draws."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from octavo_client.oracle import MAX_CHECKED_SCORE
from octavo_server.backends.base import Backend
from tests.kernels.draws import BFLOAT16, DRAWS, DTYPES, FLOAT16, FLOAT32, Inputs
from tests.kernels.rig import Entry, Rig, make_spec

HEAD_DIMS = (8, 64, 72, 80, 96, 128, 192, 256)
NUM_TOKENS = (1, 3, 17, 130)
LONG = 1500

AXES: dict[str, tuple[Any, ...]] = {
    "head_dim": HEAD_DIMS,
    "group_size": (1, 4, 7, 8),
    "block_size": (16, 32, 64, 128),
    "num_kv_heads": (1, 2, 3),
    "dtype": DTYPES,
    "length": ("empty", "block - 2", "block - 1", "block", "long"),
    "num_tokens": NUM_TOKENS,
    "option": ("none", "window", "soft_cap", "sinks", "all"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One value of every axis; `length` is what is cached before the step."""

    head_dim: int
    group_size: int
    block_size: int
    num_kv_heads: int
    dtype: np.dtype[Any]
    length: str
    num_tokens: int
    option: str

    def cached_len(self) -> int:
        """Return the tokens that are cached before the step."""
        block_size = self.block_size
        lengths = {"empty": 0, "block - 2": block_size - 2, "block - 1": block_size - 1}
        return (lengths | {"block": block_size, "long": LONG})[self.length]

    def options(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return the attention options, those of layer 0 and layer 1 different."""
        num_q_heads = self.num_kv_heads * self.group_size
        every = {
            "window": (self.block_size + 3, 5),
            "soft_cap": (2.0, 30.0),
            "sinks": rng.standard_normal((2, num_q_heads)).astype(np.float32) * 3,
        }
        if self.option in ("none", "all"):
            return every if self.option == "all" else {}
        return {self.option: every[self.option]}

    def __str__(self) -> str:
        return (
            f"d{self.head_dim}-g{self.group_size}-bs{self.block_size}-kv{self.num_kv_heads}-"
            f"{self.dtype}-{self.length}-n{self.num_tokens}-{self.option}".replace(" ", "")
        )


def pairwise_cases() -> list[Case]:
    """Return cases in which every two values of two axes meet, chosen greedily."""
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(AXES, 2)
        for x, y in product(AXES[a], AXES[b])
    }
    rng = np.random.default_rng(0)
    cases = []
    while missing:
        drawn = [
            {axis: values[rng.integers(len(values))] for axis, values in AXES.items()}
            for _ in range(100)
        ]
        best = max(drawn, key=lambda case: len(missing & pairs_of(case)))
        if missing & pairs_of(best):
            missing -= pairs_of(best)
            cases.append(Case(**best))
    return cases


def pairs_of(case: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    """Return the pairs of axis values that meet in a case."""
    return {frozenset(pair) for pair in combinations(case.items(), 2)}


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_grid(backend: Backend, case: Case) -> None:
    """A ragged batch of three: the case's length, another one in the other layer, and a new one."""
    options = case.options(np.random.default_rng(case.head_dim))
    spec = make_spec(
        case.num_kv_heads, case.group_size, case.head_dim, block_size=case.block_size, **options
    )
    rig = Rig(backend, spec, num_blocks=3 * (LONG // case.block_size + 10), seed=case.num_tokens)
    cached_len = case.cached_len()
    first = rig.open(cached_len + 2 * case.num_tokens)
    second = rig.open(cached_len // 2 + 3 + case.num_tokens)
    rig.fill(first, 0, cached_len, dtype=case.dtype)
    rig.fill(second, 1, cached_len // 2, dtype=case.dtype)
    entries = [Entry(first, 0, case.num_tokens), Entry(second, 1, 3), Entry(rig.open(2), 1, 2)]
    for _ in range(2):  # the second step starts where no block does
        rig.step(entries[:2], rig.draw(entries[:2], dtype=case.dtype))
        entries[1] = Entry(second, 1, case.num_tokens)
    rig.step(entries[2:], rig.draw(entries[2:], dtype=case.dtype))
    for entry in entries:
        rig.verify_stored(entry.session, entry.layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw_name", DRAWS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_draws(backend: Backend, head_dim: int, draw_name: str, dtype: np.dtype[Any]) -> None:
    spec = make_spec(2, 4, head_dim, block_size=32)
    rig = Rig(backend, spec, num_blocks=40, seed=head_dim)
    session = rig.open(500)
    rig.fill(session, 0, 400, draw_name, dtype)
    entries = [Entry(session, 0, 9)]
    inputs = rig.draw(entries, draw_name, dtype)
    rig.step(entries, inputs)
    exact = rig.exact(entries[0], inputs.q, 400)
    assert (exact.peak_score <= MAX_CHECKED_SCORE).mean() > 0.5


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("draw_name", ["normal", "near_uniform", "normal_times_4"])
def test_one_long_context(backend: Backend, draw_name: str, dtype: np.dtype[Any]) -> None:
    """Long enough to be split over the threads, with an end in the middle of a block."""
    rig = Rig(backend, make_spec(1, 4, 128, block_size=32, num_layers=1), num_blocks=140)
    session = rig.open(4100)
    rig.fill(session, 0, 4001, draw_name, dtype)
    for num_tokens in (1, 3):
        entries = [Entry(session, 0, num_tokens)]
        rig.step(entries, rig.draw(entries, draw_name, dtype))


def test_one_long_prompt(backend: Backend) -> None:
    rig = Rig(backend, make_spec(2, 2, 64, block_size=32), num_blocks=40)
    entries = [Entry(rig.open(600), 0, 600), Entry(rig.open(512), 1, 512)]
    rig.step(entries, rig.draw(entries, dtype=FLOAT16))


def test_wide_ragged_batch(backend: Backend) -> None:
    """More entries than threads, of every length around the blocks, both layers of each session."""
    spec = make_spec(2, 4, 64, block_size=16)
    rig = Rig(backend, spec, num_blocks=200)
    entries = []
    for length in [0, 1, 14, 15, 16, 17, 31, 32, 33, 47, 48, 100, 255, 256]:
        session = rig.open(length + 8)
        rig.fill(session, 0, length)
        rig.fill(session, 1, length // 2)
        entries += [Entry(session, 1, 1 + length % 3), Entry(session, 0, 1 + length % 5)]
    rig.step(entries, rig.draw(entries))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cached_len", [1, 15, 16, 17, 300])
def test_queries_without_kv(backend: Backend, cached_len: int, dtype: np.dtype[Any]) -> None:
    """Queries of any stored position, causal and not, in one batch; nothing is written."""
    soft_cap, sinks = (0.0, 5.0), np.ones((2, 8), dtype=np.float32)
    spec = make_spec(2, 4, 80, soft_cap=soft_cap, sinks=sinks)
    rig = Rig(backend, spec, num_blocks=60)
    session, other = rig.open(cached_len), rig.open(cached_len)
    for layer in (0, 1):
        rig.fill(session, layer, cached_len, dtype=dtype)
        rig.fill(other, layer, cached_len, dtype=dtype)
    half = cached_len // 2
    entries = [
        Entry(session, 0, num_tokens=1, start_pos=0),
        Entry(session, 1, num_tokens=cached_len - half, start_pos=half),
        Entry(other, 0, num_tokens=17, start_pos=0, causal=False),
        Entry(other, 1, num_tokens=1, start_pos=cached_len - 1, causal=False),
    ]
    poisoned = [rig.poisoned_slots(layer).tolist() for layer in (0, 1)]
    rig.query(entries, rig.draw(entries, dtype=dtype).q)
    assert [rig.poisoned_slots(layer).tolist() for layer in (0, 1)] == poisoned
    for stored_session, layer in product((session, other), (0, 1)):
        rig.verify_stored(stored_session, layer)


def test_past_positions_answer_as_they_did(backend: Backend) -> None:
    """A query of an old position does not see what was appended since."""
    rig = Rig(backend, make_spec(), num_blocks=8)
    entries = [Entry(rig.open(100), 0, 20)]
    inputs = rig.draw(entries)
    before = rig.step(entries, inputs)
    rig.fill(0, 0, 50)
    after = rig.query([Entry(0, 0, 20, start_pos=0)], inputs.q)
    np.testing.assert_allclose(after.out, before.out, rtol=1e-4, atol=1e-5)


def test_a_skipped_entry_answers_zeros(backend: Backend) -> None:
    """kv_lens 0 is how the engine takes a refused entry out of a launch; its q may be anything."""
    rig = Rig(backend, make_spec(2, 4, 64), num_blocks=20)
    entries = [Entry(rig.open(40), 0, 3), Entry(rig.open(40), 0, 5), Entry(rig.open(40), 1, 2)]
    inputs = rig.draw(entries)
    batch = rig.append(entries, inputs)
    batch.kv_lens[1] = 0
    inputs.q[3:8] = np.nan
    output = rig.attend(batch, inputs.q)
    assert output.lse is not None
    assert not output.out[3:8].any()
    assert (output.lse[3:8] == -np.inf).all()
    for entry_idx in (0, 2):
        rig.verify_entry(entries[entry_idx], batch, entry_idx, inputs.q, output)


def test_lse_comes_only_when_asked_for(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), num_blocks=4)
    entries = [Entry(rig.open(5), 0, 5)]
    inputs = rig.draw(entries)
    batch = rig.append(entries, inputs)
    with_lse = rig.attend(batch, inputs.q)
    without = backend.int8_paged_decode_attention(rig.cache, batch, inputs.q, return_lse=False)
    assert without.lse is None
    np.testing.assert_array_equal(without.out, with_lse.out)


def test_lse_merges_partial_contexts(backend: Backend) -> None:
    """Two halves of a context, weighted by their lse, are the whole, sinks or not."""
    sinks = np.full((2, 4), 1.5, dtype=np.float32)
    rig = Rig(backend, make_spec(2, 2, 64, sinks=sinks), num_blocks=20)
    for _ in range(3):
        rig.open(64)
    whole = rig.draw([Entry(0, 0, 64)])
    rig.append([Entry(0, 0, 64)], whole)
    for session, half in ((1, slice(0, 40)), (2, slice(40, 64))):
        entry = Entry(session, 0, half.stop - half.start)
        rig.append([entry], whole._replace(k=whole.k[half], v=whole.v[half]))
    entries = [Entry(session, 0, 1, start_pos=0, causal=False) for session in range(3)]
    output = rig.query(entries, np.repeat(whole.q[:1], 3, axis=0))
    assert output.lse is not None
    np.testing.assert_allclose(np.logaddexp(output.lse[1], output.lse[2]), output.lse[0], atol=1e-5)
    without_sink = output.out * (1 + np.exp(1.5 - output.lse))[..., None]
    weights = np.exp(output.lse - output.lse[0])[..., None]
    merged = without_sink[1] * weights[1] + without_sink[2] * weights[2]
    np.testing.assert_allclose(merged, without_sink[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("largest", [60000, 65472, 65504])
def test_large_values_keep_their_range(
    backend: Backend, largest: int, head_dim: int, dtype: np.dtype[Any]
) -> None:
    """V at the end of FP16's range: sums in FP16 would overflow, and dequantised V itself does."""
    rig = Rig(backend, make_spec(head_dim=head_dim), num_blocks=8)
    entries = [Entry(rig.open(60), 0, 60)]
    inputs = rig.draw(entries, dtype=dtype)
    rig.step(entries, inputs._replace(v=(np.sign(inputs.v) * largest).astype(dtype)))


@pytest.mark.parametrize("head_dim", [8, 64, 72])
@pytest.mark.parametrize("largest", [65520, 1e6, 8e6])
def test_float16_answers_saturate(backend: Backend, largest: float, head_dim: int) -> None:
    """V beyond FP16's range, stored in FP32 and asked for in FP16."""
    rig = Rig(backend, make_spec(head_dim=head_dim), num_blocks=8)
    entries = [Entry(rig.open(60), 0, 60, start_pos=0)]
    inputs = rig.draw([Entry(0, 0, 60)])
    signs = np.where(np.arange(head_dim) % 3, 1, -1)
    v = np.broadcast_to(np.float32(largest) * signs, inputs.v.shape).astype(FLOAT32)
    rig.append(entries, inputs._replace(v=v))
    output = rig.attend(rig.batch(entries, appends=False), inputs.q.astype(FLOAT16))
    np.testing.assert_array_equal(output.out, np.broadcast_to(65504 * signs, output.out.shape))
    assert rig.query(entries, inputs.q).out.max() > 65504  # FP32 keeps it


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (72, 32), (128, 64)])
def test_small_elements_of_q_count(
    backend: Backend, head_dim: int, block_size: int, dtype: np.dtype[Any]
) -> None:
    """q's largest element, a thousand times the others, meets zeros: they make the scores."""
    spec = make_spec(2, 4, head_dim, block_size=block_size, num_layers=1, sm_scale=(2.0,))
    rig = Rig(backend, spec, num_blocks=48)
    entries = [Entry(rig.open(230), 0, num_tokens) for num_tokens in (1, 40, 230)]
    inputs = rig.draw(entries, dtype=dtype)
    inputs.q[...] *= dtype.type(0.05)
    inputs.q[..., 5], inputs.k[..., 5] = 50, 0
    output = rig.step(entries, inputs)
    assert output.lse is not None
    exact = rig.exact(entries[2], inputs.q[41:], 0)
    np.testing.assert_allclose(output.lse[41:], exact.lse, atol=1e-4)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("tiny", [-6e-8, 6e-8])
def test_tiny_elements_of_q_stay_tiny(backend: Backend, tiny: float, dtype: np.dtype[Any]) -> None:
    """All of q's elements but one, which meets zeros, are tiny of one sign: rounding must not add up."""
    rig = Rig(backend, make_spec(1, 4, 256, block_size=16, num_layers=1), num_blocks=8)
    entries = [Entry(rig.open(64), 0, 64)]
    inputs = rig.draw(entries, dtype=dtype)
    inputs.q[...] = tiny
    inputs.k[...] = np.sign(inputs.k[..., :1]) * 100
    inputs.q[..., 5], inputs.k[..., 5] = 50, 0
    rig.step(entries, inputs)


@pytest.mark.parametrize("gap", [50, 70, 80])
@pytest.mark.parametrize("peak_idx", [0, 70, 199])
def test_small_weights_count_where_large_ones_meet_zeros(
    backend: Backend, peak_idx: int, gap: int
) -> None:
    """The largest score has V = 0: the answer is made of weights of exp(-gap)."""
    spec = make_spec(1, 1, 64, num_layers=1, sm_scale=(1 / 64,), deterministic=True)
    rig = Rig(backend, spec, num_blocks=16)
    is_peak = (np.arange(200) == peak_idx)[:, None, None]
    ones = np.ones((200, 1, 64), dtype=FLOAT32)
    entry = Entry(rig.open(200), 0, 200)
    rig.append([entry], Inputs(ones, np.where(is_peak, 1, -ones), np.where(is_peak, 0, ones)))
    query = Entry(entry.session, 0, 1, start_pos=199)
    output = rig.query([query], np.full((1, 1, 64), gap / 2, dtype=FLOAT32))
    assert (output.out > 199 * np.exp(-gap - 1)).all()


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [*product(DTYPES, [6e4]), *product([FLOAT32, BFLOAT16], [2.0**124, 2.0**127])],
    ids=str,
)
def test_huge_queries_get_finite_answers(
    backend: Backend, dtype: np.dtype[Any], magnitude: float
) -> None:
    """Signs alternate: against constant K the scores are 0, whatever q's products with codes are."""
    rig = Rig(backend, make_spec(soft_cap=(0.0, 20.0)), num_blocks=16)
    entries = [Entry(rig.open(60), layer, 60) for layer in (0, 1)]
    inputs = rig.draw(entries, dtype=dtype)
    inputs.q[..., ::2], inputs.q[..., 1::2] = magnitude, -magnitude
    for first in (0, 60):
        inputs.k[first : first + 30] = 1
    output = rig.step(entries, inputs)
    assert output.lse is not None
    assert np.isfinite(output.lse).all()
    exact = [rig.exact(entry, inputs.q[:60], 0) for entry in entries]
    assert (exact[0].peak_score[:30] == 0).all()
    if magnitude < 1e38:  # the others' scores fit FP32 and differ by far: the largest takes all
        expected = np.concatenate([answer.out for answer in exact])[:60]
        np.testing.assert_allclose(output.out[:60].astype(float), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("step", [1, 5, *range(8, 15), 20, 40])
def test_scores_so_far_below_that_fp32_hardly_tells_them_apart(
    backend: Backend, step: int, dtype: np.dtype[Any]
) -> None:
    """Tokens without V take all the weight; what the others have is 0, whichever way it is rounded."""
    spec = make_spec(1, 1, 64, num_layers=1, sm_scale=(0.125,))
    rig = Rig(backend, spec, num_blocks=20)
    entry = Entry(rig.open(256), 0, 256)
    tokens = np.arange(256)
    k, v = np.zeros((2, 256, 1, 64), dtype=FLOAT32)
    k[64:, 0, 0] = -2000
    k[64:, 0, 1] = (tokens // 64)[64:] * step * 2000 / 127
    v[64:] = 1
    q = np.zeros((1, 1, 64), dtype=dtype)
    q[0, 0, :2] = 60000, 0.25
    rig.append([entry], Inputs(q, k.astype(dtype), v.astype(dtype)))
    output = rig.attend(rig.batch([Entry(0, 0, 1, start_pos=255)], appends=False), q)
    np.testing.assert_array_equal(output.out, np.zeros_like(q))
    assert output.lse is not None
    np.testing.assert_allclose(output.lse, np.log(64), rtol=1e-5)


@pytest.mark.parametrize("magnitude", [2.0**124, 1e38, 3e38])
def test_equal_huge_scores_share_the_weight(backend: Backend, magnitude: float) -> None:
    rig = Rig(backend, make_spec(), num_blocks=8)
    entries = [Entry(rig.open(60), 0, 60)]
    inputs = rig.draw(entries)
    inputs.q[:], inputs.k[:] = magnitude, 1
    output = rig.step(entries, inputs)
    exact = rig.exact(entries[0], inputs.q, 0)
    np.testing.assert_allclose(output.out, exact.out, rtol=1e-3, atol=1e-5)


def test_huge_queries_keep_the_order_of_their_scores(backend: Backend) -> None:
    """A score that FP32 cannot hold is above every one that it can, and below none."""
    rig = Rig(backend, make_spec(1, 1, 8, num_layers=1), num_blocks=4)
    heights = np.array([-1000, -1e-2, -1e-3, 0, 1e-3, 0.01, 1000, 0], dtype=FLOAT32)
    k = np.tile(heights[:, None, None], (1, 1, 8))
    v = np.tile(np.arange(8, dtype=FLOAT32)[:, None, None], (1, 1, 8))
    entry = Entry(rig.open(8), 0, 8)
    rig.append([entry], Inputs(k, k, v))
    q = np.full((2, 1, 8), 3e38, dtype=FLOAT32) * np.array([1, -1])[:, None, None]
    query = Entry(entry.session, 0, 2, start_pos=0, causal=False)
    output = rig.query([query], q.astype(FLOAT32))
    np.testing.assert_allclose(output.out[:, 0, 0], [6, 0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_tiny_values_round_into_subnormals(backend: Backend, dtype: np.dtype[Any]) -> None:
    """V below FP16's normal range, where the bound is half a subnormal step for each element."""
    rig = Rig(backend, make_spec(), num_blocks=8)
    entries = [Entry(rig.open(60), 0, 60)]
    inputs = rig.draw(entries, dtype=dtype)
    rig.step(entries, inputs._replace(v=(inputs.v.astype(np.float32) * 2e-6).astype(dtype)))
