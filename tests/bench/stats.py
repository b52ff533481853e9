"""Samples, and what is told of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """The median of samples and their spread."""

    median: float
    p10: float
    p90: float
    num_samples: int


def summarize(samples: Sequence[float]) -> Summary:
    """Return the median, and the 10th and 90th percentile: the nearest samples, none made up."""
    ordered = sorted(samples)
    return Summary(
        statistics.median(ordered),
        _percentile(ordered, 0.1),
        _percentile(ordered, 0.9),
        len(ordered),
    )


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Summarize the ratio of each pair of samples, which were taken one after the other."""
    return summarize([x / y for x, y in zip(numerators, denominators, strict=True)])


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, max(0, math.ceil(fraction * len(ordered)) - 1))]
