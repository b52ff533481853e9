"""What steps cost: when a launch passed its stages, and what that makes for each of its steps. No clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_US = 1e6


class StageTimes(NamedTuple):
    """What one step cost; the stages follow each other without a gap.

    Attributes:
        queue_us: From when the step was read until its launch was begun.
        batch_size: Entries that shared the launch.
        batch_tokens: Tokens of those entries.
        copy_in_us: Admitting, laying out, and joining tensors.
        kernel_us: In the backend.
        copy_out_us: From there until the step's answer was cut out.
    """

    queue_us: int
    batch_size: int
    batch_tokens: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int


@dataclass(slots=True)
class LaunchTimes:
    """When a launch passed its stages, in seconds on one monotonic clock, and how much it ran.

    Attributes:
        began_at: It was taken off the queue.
        staged_at: The backend was called.
        ran_at: The backend returned.
        num_entries: Entries of all its steps.
        num_tokens: Tokens of those entries.
    """

    began_at: float
    staged_at: float = 0.0
    ran_at: float = 0.0
    num_entries: int = 0
    num_tokens: int = 0

    def of_step(self, arrived_at: float, answered_at: float) -> StageTimes:
        """Return what one of the launch's steps cost, once its answer is cut out."""
        return StageTimes(
            round((self.began_at - arrived_at) * _US),
            self.num_entries,
            self.num_tokens,
            round((self.staged_at - self.began_at) * _US),
            round((self.ran_at - self.staged_at) * _US),
            round((answered_at - self.ran_at) * _US),
        )
