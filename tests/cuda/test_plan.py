"""The planner, without a device: how a batch is cut into thread blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_server.backends.base import RaggedBatch
from octavo_server.backends.cuda_library import batch_struct

TILE_ROWS = 8
MIN_SPAN = 128
MIN_DETERMINISTIC_SPAN = 1024
MAX_DETERMINISTIC_SPLITS = 8
MAX_UNSPLIT = 640
"""Context that may stay whole though the device is idle: merging would cost more."""

SLACK = 1024
SPAN_STEP = 64
TILE_TOKENS = 16
MAX_ITEMS = 100_000


class Item(ctypes.Structure):
    """octavo::cuda::DecodeItem."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            [
                "entry",
                "first_row",
                "num_rows",
                "begin",
                "end",
                "split_idx",
                "num_splits",
                "first_partial",
                "counter",
            ]
        )
    )


@dataclass(frozen=True, slots=True)
class Request:
    """One entry of a batch to plan: of layer 0, or of layer 1, which has the window."""

    num_tokens: int = 1
    kv_len: int = 1
    is_causal: bool = True
    has_window: bool = False

    @property
    def start_pos(self) -> int:
        """Position of the first token."""
        return self.kv_len - self.num_tokens if self.is_causal and self.kv_len else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the planner made of a batch."""

    items: list[Item]
    num_partials: int
    num_counters: int


def make_plan(
    probe: ctypes.CDLL,
    requests: Sequence[Request],
    *,
    group_size: int = 4,
    num_kv_heads: int = 2,
    num_slots: int = 24,
    window: int = 100,
    slots_each: int = 2,
    deterministic: bool = False,
) -> Plan:
    """Plan a batch for a device of `num_slots` thread blocks."""
    starts = np.cumsum([0, *(request.num_tokens for request in requests)], dtype=np.int32)
    batch = RaggedBatch(
        layers=np.array([request.has_window for request in requests], np.int32),
        start_pos=np.array([request.start_pos for request in requests], np.int32),
        token_starts=starts,
        kv_lens=np.array([request.kv_len for request in requests], np.int32),
        is_causal=np.array([request.is_causal for request in requests], np.bool_),
        block_tables=np.zeros((len(requests), 1), np.int32),
        slot_mapping=np.zeros(int(starts[-1]), np.int64),
    )
    heads = (ctypes.c_int32 * 3)(group_size * num_kv_heads, num_kv_heads, deterministic)
    windows, occupancy = (ctypes.c_int32 * 2)(0, window), (ctypes.c_int32 * 2)()
    occupancy[:] = [num_slots // slots_each, slots_each]
    items, totals = (Item * MAX_ITEMS)(), (ctypes.c_int32 * 2)()
    struct = ctypes.byref(batch_struct(batch))
    num_items = probe.probe_plan(heads, windows, struct, occupancy, items, MAX_ITEMS, totals)
    return Plan(list(items[:num_items]), *totals)


def spans(plan: Plan) -> list[tuple[int, ...]]:
    """Return (entry, first_row, num_rows, begin, end, split_idx, num_splits) of each item."""
    return [
        (i.entry, i.first_row, i.num_rows, i.begin, i.end, i.split_idx, i.num_splits)
        for i in sorted(plan.items, key=place_of)
    ]


def place_of(item: Item) -> tuple[int, int, int]:
    """Return an item's place in the order of entries, rows and positions."""
    return item.entry, item.first_row, item.begin


def test_short_contexts_are_not_split(probe: ctypes.CDLL) -> None:
    plan = make_plan(probe, [Request(kv_len=200), Request(kv_len=256), Request(kv_len=1)])
    assert spans(plan) == [
        (0, 0, 4, 0, 200, 0, 1),
        (1, 0, 4, 0, 256, 0, 1),
        (2, 0, 4, 0, 1, 0, 1),
    ]
    assert (plan.num_partials, plan.num_counters) == (0, 0)


