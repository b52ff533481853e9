"""A contestant of a case with the answers that it is checked by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tests.bench.contest import Contestant
from tests.bench.shapes import num_copies

MOST_BYTES = 1 << 30
"""Memory for one contestant's caches."""


LLC_MULTIPLE = 12
"""Of four times the cache, a tenth was still found in it."""


class PeerError(Exception):
    """A peer that cannot take part; the text says why."""


@dataclass(frozen=True, slots=True)
class Racer:
    """What is checked and timed.

    Attributes:
        contestant: What is timed; its launch rotates over the copies.
        num_copies: Equal caches in memory of their own.
        answer: The answer from one copy, [num_sessions, num_q_heads, head_dim].
    """

    contestant: Contestant
    num_copies: int
    answer: Callable[[int], NDArray[Any]]


def copies_of(cache_bytes: int, llc_bytes: int) -> int:
    """Return how many copies of a cache keep it from being found in the last-level cache."""
    return num_copies(cache_bytes, llc_bytes, max(MOST_BYTES, cache_bytes), LLC_MULTIPLE)


def rotating(
    name: str, dtype: str, launch_bytes: int, num_caches: int, run: Callable[[int], object]
) -> Contestant:
    """Return a contestant whose launch numbered n runs on copy n % num_caches."""

    def launch(first: int, count: int) -> None:
        for idx in range(first, first + count):
            run(idx % num_caches)

    return Contestant(name, dtype, launch_bytes, launch)


def racer(
    name: str,
    dtype: str,
    launch_bytes: int,
    num_caches: int,
    answer: Callable[[int], NDArray[Any]],
) -> Racer:
    """Return a racer whose launch is what answers."""
    contestant = rotating(name, dtype, launch_bytes, num_caches, answer)
    return Racer(contestant, num_caches, answer)
