"""A histogram of nanoseconds with bounded memory: buckets as wide as 1/128 of their values, as in HdrHistogram.

A percentile is the middle of its bucket, so it is within 0.4% of the exact one; count, sum, least and most are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SUB_BITS = 7
SUB_BUCKETS = 1 << SUB_BITS
MAX_VALUE = (1 << 48) - 1
"""Three days; larger values count as this."""


def bucket_of(value: int) -> int:
    """Return the bucket of a value: each power of two is cut into SUB_BUCKETS."""
    shift = max(value.bit_length() - SUB_BITS - 1, 0)
    return shift * SUB_BUCKETS + (value >> shift)


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """Return the least value of a bucket, and the least value beyond it."""
    shift = max(bucket // SUB_BUCKETS - 1, 0)
    low = bucket - shift * SUB_BUCKETS
    return low << shift, (low + 1) << shift


@dataclass(slots=True)
class Histogram:
    """How often which durations were seen.

    Attributes:
        counts: Values by bucket; at most 5,376 buckets ever.
        num_values: Values.
        total: Their sum.
        least: The smallest; MAX_VALUE when there is none.
        most: The largest.
    """

    counts: dict[int, int] = field(default_factory=dict)
    num_values: int = 0
    total: int = 0
    least: int = MAX_VALUE
    most: int = 0

    def record(self, value: int) -> None:
        """Count a value; one below 0 counts as 0."""
        value = min(max(value, 0), MAX_VALUE)
        bucket = bucket_of(value)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.num_values += 1
        self.total += value
        self.least = min(self.least, value)
        self.most = max(self.most, value)

    def merge(self, other: Histogram) -> None:
        """Count everything that another histogram counted."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.num_values += other.num_values
        self.total += other.total
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)

    @property
    def mean(self) -> float:
        """The mean; 0 when there is no value."""
        return self.total / self.num_values if self.num_values else 0.0

    def percentile(self, percent: float) -> float:
        """Return the value that `percent` of all do not exceed; 0 when there is none."""
        (value,) = self.percentiles([percent])
        return value

    def percentiles(self, percents: Iterable[float]) -> list[float]:
        """Return several percentiles, which must ascend."""
        found = []
        buckets = iter(sorted(self.counts.items()))
        seen, value = 0, 0.0
        for percent in percents:
            wanted = max(-(-self.num_values * percent // 100), 1)
            while seen < wanted:
                bucket, count = next(buckets, (None, 0))
                if bucket is None:
                    break
                seen += count
                value = self._middle(bucket)
            found.append(self.most if wanted >= self.num_values else value)
        return found

    def _middle(self, bucket: int) -> float:
        low, beyond = bucket_bounds(bucket)
        return min(max((low + beyond - 1) / 2, self.least), self.most)