def test_a_long_context_is_split_until_the_device_is_full(probe: ctypes.CDLL) -> None:
    """24 blocks for 2 kv heads: 12 spans of the one entry, of whole steps of 64."""
    plan = make_plan(probe, [Request(kv_len=12_000)])
    assert len(plan.items) == 12
    assert spans(plan)[0] == (0, 0, 4, 0, 1024, 0, 12)
    assert spans(plan)[-1] == (0, 0, 4, 11_264, 12_000, 11, 12)
    assert (plan.num_partials, plan.num_counters) == (12, 1)


def test_rows_share_tiles_of_eight(probe: ctypes.CDLL) -> None:
    """3 tokens of 7 heads are 21 rows; a tile ends where its last row's token may look."""
    plan = make_plan(probe, [Request(num_tokens=3, kv_len=53)], group_size=7)
    assert spans(plan) == [
        (0, 0, 8, 0, 52, 0, 1),
        (0, 8, 8, 0, 53, 0, 1),
        (0, 16, 5, 0, 53, 0, 1),
    ]


def test_a_window_leaves_out_what_no_row_sees(probe: ctypes.CDLL) -> None:
    requests = [Request(num_tokens=2, kv_len=500, has_window=True)]
    plan = make_plan(probe, requests, group_size=8, window=100)
    assert spans(plan) == [(0, 0, 8, 399, 499, 0, 1), (0, 8, 8, 400, 500, 0, 1)]


def test_a_skipped_entry_has_an_item_without_context(probe: ctypes.CDLL) -> None:
    plan = make_plan(probe, [Request(kv_len=0), Request(num_tokens=2, kv_len=7, is_causal=False)])
    assert spans(plan) == [(0, 0, 4, 0, 0, 0, 1), (1, 0, 8, 0, 7, 0, 1)]


