"""A pool of random INT8 blocks, and steps over contexts that lie shuffled in it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.bench_library import BenchLibrary, HalfArray, Resident, StepStruct
from tests.bench.device import Device
from tests.bench.shapes import Case, Heads

_CODES_STD = 40.0
_SCALE_RANGE = (0.02, 0.03)
"""With codes like those of normal rows, K and V come out close to a standard normal."""

_CHUNK_ELEMENTS = 1 << 27


class Pool:
    """One layer's pool, filled at random; the arrays are `PagedInt8Layer`'s.

    Args:
        device: Where it is.
        heads: Its heads.
        block_size: Tokens of a block.
        num_blocks: Blocks.
        seed: Of what fills it.
    """

    def __init__(
        self, device: Device, heads: Heads, block_size: int, num_blocks: int, seed: int = 0
    ) -> None:
        self.device, self.heads = device, heads
        self.block_size, self.num_blocks = block_size, num_blocks
        generator = torch.Generator(device.torch_device).manual_seed(seed)
        rows = (num_blocks, heads.num_kv_heads, block_size)
        self.k_codes, self.v_codes = (
            self._draw_codes((*rows, heads.head_dim), generator) for _ in "kv"
        )
        self.k_scales, self.v_scales = (self._draw_scales(rows, generator) for _ in "kv")
        for tensor in (self.k_codes, self.v_codes, self.k_scales, self.v_scales):
            device.adopt(tensor)

    def _draw_codes(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        where = self.device.torch_device
        codes = torch.empty(tuple(shape), dtype=torch.int8, device=where)
        flat = codes.view(-1)
        for first in range(0, len(flat), _CHUNK_ELEMENTS):
            chunk = flat[first : first + _CHUNK_ELEMENTS]
            drawn = torch.randn(chunk.shape, generator=generator, device=where)
            chunk.copy_(drawn.mul_(_CODES_STD).round_().clamp_(-127, 127))
        return codes

    def _draw_scales(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        low, high = _SCALE_RANGE
        where = self.device.torch_device
        drawn = torch.rand(tuple(shape), generator=generator, device=where)
        return drawn.mul_(high - low).add_(low).half()

    def dequantized(
        self, name: str, block_table: torch.Tensor, length: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a context's K ("k") or V ("v"), [num_kv_heads, length, head_dim]."""
        codes: torch.Tensor = getattr(self, f"{name}_codes")
        scales: torch.Tensor = getattr(self, f"{name}_scales")
        rows = codes[block_table].to(dtype) * scales[block_table].to(dtype)[..., None]
        by_head = rows.transpose(0, 1).reshape(self.heads.num_kv_heads, -1, self.heads.head_dim)
        return by_head[:, :length]


@dataclass(frozen=True, slots=True, eq=False)
class HostStep:
    """A step's host arrays; k and v are None for attention alone, q for an append alone.

    Attributes:
        kv_lens: [num_entries] int32, the step's tokens included.
        block_tables: [num_entries, max_num_blocks] int32.
        num_tokens: Tokens of each entry.
        q: [total_tokens, num_q_heads, head_dim].
        k: [total_tokens, num_kv_heads, head_dim].
        v: Like k.
    """

    kv_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    num_tokens: int
    q: HalfArray | None
    k: HalfArray | None = None
    v: HalfArray | None = None

    def struct(self, pool: Pool) -> StepStruct:
        """Return the step over a pool as the library takes it; alive as long as this is."""
        heads = pool.heads
        shape = (heads.num_q_heads, heads.num_kv_heads, heads.head_dim, pool.block_size)
        counts = (pool.num_blocks, len(self.kv_lens), self.num_tokens, self.block_tables.shape[1])
        pools = (pool.k_codes, pool.v_codes, pool.k_scales, pool.v_scales)
        arrays = (self.kv_lens, self.block_tables, self.q, self.k, self.v)
        return StepStruct(
            *shape,
            *counts,
            *(tensor.data_ptr() for tensor in pools),
            *(None if array is None else array.ctypes.data for array in arrays),
        )


