"""Whole blocks out of one backend and into another: the same bits, in token order, and nothing beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo_server.backends.base import Backend, StoredTokens, field_shape
from octavo_server.model import BLOCK_SIZES, ModelSpec
from tests.kernels.rig import Entry, Rig, bits, make_spec

NUM_BLOCKS = 7
SHAPES = [
    pytest.param(make_spec(2, 1, head_dim, block_size=block_size), id=f"{head_dim}-{block_size}")
    for head_dim, block_size in [
        *((64, block_size) for block_size in BLOCK_SIZES),
        (8, 16),
        (24, 32),
        (256, 16),
    ]
]


def drawn(spec: ModelSpec, field: str, num_blocks: int, seed: int) -> NDArray[Any]:
    """Draw a field of whole blocks."""
    rng = np.random.default_rng(seed)
    shape = field_shape(spec, field, num_blocks * spec.block_size)
    if field.endswith("scales"):
        return rng.random(shape).astype(np.float16)
    return rng.integers(-127, 128, shape, np.int8)


@pytest.mark.parametrize("spec", SHAPES)
def test_blocks_are_read_as_they_were_appended(backend: Backend, spec: ModelSpec) -> None:
    rig = Rig(backend, spec, NUM_BLOCKS)
    num_tokens = 3 * spec.block_size
    session = rig.open(num_tokens)
    rig.append([Entry(session, 1, num_tokens)], rig.draw([Entry(session, 1, num_tokens)]))
    block_ids = np.array(rig.block_tables[session], np.int64)
    for field, expected in zip(StoredTokens._fields, rig.oracle(session, 1).stored(), strict=True):
        values = backend.read_blocks(rig.cache, 1, field, block_ids)
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(bits(values), bits(expected), err_msg=field)


@pytest.mark.parametrize("spec", SHAPES)
def test_blocks_are_written_for_the_kernels_and_beside_nothing(
    backend: Backend, spec: ModelSpec
) -> None:
    rig = Rig(backend, spec, NUM_BLOCKS)
    block_ids = np.array([5, 0, 2], np.int64)
    values = {field: drawn(spec, field, 3, seed) for seed, field in enumerate(StoredTokens._fields)}
    for field, value in values.items():
        backend.write_blocks(rig.cache, 0, field, block_ids, value)
    slots = (block_ids[:, None] * spec.block_size + np.arange(spec.block_size)).ravel()
    for field, stored in rig.read(0, slots)._asdict().items():
        np.testing.assert_array_equal(bits(stored), bits(values[field]), err_msg=field)
        again = backend.read_blocks(rig.cache, 0, field, block_ids)
        np.testing.assert_array_equal(bits(again), bits(values[field]), err_msg=field)
    assert len(rig.poisoned_slots(0)) == (NUM_BLOCKS - 3) * spec.block_size
    assert len(rig.poisoned_slots(1)) == NUM_BLOCKS * spec.block_size


def test_read_only_values_are_written(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), NUM_BLOCKS)
    value = drawn(rig.spec, "v_codes", 1, 0)
    received = np.frombuffer(value.tobytes(), np.int8).reshape(value.shape)
    backend.write_blocks(rig.cache, 0, "v_codes", np.array([3]), received)
    again = backend.read_blocks(rig.cache, 0, "v_codes", np.array([3]))
    np.testing.assert_array_equal(again, value)
