"""Contestants timed in turn, in blocks of few rounds with the limit measured before and after each block.

How fast memory is read flips by itself within seconds. So a block is short, it counts only where the limits around it
agree, and what it found is kept under the mode that they tell of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.contest import MAX_LAUNCHES, Contestant
from tests.bench.cpu.memory import Limit, Mode, mode_of
from tests.bench.stats import Summary, ratios, summarize

SAMPLE_US = 8000.0
"""How long one sample should last."""

WARM_US = 20000.0
"""Launches up to this long run once untimed before each sample: threads that slept are awake then."""

SETTLE_S = 0.010
"""Pause before each sample: the last contestant's threads, which spin for a while, go to sleep."""

AGREEMENT = 0.10
"""How far apart the limits before and after a block may be, of the larger one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a race takes.

    Attributes:
        num_rounds: Rounds of a block: each contestant has one sample a round.
        num_samples: Samples that are wanted of each contestant in blocks that count.
        max_blocks: Blocks after which the race ends without them.
    """

    num_rounds: int = 1
    num_samples: int = 20
    max_blocks: int = 32


@dataclass(frozen=True, slots=True)
class Block:
    """A few rounds, or one.

    Attributes:
        before: The limit just before.
        after: The limit just after.
        samples: Microseconds a launch by contestant, in the order of the rounds.
    """

    before: Limit
    after: Limit
    samples: dict[str, list[float]]

    @property
    def is_steady(self) -> bool:
        """Return whether the limits agree, so that the block counts."""
        low, high = sorted((self.before.read_gb_per_s, self.after.read_gb_per_s))
        return high - low <= AGREEMENT * high

    @property
    def read_gb_per_s(self) -> float:
        """Return the limit: the mean of before and after."""
        return (self.before.read_gb_per_s + self.after.read_gb_per_s) / 2

    @property
    def mode(self) -> Mode:
        """Return the mode that the mean limits tell of."""
        one = (self.before.one_thread_gb_per_s + self.after.one_thread_gb_per_s) / 2
        return mode_of(self.read_gb_per_s, one)

    @property
    def num_rounds(self) -> int:
        """Return the rounds."""
        return min((len(samples) for samples in self.samples.values()), default=0)


@dataclass(slots=True)
class Entrant:
    """A contestant with the launches of its samples."""

    contestant: Contestant
    num_launches: int
    is_warmed: bool
    _position: int = field(default=0)

    def sample(self) -> float:
        """Run one sample; returns microseconds a launch."""
        time.sleep(SETTLE_S)
        if self.is_warmed:
            self._launch(1)
        return self._launch(self.num_launches) / self.num_launches

    def _launch(self, count: int) -> float:
        elapsed = time_us(self.contestant, self._position, count)
        self._position += count
        return elapsed


def race(
    contestants: Sequence[Contestant],
    measure_limit: Callable[[], Limit],
    plan: Plan,
    has_time: Callable[[], bool] = lambda: True,
) -> list[Block]:
    """Time the contestants in turn, until enough blocks count, or enough were run, or there is no time for more."""
    entrants = [_prepare(contestant) for contestant in contestants]
    blocks: list[Block] = []
    before = measure_limit()
    while len(blocks) < plan.max_blocks and not _is_enough(blocks, plan):
        if blocks and not has_time():
            break
        samples: dict[str, list[float]] = {one.contestant.name: [] for one in entrants}
        for _ in range(plan.num_rounds):
            for entrant in entrants:
                samples[entrant.contestant.name].append(entrant.sample())
        after = measure_limit()
        blocks.append(Block(before, after, samples))
        before = after
    return blocks


def steady(blocks: Sequence[Block], mode: Mode | None = None) -> list[Block]:
    """Return the blocks that count, of one mode or of both."""
    return [block for block in blocks if block.is_steady and mode in (None, block.mode)]


def times(blocks: Sequence[Block], name: str) -> Summary | None:
    """Return a contestant's microseconds a launch; None without samples."""
    samples = _samples(blocks, name)
    return summarize(samples) if samples else None


def ratio(blocks: Sequence[Block], slow: str, fast: str) -> Summary | None:
    """Return how many times as long one contestant took as another, round by round; None without samples."""
    pairs = _samples(blocks, slow), _samples(blocks, fast)
    return ratios(*pairs) if all(pairs) else None


def difference(blocks: Sequence[Block], long: str, short: str) -> Summary | None:
    """Return how much longer one contestant took than another, round by round; None without samples."""
    pairs = list(zip(_samples(blocks, long), _samples(blocks, short), strict=True))
    return summarize([x - y for x, y in pairs]) if pairs else None


def fraction(blocks: Sequence[Block], name: str, launch_bytes: int) -> Summary | None:
    """Return a contestant's rate over the limit of each sample's block; None without samples."""
    fractions = [
        launch_bytes / us / 1e3 / block.read_gb_per_s
        for block in blocks
        for us in block.samples.get(name, [])
    ]
    return summarize(fractions) if fractions else None


def time_us(contestant: Contestant, first: int, count: int) -> float:
    """Return how long launches take together, in microseconds."""
    start = time.perf_counter_ns()
    contestant.launch(first, count)
    return (time.perf_counter_ns() - start) / 1e3


def launches_for(launch_us: float) -> int:
    """Return the launches of one sample."""
    return max(1, min(MAX_LAUNCHES, math.ceil(SAMPLE_US / max(launch_us, 1e-3))))


def _prepare(contestant: Contestant) -> Entrant:
    """Launch once for what the first launch alone does, then find how many make a sample."""
    time_us(contestant, 0, 1)
    warm_us = min(time_us(contestant, idx, 1) for idx in (1, 2))
    return Entrant(contestant, launches_for(warm_us), warm_us <= WARM_US)


def _is_enough(blocks: Sequence[Block], plan: Plan) -> bool:
    return sum(block.num_rounds for block in steady(blocks)) >= plan.num_samples


def _samples(blocks: Sequence[Block], name: str) -> list[float]:
    return [us for block in blocks for us in block.samples.get(name, [])]