def draw_steps(
    case: Case,
    pool: Pool,
    num_copies: int,
    *,
    num_tokens: int = 1,
    appends: bool = False,
    attends: bool = True,
) -> list[HostStep]:
    """Return steps whose tokens are the last ones of a case's contexts, over disjoint blocks of the pool.

    Args:
        case: The contexts.
        pool: Where they lie, shuffled.
        num_copies: Steps; the pool has to hold as many copies of the contexts.
        num_tokens: Tokens of each entry.
        appends: Whether k and v are drawn.
        attends: Whether q is drawn.
    """
    rng = np.random.default_rng(num_copies)
    heads, lengths = case.heads, np.array(case.workload.lengths, np.int32)
    num_rows = len(lengths) * num_tokens
    blocks = rng.permutation(pool.num_blocks)[: num_copies * case.num_blocks]
    steps = []
    for dealt in np.split(blocks, num_copies):
        q = draw_rows(rng, num_rows, heads.num_q_heads, heads) if attends else None
        k, v = (
            draw_rows(rng, num_rows, heads.num_kv_heads, heads) if appends else None for _ in "kv"
        )
        steps.append(HostStep(lengths, block_tables(case, dealt), num_tokens, q, k, v))
    return steps


def draw_rows(rng: np.random.Generator, num_rows: int, num_heads: int, heads: Heads) -> HalfArray:
    """Draw FP16 rows [num_rows, num_heads, head_dim] from a standard normal."""
    return rng.standard_normal((num_rows, num_heads, heads.head_dim), np.float32).astype(np.float16)


def block_tables(case: Case, blocks: NDArray[np.int64]) -> NDArray[np.int32]:
    """Deal blocks out to a case's contexts; [num_entries, max_num_blocks], padded with -1."""
    counts = [-(-length // case.block_size) for length in case.workload.lengths]
    tables = np.full((len(counts), max(counts)), -1, np.int32)
    for table, dealt in zip(tables, np.split(blocks, np.cumsum(counts)), strict=False):
        table[: len(dealt)] = dealt
    return tables


class Rotation:
    """Resident steps that launches take in turn, each over blocks that no other has.

    Made by `rotating`, which frees them.
    """

    def __init__(
        self,
        library: BenchLibrary,
        pool: Pool,
        host_steps: Sequence[HostStep],
        residents: Sequence[Resident],
    ) -> None:
        self.pool, self.host_steps, self.residents = pool, host_steps, residents
        self._library = library
        self._handles: Any = (ctypes.c_void_p * len(residents))(*(r.handle for r in residents))

    def launch(self, first: int, count: int, kernel: int) -> None:
        """Queue `count` steps from the one numbered `first` on, and around."""
        stream = self.pool.device.stream()
        self._library.launch(self._handles, first, count, kernel, stream)

    def answer(self, step_idx: int, kernel: int) -> HalfArray:
        """Run one step and return its answer, NaN where nothing was written."""
        q = self.host_steps[step_idx].q
        assert q is not None, "an append has no answer"
        out = np.zeros_like(q)
        self._take_out(step_idx, out)
        self.launch(step_idx, 1, kernel)
        self._take_out(step_idx, out)
        return out

    def _take_out(self, step_idx: int, out: HalfArray) -> None:
        self._library.take_out(self.residents[step_idx], out, self.pool.device.stream())


@contextmanager
def rotating(
    library: BenchLibrary, pool: Pool, host_steps: Sequence[HostStep]
) -> Iterator[Rotation]:
    """Put steps on the device for the time of a with block."""
    pool.device.synchronize()
    residents: list[Resident] = []
    try:
        residents.extend(library.make_resident(step.struct(pool)) for step in host_steps)
        yield Rotation(library, pool, host_steps, residents)
    finally:
        pool.device.synchronize()
        for resident in residents:
            library.free_resident(resident)
