"""Window, soft cap, sinks and softmax scale, each per layer and all together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo_server.backends.base import Backend
from tests.kernels.draws import FLOAT16, FLOAT32
from tests.kernels.rig import Entry, Rig, make_spec

BLOCK_SIZE = 16


def step_both_layers(rig: Rig, cached_len: int, num_tokens: int, dtype: np.dtype[Any]) -> None:
    """Step one session in both layers with one batch, then query its positions again."""
    session = rig.open(cached_len + num_tokens)
    rig.fill(session, 0, cached_len, dtype=dtype)
    rig.fill(session, 1, cached_len, dtype=dtype)
    entries = [Entry(session, layer, num_tokens) for layer in (0, 1)]
    inputs = rig.draw(entries, dtype=dtype)
    rig.step(entries, inputs)
    rig.query([Entry(session, layer, num_tokens, cached_len) for layer in (0, 1)], inputs.q)


@pytest.mark.parametrize("num_tokens", [1, 5, 70])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 128, 1000])
def test_window(backend: Backend, window: int, num_tokens: int) -> None:
    """Windows shorter and longer than a block, an entry and the context; layer 1 has none."""
    spec = make_spec(2, 4, 64, block_size=BLOCK_SIZE, window=(window, 0))
    rig = Rig(backend, spec, num_blocks=80)
    for cached_len in (0, 33, 200):
        step_both_layers(rig, cached_len, num_tokens, FLOAT32)


def test_window_over_a_long_context(backend: Backend) -> None:
    """Most blocks are left behind; with 40 queries the windows start in several blocks."""
    spec = make_spec(1, 8, 128, block_size=32, window=(100, 1024))
    rig = Rig(backend, spec, num_blocks=120)
    step_both_layers(rig, 3000, 40, FLOAT16)


@pytest.mark.parametrize("soft_cap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_soft_cap(backend: Backend, soft_cap: float, dtype: np.dtype[Any]) -> None:
    spec = make_spec(2, 4, 64, soft_cap=(soft_cap, 0.0))
    rig = Rig(backend, spec, num_blocks=60)
    for cached_len, num_tokens in [(0, 1), (3, 20), (300, 3)]:
        step_both_layers(rig, cached_len, num_tokens, dtype)


@pytest.mark.parametrize("draw_name", ["normal_times_4", "near_uniform"])
def test_soft_cap_where_it_saturates_and_where_it_is_linear(
    backend: Backend, draw_name: str
) -> None:
    spec = make_spec(2, 4, 64, soft_cap=(20.0, 3.0))
    rig = Rig(backend, spec, num_blocks=60)
    entries = [Entry(rig.open(120), 0, 120), Entry(rig.open(120), 1, 120)]
    rig.step(entries, rig.draw(entries, draw_name))


@pytest.mark.parametrize("level", [-20.0, 0.0, 5.0, 60.0])
def test_sinks(backend: Backend, level: float) -> None:
    """From a sink that does not matter to one that takes nearly all."""
    rng = np.random.default_rng(7)
    sinks = (level + rng.standard_normal((2, 8))).astype(np.float32)
    rig = Rig(backend, make_spec(2, 4, 64, sinks=sinks), num_blocks=200)
    for cached_len, num_tokens in [(0, 1), (16, 5), (1100, 2)]:
        step_both_layers(rig, cached_len, num_tokens, FLOAT32)


def test_sm_scale_is_the_layers(backend: Backend) -> None:
    rig = Rig(backend, make_spec(2, 2, 96, sm_scale=(1.0 / 96, 0.3)), num_blocks=20)
    step_both_layers(rig, 50, 7, FLOAT32)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize(
    ("window", "soft_cap", "has_sinks"),
    [
        ((24, 0), (10.0, 0.0), False),
        ((24, 3), (0.0, 0.0), True),
        ((0, 0), (10.0, 1.0), True),
        ((24, 100), (3.0, 30.0), True),
    ],
)
def test_combinations(
    backend: Backend,
    window: tuple[int, int],
    soft_cap: tuple[float, float],
    has_sinks: bool,
    dtype: np.dtype[Any],
) -> None:
    sinks = np.linspace(-2, 4, 14, dtype=np.float32).reshape(2, 7) if has_sinks else None
    spec = make_spec(1, 7, 64, window=window, soft_cap=soft_cap, sinks=sinks)
    rig = Rig(backend, spec, num_blocks=80)
    for cached_len, num_tokens in [(0, 40), (150, 1), (500, 20)]:
        step_both_layers(rig, cached_len, num_tokens, dtype)