requests_strategy = st.lists(
    st.builds(
        lambda num_tokens, cached, is_causal, has_window, is_skipped: Request(
            num_tokens,
            0 if is_skipped else num_tokens + cached,
            is_causal,
            has_window and is_causal,
        ),
        st.integers(1, 20),
        st.one_of(st.integers(0, 300), st.integers(0, 40_000)),
        st.booleans(),
        st.booleans(),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    requests=requests_strategy,
    group_size=st.sampled_from([1, 4, 7, 8, 16]),
    num_slots=st.sampled_from([2, 24, 400]),
    deterministic=st.booleans(),
)
def test_every_row_sees_its_context_once(
    probe: ctypes.CDLL,
    requests: list[Request],
    group_size: int,
    num_slots: int,
    deterministic: bool,
) -> None:
    plan = make_plan(
        probe, requests, group_size=group_size, num_slots=num_slots, deterministic=deterministic
    )
    rows: dict[int, list[int]] = {entry: [] for entry in range(len(requests))}
    partials: list[int] = []
    counters: list[int] = []
    ordered = sorted(plan.items, key=place_of)
    for (entry, first_row), grouped in groupby(ordered, lambda i: (i.entry, i.first_row)):
        tile = list(grouped)
        rows[entry] += range(first_row, first_row + tile[0].num_rows)
        check_tile(tile, requests[entry], group_size)
        if len(tile) > 1:
            first = tile[0].first_partial
            partials += range(first, first + len(tile))
            counters.append(tile[0].counter)
    for entry, request in enumerate(requests):
        assert rows[entry] == list(range(request.num_tokens * group_size))
    assert partials == list(range(plan.num_partials))
    assert counters == list(range(plan.num_counters))
    if deterministic:
        check_deterministic_spans(plan)
    else:
        check_spans(plan, num_slots // 2, num_kv_heads=2)


def check_tile(tile: list[Item], request: Request, group_size: int, window: int = 100) -> None:
    """Check that the items of a few rows follow each other from the first position seen to the last."""
    assert 1 <= tile[0].num_rows <= TILE_ROWS
    assert [item.split_idx for item in tile] == list(range(len(tile)))
    assert {item.num_splits for item in tile} == {len(tile)}
    assert all(one.end == other.begin for one, other in pairwise(tile))
    begin, end = 0, request.kv_len
    if request.is_causal and request.kv_len:
        last_row = tile[0].first_row + tile[0].num_rows - 1
        end = request.start_pos + last_row // group_size + 1
        if request.has_window:
            begin = max(0, request.start_pos + tile[0].first_row // group_size + 1 - window)
    assert (tile[0].begin, tile[-1].end) == (begin, end)


def check_spans(plan: Plan, num_multiprocessors: int, num_kv_heads: int) -> None:
    """Check that splits have one length, that whole ones come first, and that no block lags behind."""
    lengths = [item.end - item.begin for item in plan.items]
    inner = [item for item in plan.items if item.split_idx + 1 < item.num_splits]
    if inner:
        # A first span may begin within a tile of 16 tokens.
        span_len = -(-max(item.end - item.begin for item in inner) // SPAN_STEP) * SPAN_STEP
        assert span_len >= MIN_SPAN
        assert all(span_len - TILE_TOKENS < item.end - item.begin <= span_len for item in inner)
        is_whole = [length > span_len - TILE_TOKENS for length in lengths]
        assert all(is_whole[: len(inner)]), "a rest before a whole span"
    fair_share = sum(lengths) * num_kv_heads / num_multiprocessors
    assert max(lengths) <= max(MAX_UNSPLIT, 1.25 * fair_share + SLACK)


def check_deterministic_spans(plan: Plan) -> None:
    """Check that no entry has more splits than its own length allows."""
    assert max(item.num_splits for item in plan.items) <= MAX_DETERMINISTIC_SPLITS + 1
    assert all(
        item.end - item.begin >= MIN_DETERMINISTIC_SPAN
        or item.split_idx in (0, item.num_splits - 1)
        for item in plan.items
    )


@pytest.mark.parametrize(
    ("requests", "num_kv_heads", "most_over_fair"),
    [
        ([Request(kv_len=32_768)] * 8, 8, 1.1),
        ([Request(kv_len=8_192)] * 64, 8, 2.2),
        ([Request(kv_len=1_024)] * 49 + [Request(kv_len=131_072)], 8, 1.2),
        ([Request(kv_len=1_024)] * 48 + [Request(kv_len=131_072)], 8, 1.2),
        ([Request(num_tokens=512, kv_len=512), Request(kv_len=131_072)], 8, 1.2),
        ([Request(kv_len=131_072)], 1, 2.0),
        ([Request(kv_len=32_768)] * 4096, 8, 1.0),
    ],
    ids=[
        "8x32k",
        "64x8k",
        "one long",
        "one long, full",
        "prompt and long",
        "128k alone",
        "4096x32k",
    ],
)
def test_no_block_reads_much_more_than_its_share(
    probe: ctypes.CDLL, requests: list[Request], num_kv_heads: int, most_over_fair: float
) -> None:
    """On 132 multiprocessors of 3 blocks; the share is what each of them reads if all read alike."""
    plan = make_plan(probe, requests, num_kv_heads=num_kv_heads, num_slots=396, slots_each=3)
    lengths = [item.end - item.begin for item in plan.items]
    fair_share = sum(lengths) * num_kv_heads / 132
    assert max(lengths) <= max(most_over_fair * fair_share, 1024)
    assert plan.num_partials <= 2 * len(requests) + 2 * 396


def test_a_deterministic_prompt_fills_the_device_unsplit(probe: ctypes.CDLL) -> None:
    """16 tiles of an entry are split, 17 are not: the partial results of a long prompt would fill memory."""
    few = make_plan(probe, [Request(num_tokens=32, kv_len=5_000)], deterministic=True)
    many = make_plan(probe, [Request(num_tokens=33, kv_len=5_000)], deterministic=True)
    assert {item.num_splits for item in few.items} == {5}
    assert {item.num_splits for item in many.items} == {1}


@pytest.mark.parametrize("others", [0, 1, 30])
def test_a_deterministic_plan_of_an_entry_does_not_see_the_others(
    probe: ctypes.CDLL, others: int
) -> None:
    own = Request(num_tokens=3, kv_len=9_000)
    alone = make_plan(probe, [own], deterministic=True)
    requests = [*[Request(kv_len=777)] * others, own]
    shared = make_plan(probe, requests, deterministic=True, num_slots=400)
    assert [span[1:] for span in spans(shared)[-len(alone.items) :]] == [
        span[1:] for span in spans(alone)
    ]
