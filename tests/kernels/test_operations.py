"""The three operations, each driven alone, and what goes with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo_server.backends.base import (
    NO_OFFENCE,
    Backend,
    PagedInt8Layer,
    UnsupportedError,
    alloc_paged_int8_cache,
    composed_step,
)
from octavo_server.model import BLOCK_SIZES
from tests.kernels.rig import Entry, Rig, bits, make_spec


def tensors(layer: PagedInt8Layer) -> tuple[torch.Tensor, ...]:
    """Return the four tensors of a layer."""
    return layer.k_codes, layer.v_codes, layer.k_scales, layer.v_scales


def pool_bytes(rig: Rig) -> bytes:
    """Return everything that a rig's pool holds."""
    flat = [
        tensor.flatten().view(torch.uint8)
        for layer in rig.cache.layers
        for tensor in tensors(layer)
    ]
    return torch.cat(flat).cpu().numpy().tobytes()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_alloc_alone_takes_what_the_spec_says(backend: Backend, block_size: int) -> None:
    spec = make_spec(3, 2, 72, block_size=block_size)
    layer = backend.alloc_paged_int8_layer(spec, num_blocks=5)
    layer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors(layer))
    assert layer_bytes == 5 * spec.block_bytes // spec.num_layers


def test_alloc_refuses_more_than_there_is(backend: Backend) -> None:
    spec = make_spec(8, 1, 128, block_size=128)
    num_blocks = 4 * backend.free_bytes() // (spec.block_bytes // spec.num_layers)
    with pytest.raises(UnsupportedError, match=str(num_blocks)):
        backend.alloc_paged_int8_layer(spec, num_blocks)


def test_append_alone_stores(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), num_blocks=8)
    entries = [Entry(rig.open(20), 1, 20)]
    inputs = rig.draw(entries)
    batch = rig.batch(entries, appends=True)
    offences = backend.int8_kv_append_paged(rig.cache, batch, inputs.k, inputs.v)
    assert offences.tolist() == [NO_OFFENCE]
    rig.oracle(0, 1).append(inputs.k, inputs.v)
    rig.verify_stored(0, 1)


@pytest.mark.parametrize("has_q", [True, False])
@pytest.mark.parametrize("has_kv", [True, False])
def test_a_step_is_its_operations(backend: Backend, has_q: bool, has_kv: bool) -> None:
    rig = Rig(backend, make_spec(), num_blocks=16)
    for session in (rig.open(30), rig.open(30)):
        rig.fill(session, 0, 20)
    entries = [Entry(0, 0, 5), Entry(1, 0, 2)]
    inputs = rig.draw(entries)
    inputs.k[6, 1, 0] = np.nan
    batch = rig.batch(entries, appends=has_kv)
    q, kv = inputs.q if has_q else None, (inputs.k, inputs.v) if has_kv else None
    output = backend.step(rig.cache, batch, q, kv, return_lse=True)
    expected = composed_step(backend, rig.cache, batch, q, kv, return_lse=True)
    assert output.offences.tolist() == expected.offences.tolist()
    assert (output.offences[1] == NO_OFFENCE) != has_kv
    for actual, composed in ((output.out, expected.out), (output.lse, expected.lse)):
        assert (actual is not None) == has_q
        if (
            actual is not None and composed is not None
        ):  # the rows of the entry that does not offend
            np.testing.assert_allclose(actual[:5], composed[:5], rtol=1e-5, atol=1e-6)


def test_decode_alone_reads_and_changes_nothing(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), num_blocks=8)
    session = rig.open(50)
    rig.fill(session, 0, 50)
    entries = [Entry(session, 0, 4, start_pos=46)]
    before = pool_bytes(rig)
    rig.query(entries, rig.draw(entries).q)
    assert pool_bytes(rig) == before


def test_a_replay_writes_nothing_and_answers_the_same(backend: Backend) -> None:
    """As the engine replays: k and v are there, every slot is -1."""
    rig = Rig(backend, make_spec(), num_blocks=8)
    entries = [Entry(rig.open(50), 0, 5)]
    inputs = rig.draw(entries)
    batch = rig.append(entries, inputs)
    answer = rig.attend(batch, inputs.q)
    before = pool_bytes(rig)
    batch.slot_mapping[:] = -1
    other = rig.draw(entries)
    offences = backend.int8_kv_append_paged(rig.cache, batch, other.k, other.v)
    assert offences.tolist() == [NO_OFFENCE]
    assert pool_bytes(rig) == before
    again = rig.attend(batch, inputs.q)
    rig.verify(entries_at(entries, 0), batch, inputs.q, again)
    np.testing.assert_array_equal(bits(again.out), bits(answer.out))


