"""int8_kv_append_paged: codes and scales to the bit, in exactly the slots that were named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from octavo_server.backends.base import NO_OFFENCE, Backend, Offence
from octavo_server.model import BLOCK_SIZES
from tests.kernels.draws import BFLOAT16, DRAWS, DTYPES, FLOAT16, FLOAT32, Inputs
from tests.kernels.rig import Entry, Rig, bits, make_spec

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


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bits_of_prompts_with_ragged_ends(backend: Backend, head_dim: int, block_size: int) -> None:
    """Neighbouring slots are written together, 16 at a time: every start, dtype and block."""
    rig = Rig(backend, make_spec(head_dim=head_dim, block_size=block_size), num_blocks=24)
    num_tokens = 2 * block_size + 21
    for start, dtype in zip((0, 5, 16), DTYPES, strict=True):
        session = rig.open(start + num_tokens)
        rig.fill(session, 1, start)
        rig.fill(session, 1, num_tokens, dtype=dtype)
        rig.verify_stored(session, 1)
    used = [rig.slots(session, 0, len(rig.oracle(session, 1))) for session in range(3)]
    untouched = sorted({*range(24 * block_size)} - {*np.concatenate(used).tolist()})
    assert rig.poisoned_slots(1).tolist() == untouched


def test_bits_of_prompts_longer_than_a_threads_share(backend: Backend) -> None:
    """Where threads share a batch out, a run of neighbouring slots is cut anywhere."""
    rig = Rig(backend, make_spec(num_kv_heads=4, head_dim=128), num_blocks=64)
    first, second = rig.open(330), rig.open(300)
    rig.fill(first, 0, 7)
    rig.fill(second, 0, 9)
    entries = [Entry(first, 0, 321), Entry(second, 0, 290)]
    rig.append(entries, rig.draw(entries, dtype=FLOAT16))
    for session in (first, second):
        rig.verify_stored(session, 0)


def test_neighbouring_slots_of_two_entries(backend: Backend) -> None:
    """16 of them, half in each layer."""
    rig = Rig(backend, make_spec(), num_blocks=4)
    session = rig.open(16)
    rig.fill(session, 1, 8)
    entries = [Entry(session, 0, 8), Entry(session, 1, 8)]
    rig.append(entries, rig.draw(entries))
    for layer in (0, 1):
        rig.verify_stored(session, layer)
    assert set(rig.slots(session, 8, 16)) <= set(rig.poisoned_slots(0))


@pytest.mark.parametrize("order", ["swapped", "rotated", "reversed", "gaps"])
@pytest.mark.parametrize("head_dim", [72, 128])
def test_slots_in_any_order(backend: Backend, head_dim: int, order: str) -> None:
    rig = Rig(backend, make_spec(head_dim=head_dim, block_size=32), num_blocks=4)
    entries = [Entry(rig.open(96), 0, 96)]
    inputs = rig.draw(entries, dtype=FLOAT16)
    batch = rig.batch(entries, appends=True)
    slots = batch.slot_mapping
    match order:
        case "swapped":
            slots[[40, 41]] = slots[[41, 40]]
        case "rotated":
            slots[:] = np.roll(slots, 1)
        case "reversed":
            slots[:] = slots[::-1].copy()
        case "gaps":
            slots[[0, 20, 47, 64, 79]] = -1
    backend.int8_kv_append_paged(rig.cache, batch, inputs.k, inputs.v)
    kept = slots >= 0
    rig.oracle(0, 0).append(inputs.k[kept], inputs.v[kept])
    stored: list[NDArray[Any]] = [*rig.read(0, slots[kept])]
    for actual, expected in zip(stored, rig.oracle(0, 0).stored(), strict=True):
        np.testing.assert_array_equal(bits(actual), bits(expected))
    assert set(rig.poisoned_slots(0)) == {*range(128)} - {*slots[kept].tolist()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("field", ["k", "v"])
def test_offences_among_neighbouring_slots(
    backend: Backend, field: str, dtype: np.dtype[Any]
) -> None:
    """Of three bad rows the first is named; all other rows of the 16 are stored."""
    rig = Rig(backend, make_spec(num_kv_heads=3, head_dim=80), num_blocks=6)
    entries = [Entry(rig.open(64), 0, 64)]
    inputs = rig.draw(entries, dtype=dtype)
    batch = rig.batch(entries, appends=True)
    bad = [(45, 0), (38, 2), (38, 1)]
    rows = getattr(inputs, field)
    for token, head in bad:
        rows[token, head, 79] = np.nan
    offences = backend.int8_kv_append_paged(rig.cache, batch, inputs.k, inputs.v)
    expected = Offence(field, token_idx=38, head_idx=1, is_overflow=False)
    assert [Offence.unpack(code) for code in offences.tolist()] == [expected]
    is_stored = np.ones(rows.shape[:2], dtype=bool)  # what a bad row's place holds is nobody's
    for token, head in bad:
        rows[token, head] = 0
        is_stored[token, head] = False
    rig.oracle(0, 0).append(inputs.k, inputs.v)
    stored = rig.read(0, batch.slot_mapping)._asdict()
    for name, wanted in zip(stored, rig.oracle(0, 0).stored(), strict=True):
        is_kept = is_stored if name.startswith(field) else ...
        np.testing.assert_array_equal(
            bits(stored[name])[is_kept], bits(wanted)[is_kept], err_msg=name
        )
