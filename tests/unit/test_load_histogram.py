"""The load test's histogram: percentiles within 1%, whatever was recorded and however it was merged."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_client.load.histogram import (
    MAX_VALUE,
    SUB_BUCKETS,
    Histogram,
    bucket_bounds,
    bucket_of,
)

VALUES = st.lists(st.integers(0, MAX_VALUE) | st.integers(0, 10_000_000), min_size=1, max_size=200)


def recorded(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.integers(0, MAX_VALUE))
def test_a_value_is_within_its_bucket_which_is_narrow(value: int) -> None:
    low, beyond = bucket_bounds(bucket_of(value))
    assert low <= value < beyond
    assert beyond - low == 1 or (beyond - low) / low <= 1 / SUB_BUCKETS


@given(st.integers(0, 40_000))
def test_buckets_follow_each_other(bucket: int) -> None:
    bucket %= bucket_of(MAX_VALUE)
    assert bucket_bounds(bucket)[1] == bucket_bounds(bucket + 1)[0]


def test_buckets_are_bounded() -> None:
    assert bucket_of(MAX_VALUE) < 5376
    assert len(recorded([2**70, MAX_VALUE]).counts) == 1


@given(VALUES, st.sampled_from([0.0, 50.0, 90.0, 95.0, 99.0, 99.9, 100.0]))
def test_percentiles_are_within_one_percent(values: list[int], percent: float) -> None:
    rank = max(math.ceil(len(values) * percent / 100), 1)
    exact = sorted(values)[rank - 1]
    assert recorded(values).percentile(percent) == pytest.approx(exact, rel=0.005, abs=0.5)


@given(VALUES, VALUES)
def test_merging_is_recording_both(first: list[int], second: list[int]) -> None:
    merged = recorded(first)
    merged.merge(recorded(second))
    assert merged == recorded(first + second)
    assert merged.mean == pytest.approx(sum(first + second) / len(first + second))


def test_ascending_percentiles_are_those_one_by_one() -> None:
    histogram = recorded([7, 100, 100, 5_000, 90_000_000])
    percents = [1.0, 20.0, 50.0, 99.0, 100.0]
    assert histogram.percentiles(percents) == [histogram.percentile(p) for p in percents]
    assert histogram.percentile(100) == 90_000_000


def test_an_empty_histogram_has_zeros() -> None:
    assert Histogram().percentiles([50, 99]) == [0, 0]
    assert Histogram().mean == 0
