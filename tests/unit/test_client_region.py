"""The room of a region: taken from the lowest that fits, free again with its last array."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from numpy.typing import NDArray

from octavo_client._shared_memory import Region, align

NUM_BYTES = 64 * 32


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=40))
def test_rooms_never_overlap_and_all_come_back(turns: list[tuple[bool, int]]) -> None:
    region = Region(bytearray(NUM_BYTES), NUM_BYTES)
    held: list[tuple[int, NDArray[np.uint8]]] = []
    for is_return, size in turns:
        if is_return and held:
            held.pop(size % len(held))
            continue
        taken = region.take(size)
        if taken is None:
            edges = [(0, 0), *spans_of(held), (NUM_BYTES, NUM_BYTES)]
            gaps = [start - end for (_, end), (start, _) in itertools.pairwise(edges)]
            assert max(gaps) < align(size)
            continue
        held.append(taken)
        taken = None  # or it would keep its room once it is given back
        spans = spans_of(held)
        assert all(start % 64 == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= NUM_BYTES
    held.clear()
    whole = region.take(NUM_BYTES)
    assert whole is not None
    assert whole[0] == 0
    assert region._free == []


def spans_of(held: list[tuple[int, NDArray[np.uint8]]]) -> list[tuple[int, int]]:
    return sorted((start, start + align(len(array))) for start, array in held)


def test_a_view_keeps_its_room() -> None:
    region = Region(bytearray(NUM_BYTES), NUM_BYTES)
    taken = region.take(512)
    assert taken is not None
    rows = taken[1][128:256].view(np.float16).reshape(8, 8)[2:4]
    del taken
    assert region.take(NUM_BYTES) is None
    assert (region.take(64) or (0, None))[0] == 512
    del rows
    assert (region.take(512) or (1, None))[0] == 0


def test_the_lowest_room_is_taken_first() -> None:
    region = Region(bytearray(NUM_BYTES), NUM_BYTES)
    rooms = [region.take(64) for _ in range(4)]
    del rooms[1]
    assert (region.take(65) or (0, None))[0] == 256
    assert (region.take(1) or (0, None))[0] == 64
