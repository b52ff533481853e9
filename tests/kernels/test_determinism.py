"""`deterministic`: the same bits whatever shares the batch and however many threads there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from octavo_server.backends.base import Backend, DecodeOutput
from tests.kernels.conftest import MakeBackend
from tests.kernels.draws import FLOAT16, FLOAT32, Inputs, draw
from tests.kernels.rig import Entry, Rig, bits, make_spec

SPEC = make_spec(2, 4, 64, block_size=32, num_layers=1, deterministic=True)


def answer(
    backend: Backend,
    cached_len: int,
    num_tokens: int,
    num_neighbours: int,
    seed: int = 0,
    dtype: np.dtype[Any] = FLOAT32,
) -> DecodeOutput:
    """Step one session with always the same tokens, among neighbours and in other blocks by seed."""
    rig = Rig(backend, SPEC, num_blocks=300, seed=seed)
    neighbours = [rig.open(600 + 64 * idx) for idx in range(num_neighbours)]
    for idx, neighbour in enumerate(neighbours):
        rig.fill(neighbour, 0, 500 + 64 * idx)
    session = rig.open(cached_len + num_tokens)
    rng = np.random.default_rng(99)
    past = draw("normal", rng, cached_len, SPEC, dtype)
    rig.append([Entry(session, 0, cached_len)], past)
    inputs = draw("normal", rng, num_tokens, SPEC, dtype)
    entries = [Entry(neighbour, 0, 2) for neighbour in neighbours]
    around = rig.draw(entries, dtype=dtype) if entries else draw("normal", rng, 0, SPEC, dtype)
    middle = len(entries) // 2 * 2
    parts = (
        np.concatenate([other[:middle], own, other[middle:]])
        for own, other in zip(inputs, around, strict=True)
    )
    batch_inputs = Inputs(*parts)
    entries.insert(middle // 2, Entry(session, 0, num_tokens))
    output = rig.step(entries, batch_inputs)
    assert output.lse is not None
    rows = slice(middle, middle + num_tokens)
    return output._replace(out=output.out[rows], lse=output.lse[rows])


def assert_same_bits(first: DecodeOutput, second: DecodeOutput) -> None:
    """Compare out and lse bit by bit."""
    assert first.lse is not None
    assert second.lse is not None
    np.testing.assert_array_equal(bits(first.out.copy()), bits(second.out.copy()))
    np.testing.assert_array_equal(bits(first.lse.copy()), bits(second.lse.copy()))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize(("cached_len", "num_tokens"), [(20, 1), (1023, 1), (3000, 1), (1500, 19)])
def test_batch_and_blocks_do_not_matter(
    backend: Backend, cached_len: int, num_tokens: int, dtype: np.dtype[Any]
) -> None:
    alone = answer(backend, cached_len, num_tokens, num_neighbours=0, dtype=dtype)
    for num_neighbours, seed in [(1, 1), (5, 2)]:
        shared = answer(backend, cached_len, num_tokens, num_neighbours, seed, dtype)
        assert_same_bits(alone, shared)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize(("cached_len", "num_tokens"), [(20, 1), (3000, 1), (1500, 19)])
def test_threads_do_not_matter(
    make_backend: MakeBackend, cached_len: int, num_tokens: int, dtype: np.dtype[Any]
) -> None:
    expected = answer(make_backend(1), cached_len, num_tokens, num_neighbours=0, dtype=dtype)
    for num_threads in (2, 3):
        backend = make_backend(num_threads)
        for num_neighbours in (0, 3):
            got = answer(backend, cached_len, num_tokens, num_neighbours, dtype=dtype)
            assert_same_bits(expected, got)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_later_tokens_do_not_matter(backend: Backend, dtype: np.dtype[Any]) -> None:
    rig = Rig(backend, SPEC, num_blocks=4)
    session = rig.open(40)
    rig.fill(session, 0, 20, dtype=dtype)
    last = [Entry(session, 0, 1, start_pos=19)]
    q = rig.draw(last, dtype=dtype).q
    before = rig.query(last, q)
    new = [Entry(session, 0, 1)]
    inputs = rig.draw(new, dtype=dtype)
    rig.append(new, inputs._replace(k=inputs.k * dtype.type(30)))
    assert_same_bits(before, rig.query(last, q))


def test_repetition_does_not_matter(backend: Backend) -> None:
    first = answer(backend, 2100, 3, num_neighbours=2)
    for _ in range(3):
        assert_same_bits(first, answer(backend, 2100, 3, num_neighbours=2))
