"""The reference backend: torch on the CPU, slow and obvious, with attention in float64.

Pools are `[block][slot][kv_head][head_dim]`, the order in which tokens arrive, so that a slot is a
row. Everything is a loop over entries and whole-tensor operations; read the faster backends beside
this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo_server.backends.base import (
    NO_OFFENCE,
    DecodeOutput,
    HostArray,
    PagedInt8Cache,
    PagedInt8Layer,
    RaggedBatch,
    StepOutput,
    StoredTokens,
    check_layer_fits,
    check_shape,
    composed_step,
)
from octavo_server.backends.host_memory import free_host_bytes
from octavo_server.model import ModelSpec

_IS_OVERFLOW = 1
_LARGEST_HALF = torch.finfo(torch.float16).max
_LARGEST_SCORE = torch.finfo(torch.float32).max  # so that lse stays finite as well


class ReferenceBackend:
    """Paged INT8 layers in host memory, as plainly as torch can say it. Implements `Backend`."""

    name = "reference"
    binds_caller = False
    description = "reference: torch on the CPU, attention in float64"

    def check_model(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError for a shape that no backend serves."""
        check_shape(spec)

    def free_bytes(self) -> int:
        """Return the bytes of host memory that are free for pools."""
        return free_host_bytes()

    def alloc_paged_int8_layer(self, spec: ModelSpec, num_blocks: int) -> PagedInt8Layer:
        """Allocate one layer of codes `[num_blocks, block_size, num_kv_heads, head_dim]`."""
        check_layer_fits(spec, num_blocks, self.free_bytes())
        rows = (num_blocks, spec.block_size, spec.num_kv_heads)
        k_codes, v_codes = (torch.zeros((*rows, spec.head_dim), dtype=torch.int8) for _ in range(2))
        k_scales, v_scales = (torch.zeros(rows, dtype=torch.float16) for _ in range(2))
        return PagedInt8Layer(k_codes, v_codes, k_scales, v_scales)

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind allocated layers; there is nothing to derive from them."""
        return PagedInt8Cache(spec, num_blocks, layers)

    def int8_kv_append_paged(
        self, cache: PagedInt8Cache, batch: RaggedBatch, k: HostArray, v: HostArray
    ) -> NDArray[np.int64]:
        """Quantise k and v per (token, kv head) and store them at `batch.slot_mapping`."""
        offences = np.full(batch.num_entries, NO_OFFENCE, dtype=np.int64)
        for entry_idx in range(batch.num_entries):
            rows = _entry_rows(batch, entry_idx)
            layer = cache.layers[batch.layers[entry_idx]]
            slots = torch.from_numpy(batch.slot_mapping[rows].copy())
            k_offence = _store(layer.k_codes, layer.k_scales, slots, k[rows])
            v_offence = _store(layer.v_codes, layer.v_scales, slots, v[rows])
            offences[entry_idx] = min(_pack(0, k_offence), _pack(1, v_offence))
        return offences

    def int8_paged_decode_attention(
        self, cache: PagedInt8Cache, batch: RaggedBatch, q: HostArray, *, return_lse: bool
    ) -> DecodeOutput:
        """Attend in float64 over dequantised tokens, one entry after the other."""
        out = np.zeros(q.shape, dtype=q.dtype)
        lse = np.full(q.shape[:2], -np.inf, dtype=np.float32)
        offences = np.full(batch.num_entries, NO_OFFENCE, dtype=np.int64)
        for entry_idx in np.flatnonzero(batch.kv_lens).tolist():
            rows = _entry_rows(batch, entry_idx)
            queries = _to_torch(q[rows])
            is_bad = ~torch.isfinite(queries).all(dim=-1)
            offences[entry_idx] = _pack(2, _first_offence(is_bad, torch.zeros_like(is_bad)))
            entry_out, entry_lse = _attend_entry(cache, batch, entry_idx, queries)
            with np.errstate(all="ignore"):  # an offending entry's rows may be anything
                out[rows] = _saturated(entry_out, q.dtype)
                lse[rows] = entry_lse.numpy()
        return DecodeOutput(out, lse if return_lse else None, offences)

    def step(
        self,
        cache: PagedInt8Cache,
        batch: RaggedBatch,
        q: HostArray | None,
        kv: tuple[HostArray, HostArray] | None,
        *,
        return_lse: bool,
    ) -> StepOutput:
        """Append and attend, one after the other."""
        return composed_step(self, cache, batch, q, kv, return_lse=return_lse)

    def copy_blocks(self, cache: PagedInt8Cache, copies: Sequence[tuple[int, int]]) -> None:
        """Copy block `source` to block `target` in every layer, for each (source, target)."""
        for layer in cache.layers:
            for pool in (layer.k_codes, layer.v_codes, layer.k_scales, layer.v_scales):
                for source, target in copies:
                    pool[target] = pool[source]

    def read_tokens(
        self, cache: PagedInt8Cache, layer: int, slots: NDArray[np.int64]
    ) -> StoredTokens:
        """Return copies of the codes and scales stored at `slots` of a layer."""
        pools = cache.layers[layer]
        rows = torch.from_numpy(slots.copy())
        return StoredTokens(
            _slots(pools.k_codes)[rows].numpy(),
            _slots(pools.k_scales)[rows].numpy(),
            _slots(pools.v_codes)[rows].numpy(),
            _slots(pools.v_scales)[rows].numpy(),
        )

    def read_blocks(
        self, cache: PagedInt8Cache, layer: int, field: str, block_ids: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return a copy of one field of whole blocks of a layer, in token order."""
        pool: torch.Tensor = getattr(cache.layers[layer], field)
        values: NDArray[Any] = _slots(pool[torch.from_numpy(block_ids)]).numpy()
        return values

    def write_blocks(
        self,
        cache: PagedInt8Cache,
        layer: int,
        field: str,
        block_ids: NDArray[np.int64],
        values: NDArray[Any],
    ) -> None:
        """Store one field of whole blocks of a layer: the inverse of `read_blocks`."""
        pool: torch.Tensor = getattr(cache.layers[layer], field)
        blocks = torch.tensor(values).view(len(block_ids), *pool.shape[1:])
        pool[torch.from_numpy(block_ids)] = blocks


