"""Contestants timed in turn: A B A B, so that what drifts drifts for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tests.bench.device import Device
from tests.bench.stats import Summary, ratios, summarize

SAMPLE_US = 2000.0
"""How long one sample should last: launches enough that the clock's own cost is lost in it."""

MAX_LAUNCHES = 512
_NUM_WARM = 3

Launch = Callable[[int, int], None]
"""Queues `count` launches from the one numbered `first` on: launch(first, count)."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """What is timed.

    Attributes:
        name: Unique among those that it is timed with.
        dtype: What its cache holds.
        launch_bytes: What one launch has to read, or to move.
        launch: Queues launches.
        in_graph: Whether a sample's launches are captured once and replayed, so that the host's part does not count.
    """

    name: str
    dtype: str
    launch_bytes: int
    launch: Launch
    in_graph: bool = False


@dataclass(slots=True)
class Entrant:
    """A contestant with its samples, in microseconds a launch.

    Attributes:
        contestant: Who.
        num_launches: Launches of one sample.
        replay: The captured sample, None for plain launches.
        note: Why it is not captured though it should be, or nothing.
        samples: In the order of the rounds.
    """

    contestant: Contestant
    num_launches: int
    replay: Callable[[], None] | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list)
    _position: int = 0

    @property
    def summary(self) -> Summary:
        """Return the samples' summary."""
        return summarize(self.samples)

    def sample(self, device: Device) -> float:
        """Run one sample; returns microseconds a launch."""
        return device.time_us(self.replay or self._launch) / self.num_launches

    def _launch(self) -> None:
        self.contestant.launch(self._position, self.num_launches)
        self._position += self.num_launches


def compete(device: Device, contestants: Sequence[Contestant], num_rounds: int) -> list[Entrant]:
    """Warm up, then time one sample of each contestant in each round."""
    entrants = [_prepare(device, contestant) for contestant in contestants]
    for entrant in entrants:
        entrant.sample(device)
    for _ in range(num_rounds):
        for entrant in entrants:
            entrant.samples.append(entrant.sample(device))
    return entrants


def speedup(entrant: Entrant, over: Entrant) -> Summary:
    """Return how many times as fast as another an entrant was, round by round."""
    return ratios(over.samples, entrant.samples)


def launches_for(launch_us: float) -> int:
    """Return the launches of one sample."""
    return max(1, min(MAX_LAUNCHES, math.ceil(SAMPLE_US / max(launch_us, 1e-3))))


def _prepare(device: Device, contestant: Contestant) -> Entrant:
    """Launch once for what the first launch alone does, then find how many make a sample."""
    device.time_us(partial(contestant.launch, 0, 1))
    warm_us = device.time_us(partial(contestant.launch, 0, _NUM_WARM)) / _NUM_WARM
    entrant = Entrant(contestant, launches_for(warm_us))
    if contestant.in_graph:
        try:
            entrant.replay = device.capture(partial(contestant.launch, 0, entrant.num_launches))
        except RuntimeError as error:
            entrant.note = f"not captured: {str(error).partition(chr(10))[0]}"
    return entrant
