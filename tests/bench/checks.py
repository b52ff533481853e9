"""Answers against float64 attention over the dequantised cache, on the device; the bound is design.md's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.bench_library import HalfArray
from tests.bench.oracle_only import import_oracle
from tests.bench.pool import HostStep, Pool

FP16_TOLERANCE = 1e-3
_SMALLEST_HALF = 2.0**-24
_CANCELLATION = 0.02
_NUM_CHECKED_ENTRIES = 3


def checked_entries(lengths: NDArray[np.int32]) -> list[int]:
    """Return the entries that are checked: the first, the last and the longest one."""
    return sorted({0, len(lengths) - 1, int(lengths.argmax())})[:_NUM_CHECKED_ENTRIES]


def error_ratio(pool: Pool, step: HostStep, out: HalfArray, entries: Sequence[int]) -> float:
    """Return the largest error over its bound among all q heads of some entries; inf for NaN.

    Args:
        pool: The cache.
        step: What was answered, one query token an entry.
        out: [num_entries, num_q_heads, head_dim], the answer.
        entries: Those that are checked.
    """
    worst = 0.0
    for entry in entries:
        exact, abs_exact = exact_attention(pool, step, entry)
        answer = torch.from_numpy(out[entry]).to(pool.device.torch_device).double()
        error = torch.linalg.vector_norm(answer - exact, dim=-1)
        ratio = (error / _bound(exact, abs_exact)).nan_to_num(math.inf, math.inf)
        worst = max(worst, ratio.max().item())
    return worst


def relative_error(exact: torch.Tensor, answer: torch.Tensor) -> float:
    """Return the error of a whole entry, relative to its answer; inf for NaN."""
    error = torch.linalg.vector_norm(answer.double() - exact) / torch.linalg.vector_norm(exact)
    return float(error.nan_to_num(math.inf, math.inf).item())


def exact_attention(pool: Pool, step: HostStep, entry: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, and attention over |v|, of an entry: each [num_q_heads, head_dim] float64."""
    heads, where = pool.heads, pool.device.torch_device
    assert step.q is not None, "an append has no answer"
    block_table, length = context_of(pool, step, entry)
    k, v = (pool.dequantized(name, block_table, length, torch.float64) for name in "kv")
    q = torch.from_numpy(step.q[entry]).to(where).double()
    grouped = q.view(heads.num_kv_heads, heads.group_size, heads.head_dim)
    scores = grouped @ k.transpose(1, 2) / math.sqrt(heads.head_dim)
    probs = scores.softmax(-1)
    return (probs @ v).view(q.shape), (probs @ v.abs()).view(q.shape)


def context_of(pool: Pool, step: HostStep, entry: int) -> tuple[torch.Tensor, int]:
    """Return an entry's block table on the device, without padding, and its length."""
    length = int(step.kv_lens[entry])
    used = step.block_tables[entry, : -(-length // pool.block_size)]
    return torch.from_numpy(used).to(pool.device.torch_device).long(), length


def check_appended(pool: Pool, step: HostStep, rows: Sequence[int]) -> str | None:
    """Hold some of an append's rows against the oracle's quantiser, bit by bit.

    Returns:
        Why that cannot be done here, None when it was done.

    Raises:
        AssertionError: A stored bit is not as it has to be.
    """
    try:
        oracle = import_oracle()
    except ImportError as error:
        return str(error)
    assert step.k is not None
    assert step.v is not None
    for name, x in (("k", step.k), ("v", step.v)):
        codes, scales = oracle.quantize(x[list(rows)])
        for idx, row in enumerate(rows):
            block_id, offset = _place_of(pool, step, row)
            stored_codes = getattr(pool, f"{name}_codes")[block_id, :, offset].cpu().numpy()
            stored_scales = getattr(pool, f"{name}_scales")[block_id, :, offset].cpu().numpy()
            assert (stored_codes == codes[idx]).all(), f"codes of {name} differ in row {row}"
            assert (stored_scales == scales[idx]).all(), f"scales of {name} differ in row {row}"
    return None


def _place_of(pool: Pool, step: HostStep, row: int) -> tuple[int, int]:
    """Return block id and offset of a row of k."""
    entry, token = divmod(row, step.num_tokens)
    position = int(step.kv_lens[entry]) - step.num_tokens + token
    block_idx, offset = divmod(position, pool.block_size)
    return int(step.block_tables[entry, block_idx]), offset


def _bound(exact: torch.Tensor, abs_exact: torch.Tensor) -> torch.Tensor:
    size = torch.maximum(
        torch.linalg.vector_norm(exact, dim=-1),
        _CANCELLATION * torch.linalg.vector_norm(abs_exact, dim=-1),
    )
    return FP16_TOLERANCE * size + math.sqrt(exact.shape[-1]) * _SMALLEST_HALF / 2