def _entry_rows(batch: RaggedBatch, entry_idx: int) -> slice:
    return slice(batch.token_starts[entry_idx], batch.token_starts[entry_idx + 1])


def _to_torch(x: HostArray) -> torch.Tensor:
    """Return a float32 copy: exact, and free of numpy's bfloat16 and read-only arrays."""
    return torch.from_numpy(np.array(x, dtype=np.float32))


def _slots(pool: torch.Tensor) -> torch.Tensor:
    """Return `[num_blocks, block_size, ...]` as a view `[num_blocks * block_size, ...]`."""
    return pool.flatten(0, 1)


def _pack(field: int, offence: int) -> int:
    """Put the field's number on top of a packed offence without one."""
    return offence if offence == NO_OFFENCE else field << 60 | offence


def _first_offence(is_bad: torch.Tensor, is_overflow: torch.Tensor) -> int:
    """Return the first bad row packed as token, head, kind, or NO_OFFENCE.

    Args:
        is_bad: [num_tokens, num_heads] bool, rows that are refused.
        is_overflow: [num_tokens, num_heads] bool, those of them that are finite.
    """
    bad_rows = is_bad.nonzero()
    if len(bad_rows) == 0:
        return int(NO_OFFENCE)
    token_idx, head_idx = (int(idx) for idx in bad_rows[0])
    kind = _IS_OVERFLOW if is_overflow[token_idx, head_idx] else 0
    return token_idx << 24 | head_idx << 8 | kind


