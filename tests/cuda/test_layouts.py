"""Where arrays lie, without a device: those of a step in its staging buffer, tiles in shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import pytest

from tests.cuda.test_plan import Item

BATCH_ARRAYS = ("layers", "start_pos", "token_starts", "kv_lens", "is_causal", "block_tables")
TOKEN_ARRAYS = ("slot_mapping", "row_entries", "items", "k", "v", "q")
STAGED = (*BATCH_ARRAYS, *TOKEN_ARRAYS, "offences", "out", "lse", "total_bytes")
"""Fields of octavo::cuda::StagingLayout, in order."""

ALIGNMENT = 128


@pytest.mark.parametrize("appends", [0, 1])
@pytest.mark.parametrize("attends", [0, 1])
@pytest.mark.parametrize("returns_lse", [0, 1])
def test_staging_holds_every_array_once(
    probe: ctypes.CDLL, appends: int, attends: int, returns_lse: int
) -> None:
    num_entries, max_num_blocks, total_tokens, num_items = 3, 5, 7, 4 * attends
    num_q_heads, num_kv_heads, head_dim, element_bytes = 8, 2, 72, 2
    sizes = (
        *(num_entries, max_num_blocks, total_tokens, num_items, num_q_heads, num_kv_heads),
        *(head_dim, element_bytes, appends, attends, returns_lse and attends),
    )
    offsets = (ctypes.c_int64 * len(STAGED))()
    probe.probe_staging((ctypes.c_int64 * len(sizes))(*sizes), offsets)
    kv_bytes = appends * total_tokens * num_kv_heads * head_dim * element_bytes
    q_bytes = attends * total_tokens * num_q_heads * head_dim * element_bytes
    needed = {
        "layers": 4 * num_entries,
        "start_pos": 4 * num_entries,
        "token_starts": 4 * (num_entries + 1),
        "kv_lens": 4 * num_entries,
        "is_causal": num_entries,
        "block_tables": 4 * num_entries * max_num_blocks,
        "slot_mapping": appends * 8 * total_tokens,
        "row_entries": appends * 4 * total_tokens,
        "items": ctypes.sizeof(Item) * num_items,
        "k": kv_bytes,
        "v": kv_bytes,
        "q": q_bytes,
        "offences": 8 * num_entries,
        "out": q_bytes,
        "lse": attends * returns_lse * 4 * total_tokens * num_q_heads,
    }
    assert tuple(needed) == STAGED[:-1]
    places = dict(zip(STAGED, offsets, strict=True))
    for name, following in pairwise(STAGED):
        assert places[name] % ALIGNMENT == 0
        room = places[following] - places[name]
        assert needed[name] <= room < needed[name] + ALIGNMENT


def num_conflicts(addresses: Sequence[int], num_bytes: int) -> int:
    """Return how often a bank of shared memory is asked for different words by lanes that read at once."""
    lanes_at_once = min(128 // num_bytes, 32)
    worst = 0
    for first in range(0, 32, lanes_at_once):
        words: dict[int, set[int]] = {}
        for address in addresses[first : first + lanes_at_once]:
            for word in range(address // 4, -(-(address + num_bytes) // 4)):
                words.setdefault(word % 32, set()).add(word)
        worst = max(worst, *map(len, words.values()))
    return worst - 1


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_no_read_of_a_tile_has_a_bank_conflict(probe: ctypes.CDLL, head_dim: int) -> None:
    """Lane l reads K of rows l / 4 and + 8, V of rows 2 (l % 4), + 1, + 8 and + 9; every dim is read once."""
    numbers, key_dims, value_dims = ((ctypes.c_int32 * size)() for size in (5, 128, 128))
    probe.probe_shape(head_dim, numbers, key_dims, value_dims)
    key_vector, key_pitch, value_vector, value_pitch, num_key_vectors = numbers
    num_value_vectors = head_dim // (8 * value_vector)
    lanes = range(32)
    for i in range(num_key_vectors):
        for row in (0, 8):
            k = [(lane // 4 + row) * key_pitch + key_dims[4 * i + lane % 4] for lane in lanes]
            assert num_conflicts(k, key_vector) == 0
    for i in range(num_value_vectors):
        for row in (0, 1, 8, 9):
            v = [
                (2 * (lane % 4) + row) * value_pitch + value_dims[8 * i + lane // 4]
                for lane in lanes
            ]
            assert num_conflicts(v, value_vector) == 0
    starts = [(key_dims[: 4 * num_key_vectors], key_vector)]
    starts.append((value_dims[: 8 * num_value_vectors], value_vector))
    for dims, size in starts:
        assert sorted(dim + byte for dim in dims for byte in range(size)) == list(range(head_dim))
