"""What is measured: the shapes that have goals, and one shape over growing contexts for the plot."""

from __future__ import annotations

from tests.bench.cpu.race import Plan
from tests.bench.shapes import LLAMA, Case, Heads, uniform

WIDE_GROUP, ONE_TO_ONE, SMALL = Heads(64, 8, 128), Heads(32, 32, 128), Heads(14, 2, 64)

GOAL_CASES = (
    Case(LLAMA, uniform(1, 32768)),
    Case(LLAMA, uniform(8, 4096)),
    Case(LLAMA, uniform(32, 1024)),
    Case(WIDE_GROUP, uniform(4, 8192)),
    Case(ONE_TO_ONE, uniform(8, 2048)),
    Case(SMALL, uniform(16, 4096)),
)

SWEEP_BATCH = 8
SWEEP_CASES = tuple(
    Case(LLAMA, uniform(SWEEP_BATCH, length)) for length in (256, 512, 1024, 2048, 8192, 16384)
)
"""With the goals' 8x4k, in their order, one curve."""

FULL, QUICK = Plan(), Plan(num_samples=5, max_blocks=8)
QUICK_CASES = (GOAL_CASES[1], GOAL_CASES[5])


def is_in_sweep(case: Case) -> bool:
    """Return whether a case is a point of the curve."""
    return case.heads == LLAMA and len(case.workload.lengths) == SWEEP_BATCH


def estimated_s(case: Case) -> float:
    """Return how long a case takes, roughly; peers, which take most of it, read twice to four times the bytes."""
    return 4.0 + 0.2e-6 * case.cache_bytes