def _store(
    codes_pool: torch.Tensor, scales_pool: torch.Tensor, slots: torch.Tensor, x: HostArray
) -> int:
    """Quantise the rows whose slot is not -1 into their slots and return the first offence.

    Args:
        codes_pool: [num_blocks, block_size, num_kv_heads, head_dim] int8.
        scales_pool: [num_blocks, block_size, num_kv_heads] float16.
        slots: [num_tokens] int64.
        x: [num_tokens, num_kv_heads, head_dim].
    """
    is_stored = slots >= 0
    rows = _to_torch(x)
    rows[~is_stored] = 0  # neither read nor checked
    codes, scales = _quantize(rows)
    _slots(codes_pool)[slots[is_stored]] = codes[is_stored]
    _slots(scales_pool)[slots[is_stored]] = scales[is_stored]
    is_finite = torch.isfinite(rows).all(dim=-1)
    return _first_offence(~torch.isfinite(scales), is_finite)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return INT8 codes [..., head_dim] and FP16 scales [...] of float32 rows.

    The scale of a row that cannot be quantised is not finite.
    """
    amax = x.abs().amax(dim=-1)
    exact = amax / torch.full_like(amax, 127.0)
    scales = exact.half()
    # The bits of positive FP16 numbers are in the order of their values: + 1 is the next one up,
    # from 0 the smallest subnormal, from 65504 infinity.
    is_below = (scales.float() < exact) | ((scales == 0) & (amax > 0))
    scales = (scales.view(torch.int16) + is_below.short()).view(torch.float16)
    inverses = torch.ones_like(amax) / scales.float()
    is_codable = (torch.isfinite(scales) & (scales > 0)).unsqueeze(-1)
    codes = torch.where(is_codable, (x * inverses.unsqueeze(-1)).round(), 0.0)
    return codes.to(torch.int8), scales


def _attend_entry(
    cache: PagedInt8Cache, batch: RaggedBatch, entry_idx: int, queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [num_tokens, num_q_heads, head_dim] and lse without the last axis, in float64."""
    spec, layer_idx = cache.spec, int(batch.layers[entry_idx])
    keys, values = _gather(cache, batch, entry_idx)
    q = queries.double().view(len(queries), spec.num_kv_heads, spec.group_size, spec.head_dim)
    scores = torch.einsum("nhgd,khd->nhgk", q, keys) * spec.sm_scale[layer_idx]
    scores = scores.clamp(-_LARGEST_SCORE, _LARGEST_SCORE)
    if spec.soft_cap[layer_idx]:
        scores = spec.soft_cap[layer_idx] * torch.tanh(scores / spec.soft_cap[layer_idx])
    mask = _attended(batch, entry_idx, len(queries), spec.window[layer_idx])
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    peak = scores.amax(dim=-1)
    weights = (scores - peak.unsqueeze(-1)).exp()
    total = weights.sum(dim=-1)
    lse = peak + total.log()
    if spec.sinks is not None:
        sinks = _to_torch(spec.sinks[layer_idx]).view(spec.num_kv_heads, spec.group_size)
        total = total + (sinks.double() - peak).exp()
    probs = weights / total.unsqueeze(-1)
    out = torch.einsum("nhgk,khd->nhgd", probs, values)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _saturated(out: torch.Tensor, dtype: np.dtype[Any]) -> HostArray:
    """Return float64 values in `dtype`, of which float16 alone may be too small for them."""
    bounded = out.clamp(-_LARGEST_HALF, _LARGEST_HALF) if dtype == np.float16 else out
    return bounded.numpy().astype(dtype)


def _gather(
    cache: PagedInt8Cache, batch: RaggedBatch, entry_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an entry's dequantised keys and values, [kv_len, num_kv_heads, head_dim] float64."""
    layer = cache.layers[batch.layers[entry_idx]]
    block_size = cache.spec.block_size
    positions = np.arange(batch.kv_lens[entry_idx])
    blocks = batch.block_tables[entry_idx, positions // block_size].astype(np.int64)
    rows = torch.from_numpy(blocks * block_size + positions % block_size)
    k_scales, v_scales = (
        _slots(pool)[rows].double().unsqueeze(-1) for pool in (layer.k_scales, layer.v_scales)
    )
    keys = _slots(layer.k_codes)[rows].double() * k_scales
    values = _slots(layer.v_codes)[rows].double() * v_scales
    return keys, values


def _attended(batch: RaggedBatch, entry_idx: int, num_tokens: int, window: int) -> torch.Tensor:
    """Return which positions each query attends to, [num_tokens, kv_len] bool."""
    positions = torch.arange(int(batch.kv_lens[entry_idx]))
    if not batch.is_causal[entry_idx]:
        return torch.ones(num_tokens, len(positions), dtype=torch.bool)
    last = int(batch.start_pos[entry_idx]) + torch.arange(num_tokens).unsqueeze(-1)
    mask = positions <= last
    return mask & (positions > last - window) if window else mask