def entries_at(entries: list[Entry], start_pos: int) -> list[Entry]:
    """Return entries as queries of a stored position."""
    return [Entry(entry.session, entry.layer, entry.num_tokens, start_pos) for entry in entries]


def test_overwriting_a_refused_append(backend: Backend) -> None:
    """Slots past the length may hold anything; the next append there replaces it."""
    rig = Rig(backend, make_spec(), num_blocks=8)
    session = rig.open(40)
    rig.fill(session, 0, 14)
    entries = [Entry(session, 0, 6)]
    refused = rig.draw(entries)
    refused.k[2, 0, 0] = np.nan
    batch = rig.batch(entries, appends=True)
    assert (backend.int8_kv_append_paged(rig.cache, batch, refused.k, refused.v) < NO_OFFENCE).all()
    rig.query([Entry(session, 0, 14, start_pos=0)], rig.draw([Entry(session, 0, 14)]).q)
    rig.step(entries, rig.draw(entries))
    rig.verify_stored(session, 0)


def test_copy_blocks_copies_every_layer_and_nothing_else(backend: Backend) -> None:
    spec = make_spec(head_dim=72)
    rig = Rig(backend, spec, num_blocks=8)
    source, target = rig.open(40), rig.open(40)
    for layer in (0, 1):
        rig.fill(source, layer, 35)
    pairs = list(zip(rig.block_tables[source], rig.block_tables[target], strict=True))
    backend.copy_blocks(rig.cache, pairs)
    used = {*rig.slots(source, 0, 35), *rig.slots(target, 0, 35)}
    for layer in (0, 1):
        both = [rig.read(layer, rig.slots(session, 0, 35)) for session in (source, target)]
        for first, second in zip(*both, strict=True):
            np.testing.assert_array_equal(first, second)
        rig.verify_stored(source, layer)
        assert set(rig.poisoned_slots(layer)) == {*range(8 * spec.block_size)} - used


def test_copy_blocks_of_nothing(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), num_blocks=2)
    before = pool_bytes(rig)
    backend.copy_blocks(rig.cache, [])
    assert pool_bytes(rig) == before


def test_read_tokens_keeps_the_order_and_copies(backend: Backend) -> None:
    rig = Rig(backend, make_spec(), num_blocks=8)
    session = rig.open(40)
    rig.fill(session, 0, 40)
    slots = rig.slots(session, 0, 40)
    order = np.array([39, 0, 17, 17, 5])
    before = pool_bytes(rig)
    stored = rig.read(0, slots[order])
    for actual, expected in zip(stored, rig.oracle(session, 0).stored(), strict=True):
        np.testing.assert_array_equal(actual, expected[order])
    stored.k_codes[...] = 1
    stored.v_scales[...] = 1
    assert pool_bytes(rig) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_dim": 12}, "head_dim.*multiple of 8 up to 256, got 12"),
        ({"head_dim": 264}, "head_dim.*multiple of 8 up to 256, got 264"),
        ({"block_size": 24}, "block_size.*16, 32, 64, 128.*got 24"),
    ],
)
def test_check_model_refuses_with_what_is_supported(
    backend: Backend, options: dict[str, int], said: str
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        backend.check_model(make_spec(**options))


def test_check_model_accepts_what_every_backend_serves(backend: Backend) -> None:
    for head_dim in range(8, 257, 8):
        for block_size in BLOCK_SIZES:
            backend.check_model(make_spec(3, 7, head_dim, block_size=block_size))


def test_models_do_not_share_a_pool(backend: Backend) -> None:
    spec = make_spec()
    first, second = (alloc_paged_int8_cache(backend, spec, 2) for _ in range(2))
    pointers = [
        t.data_ptr() for cache in (first, second) for layer in cache.layers for t in tensors(layer)
    ]
    assert len(set(pointers)) == len(pointers) == 16
