"""What is measured: heads, batches of contexts, and the bytes that they are read as."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

CODE_BYTES, SCALE_BYTES, BF16_BYTES, FP16_BYTES = 1, 2, 2, 2


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one layer."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def label(self) -> str:
        """Return q heads / kv heads / head_dim."""
        return f"{self.num_q_heads}/{self.num_kv_heads}/{self.head_dim}"

    @property
    def group_size(self) -> int:
        """Return how many q heads share one kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Return what a cached token takes: codes and scales of K and V, 260 a kv head at head_dim 128."""
        return 2 * self.num_kv_heads * (self.head_dim * CODE_BYTES + SCALE_BYTES)

    @property
    def bf16_token_bytes(self) -> int:
        """Return what it would take in BF16."""
        return 2 * self.num_kv_heads * self.head_dim * BF16_BYTES

    @property
    def append_token_bytes(self) -> int:
        """Return what appending a token moves: FP16 rows in, codes and scales out."""
        return 2 * self.num_kv_heads * self.head_dim * FP16_BYTES + self.token_bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of contexts, each with one query token."""

    name: str
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Return the cached tokens of all contexts."""
        return sum(self.lengths)

    @property
    def is_uniform(self) -> bool:
        """Return whether all contexts are of one length."""
        return len(set(self.lengths)) == 1

    @property
    def is_short(self) -> bool:
        """Return whether every context is one that the three-pass kernel takes."""
        return max(self.lengths) <= THREE_PASS_TOKENS


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the results."""

    heads: Heads
    workload: Workload
    block_size: int = 32

    @property
    def label(self) -> str:
        """Return a name that no other case has."""
        return f"{self.workload.name} {self.heads.label} block {self.block_size}"

    @property
    def cache_bytes(self) -> int:
        """Return what one launch has to read of the INT8 cache."""
        return self.workload.num_tokens * self.heads.token_bytes

    @property
    def bf16_bytes(self) -> int:
        """Return what a launch over BF16 has to read."""
        return self.workload.num_tokens * self.heads.bf16_token_bytes

    @property
    def num_blocks(self) -> int:
        """Return the blocks that the contexts take."""
        return sum(-(-length // self.block_size) for length in self.workload.lengths)


CACHE_MULTIPLE = 4

THREE_PASS_TOKENS = 4096
"""Longest context of the three-pass kernel: kMaxThreePassTokens."""

LLAMA = Heads(32, 8, 128)
HEADS = (LLAMA, Heads(64, 8, 128), Heads(32, 32, 128), Heads(14, 2, 64))
BLOCK_SIZES = (16, 32, 64, 128)

_RAGGED_SEED = 20
_NUM_RAGGED = 64


def uniform(num_sessions: int, length: int) -> Workload:
    """Return contexts of one length, named as in 8x32k or 8x256."""
    name = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    return Workload(f"{num_sessions}x{name}", (length,) * num_sessions)


def ragged(num_sessions: int, shortest: int, longest: int, seed: int) -> Workload:
    """Return contexts whose lengths are spread evenly over the orders of magnitude."""
    rng = random.Random(seed)
    low, high = math.log(shortest), math.log(longest)
    drawn = [round(math.exp(rng.uniform(low, high))) for _ in range(num_sessions - 2)]
    return Workload("ragged", (shortest, *drawn, longest))


WORKLOADS = (
    uniform(8, 32768),
    uniform(64, 8192),
    uniform(32, 4096),
    uniform(128, 4096),
    uniform(1, 1024),
    uniform(1, 32768),
    ragged(_NUM_RAGGED, 17, 32768, _RAGGED_SEED),
)


def decode_cases(*, quick: bool) -> list[Case]:
    """Return the cases in the order in which they are measured; those of one pool follow each other."""
    heads = HEADS[:1] if quick else HEADS
    cases = [Case(one, workload) for one in heads for workload in WORKLOADS]
    if quick:
        return cases
    return cases + [Case(LLAMA, WORKLOADS[0], size) for size in BLOCK_SIZES if size != 32]


def num_copies(
    launch_bytes: int, l2_bytes: int, most_bytes: int, multiple: int = CACHE_MULTIPLE
) -> int:
    """Return how many caches launches rotate among.

    Args:
        launch_bytes: What one launch reads.
        l2_bytes: The cache that must not help: the set is several times as large.
        most_bytes: Memory that there is for the set.
        multiple: How many times as large as the cache the set is to be.
    """
    wanted = -(-multiple * l2_bytes // launch_bytes)
    return max(1, min(max(wanted, 2), _MOST_COPIES, most_bytes // launch_bytes))


_MOST_COPIES = 1024
