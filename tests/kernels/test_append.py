"""int8_kv_append_paged: codes and scales to the bit, in exactly the slots that were named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo_server.backends.base import NO_OFFENCE, Backend
from tests.kernels.draws import BFLOAT16, DRAWS, DTYPES, FLOAT16, FLOAT32, Inputs
from tests.kernels.rig import Entry, Rig, make_spec

HEAD_DIMS = (8, 64, 72, 80, 96, 128, 192, 256)


def store_rows(backend: Backend, x: NDArray[Any]) -> None:
    """Store rows [num_tokens, head_dim] as K, reversed as V, and compare with the oracle's bits."""
    num_tokens, head_dim = x.shape
    spec = make_spec(num_kv_heads=1, head_dim=head_dim, num_layers=1, block_size=128)
    rig = Rig(backend, spec, num_blocks=-(-num_tokens // 128))
    entries = [Entry(rig.open(num_tokens), 0, num_tokens)]
    k, v = x[:, None], x[::-1, None].copy()
    rig.append(entries, Inputs(k, k, v))
    rig.verify_stored(0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bits_of_random_rows(backend: Backend, head_dim: int, dtype: np.dtype[Any]) -> None:
    spec = make_spec(num_kv_heads=3, head_dim=head_dim)
    rig = Rig(backend, spec, num_blocks=16, seed=head_dim)
    rig.open(100)
    for draw_name in DRAWS:
        rig.fill(0, 0, 19, draw_name, dtype)
    rig.verify_stored(0, 0)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_bits_of_every_16_bit_amax(backend: Backend, dtype: np.dtype[Any]) -> None:
    every = np.arange(0x8000, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # the NaNs among them
        amax = every[every.astype(np.float32) < 65504 * 127]
    fractions = np.array([-1, 0.5, 0.25, -0.75, 1 / 3, 1e-3, -0.0, 0.9], dtype=np.float32)
    store_rows(backend, (amax.astype(np.float32)[:, None] * fractions).astype(dtype))


def test_bits_of_float32_of_every_exponent(backend: Backend) -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 2**32, (20_000, 8), dtype=np.uint32)
    exponents = rng.integers(0, 127 + 22, (20_000, 1), dtype=np.uint32)  # below 65504 * 127
    x = x & np.uint32(0x807FFFFF) | np.maximum(exponents, rng.integers(0, 3)) << np.uint32(23)
    store_rows(backend, x.view(np.float32))


@pytest.mark.parametrize(
    "amax",
    [
        0.0,
        -0.0,
        1e-45,
        1e-40,
        1e-10,
        2.0**-24 * 127,
        65504.0,
        65504.0 * 127,
        *(127 * scale for scale in (1.0, 1.5, 1.0009765625, 1024.5, 2.0**-15)),
        *(np.nextafter(np.float32(127 * 1.5), np.float32(side)) for side in (0, 1000)),
    ],
)
@pytest.mark.parametrize("head_dim", [8, 72, 128])
def test_bits_of_edges(backend: Backend, head_dim: int, amax: float) -> None:
    # Multiples of half a step are ties wherever the scale is exact.
    steps = np.arange(-head_dim, head_dim, 2, dtype=np.float32) / (2 * 127)
    x = np.float32(amax) * np.clip(steps, -1, 1)
    x[3] = amax
    store_rows(backend, np.stack([x, -x, np.roll(x, 5)]))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_only_the_named_slots_are_written(backend: Backend, block_size: int) -> None:
    spec = make_spec(head_dim=72, block_size=block_size)
    rig = Rig(backend, spec, num_blocks=12)
    first, second = rig.open(3 * block_size), rig.open(2 * block_size)
    rig.fill(first, 0, block_size - 1)
    entries = [Entry(first, 0, block_size + 3), Entry(second, 1, 5), Entry(second, 0, 1)]
    rig.append(entries, rig.draw(entries))
    for entry in entries:
        rig.verify_stored(entry.session, entry.layer)
    used = [
        {*rig.slots(first, 0, 2 * block_size + 2), *rig.slots(second, 0, 1)},
        {*rig.slots(second, 0, 5)},
    ]
    for layer, slots in enumerate(used):
        untouched = sorted({*range(12 * block_size)} - slots)
        assert rig.poisoned_slots(layer).tolist() == untouched


def test_skipped_rows_are_neither_read_nor_stored(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), num_blocks=4)
    entries = [Entry(rig.open(8), 0, 8), Entry(rig.open(4), 1, 4)]
    inputs = rig.draw(entries)
    batch = rig.batch(entries, appends=True)
    skipped = [2, 3, 7, *range(8, 12)]
    kept_slots = np.delete(batch.slot_mapping, skipped)
    batch.slot_mapping[skipped] = -1
    inputs.k[skipped] = np.nan
    inputs.v[skipped] = 1e38
    offences = backend.int8_kv_append_paged(rig.cache, batch, inputs.k, inputs.v)
    assert offences.tolist() == [NO_OFFENCE, NO_OFFENCE]
    assert set(rig.poisoned_slots(0)) == {*range(64)} - set(kept_slots)
    assert rig.poisoned_slots(1).tolist() == list(range(64))
    rig.oracle(0, 0).append(np.delete(inputs.k, skipped, 0), np.delete(inputs.v, skipped, 0))
    for actual, expected in zip(rig.read(0, kept_slots), rig.oracle(0, 0).stored(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_read_only_inputs_are_accepted(backend: Backend) -> None:
    """Tensors arrive as views of a message's bytes."""
    for dtype in DTYPES:
        rig = Rig(backend, make_spec(), num_blocks=2)
        entries = [Entry(rig.open(3), 0, 3)]
        q, k, v = rig.draw(entries, dtype=dtype)
        frozen = Inputs(*(np.frombuffer(x.tobytes(), dtype).reshape(x.shape) for x in (q, k, v)))
        rig.step(entries, frozen)
        rig.verify_stored(0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_appends_of_any_cut_store_the_same(backend: Backend, dtype: np.dtype[Any]) -> None:
    spec = make_spec(head_dim=80)
    rig = Rig(backend, spec, num_blocks=10)
    whole, parts = rig.open(50), rig.open(50)
    entries = [Entry(whole, 0, 50)]
    inputs = rig.draw(entries, dtype=dtype)
    rig.append(entries, inputs)
    for start, stop in [(0, 15), (15, 16), (16, 17), (17, 50)]:
        rig.append([Entry(parts, 0, stop - start)], Inputs(*(x[start:stop] for x in inputs)))
    both = [rig.read(0, rig.slots(session, 0, 50)) for session in (whole, parts)]
    for first, second in zip(*both, strict=True):
        np.testing.assert_array_equal(first, second)


def test_float32_is_not_rounded_on_the_way(backend: Backend) -> None:
    """A backend that took a detour through FP16 would lose the last bits of amax."""
    x = np.zeros((1, 8), dtype=FLOAT32)
    x[0, :3] = [127.00001, 63.500004, -0.49999997]
    store_rows(backend, x)
