"""The cpu backend: C++ kernels over INT8 blocks in host memory, chosen for this machine at run time.

Pools are head-major: codes `[block][kv_head][K, V]`, scales `[block][kv_head][slot]`. Four codes lie side by side as
byte dot products take them: K is `[head_dim / 4][slot][4]`, V, in columns of 16 dims of which the last may have 8,
`[head_dim / 16][slot / 4][16][4]`. The kernels and what they promise are in csrc/cpu.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from octavo_server.backends.base import (
    DecodeOutput,
    HostArray,
    PagedInt8Cache,
    PagedInt8Layer,
    RaggedBatch,
    StepOutput,
    StoredTokens,
    UnsupportedError,
    check_layer_fits,
    check_shape,
    composed_step,
    field_shape,
)
from octavo_server.backends.host_memory import free_host_bytes
from octavo_server.kernel_build import build_cpu_kernels
from octavo_server.model import ModelSpec

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NO_LSE = torch.empty(0)

_QUAD = 4
"""Codes that lie together in a pool: dims of a token in K, tokens of a dim in V."""

_VALUE_COLUMN = 16
"""Dims of V that lie together."""


class CpuBackend:
    """Paged INT8 layers in host memory, read in place by vector kernels. Implements `Backend`.

    Args:
        num_threads: Threads that share a launch, the caller's included; 0 = all available cores.
        isa: One of `available_isas()`; None = the fastest.
        pin_threads: Bind thread i to the i-th core that this process may use. The first is the
            caller's, whoever that is: it is bound by its first launch that is shared out.

    Raises:
        UnsupportedError: The kernels cannot be built, the machine lacks the instruction set, or
            there are fewer cores than threads to pin.
    """

    name = "cpu"

    def __init__(
        self, num_threads: int = 0, isa: str | None = None, *, pin_threads: bool = False
    ) -> None:
        isas = available_isas()
        if isa is not None and isa not in isas:
            raise UnsupportedError(f"isa must be one of {', '.join(isas)} on this cpu, got {isa!r}")
        self._ops = _load_ops()
        try:
            self._runtime: int = self._ops.make_runtime(num_threads, isa or "", pin_threads)
        except (ValueError, RuntimeError) as error:  # no such threads, or no more of them
            raise UnsupportedError(f"{num_threads} threads: {error}") from error
        weakref.finalize(self, self._ops.free_runtime, self._runtime).atexit = False
        self.binds_caller = pin_threads
        self.num_threads: int = self._ops.runtime_threads(self._runtime)
        self.isa: str = self._ops.runtime_isa(self._runtime)
        pinned = " on a core each" if pin_threads else ""
        self.description = f"cpu: {self.isa}, {self.num_threads} threads{pinned}"
        self._last_batch: tuple[RaggedBatch, list[torch.Tensor]] | None = None

    def check_model(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError for a head_dim or block_size that the kernels do not take."""
        check_shape(spec)

    def free_bytes(self) -> int:
        """Return the bytes of host memory that are free for pools."""
        return free_host_bytes()

    def alloc_paged_int8_layer(self, spec: ModelSpec, num_blocks: int) -> PagedInt8Layer:
        """Allocate one layer, zeroed: its memory is then really there, before any step needs it."""
        check_layer_fits(spec, num_blocks, self.free_bytes())
        heads = (num_blocks, spec.num_kv_heads)
        k_shape = (*heads, spec.head_dim // _QUAD, spec.block_size, _QUAD)
        try:
            codes = self._alloc_pool((*heads, 2, spec.head_dim * spec.block_size), torch.int8)
            return PagedInt8Layer(
                k_codes=codes[:, :, 0].view(k_shape),
                v_codes=codes[:, :, 1],
                k_scales=self._alloc_pool((*heads, spec.block_size), torch.float16),
                v_scales=self._alloc_pool((*heads, spec.block_size), torch.float16),
            )
        except RuntimeError as error:  # an address space that is limited
            raise UnsupportedError(
                f"cannot allocate {num_blocks} blocks of {spec.name}: {error}"
            ) from error

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind allocated layers: pointers and per-layer options go to C++ once."""
        pools = [
            pool for layer in layers for pool in (_codes_of(layer), layer.k_scales, layer.v_scales)
        ]
        sinks = spec.sinks if spec.sinks is not None else np.empty((0, spec.num_q_heads))
        handle = self._ops.make_cache(
            pools,
            spec.num_q_heads,
            spec.head_dim,
            torch.tensor(spec.sm_scale, dtype=torch.float32),
            torch.tensor(spec.soft_cap, dtype=torch.float32),
            torch.tensor(spec.window, dtype=torch.int32),
            torch.tensor(sinks, dtype=torch.float32),
            spec.deterministic,
        )
        return PagedInt8Cache(spec, num_blocks, layers, _BoundCache(handle, self._ops.free_cache))

    def int8_kv_append_paged(
        self, cache: PagedInt8Cache, batch: RaggedBatch, k: HostArray, v: HostArray
    ) -> NDArray[np.int64]:
        """Quantise k and v per (token, kv head) and store them at `batch.slot_mapping`."""
        offences = np.empty(batch.num_entries, np.int64)
        self._ops.append(
            self._runtime,
            cache.prepared.handle,
            self._batch_tensors(batch),
            _as_tensor(k),
            _as_tensor(v),
            torch.from_numpy(offences),
        )
        return offences

    def int8_paged_decode_attention(
        self, cache: PagedInt8Cache, batch: RaggedBatch, q: HostArray, *, return_lse: bool
    ) -> DecodeOutput:
        """Attend over the cached tokens; a skipped entry's out is zeros, its lse -inf."""
        out = np.empty(q.shape, q.dtype)
        lse = np.empty(q.shape[:2], np.float32) if return_lse else None
        offences = np.empty(batch.num_entries, np.int64)
        self._ops.decode(
            self._runtime,
            cache.prepared.handle,
            self._batch_tensors(batch),
            _as_tensor(q),
            _as_tensor(out),
            _NO_LSE if lse is None else torch.from_numpy(lse),
            torch.from_numpy(offences),
        )
        return DecodeOutput(out, lse, offences)

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
        pairs = torch.tensor(copies, dtype=torch.int64).view(-1, 2)
        self._ops.copy_blocks(self._runtime, cache.prepared.handle, pairs)

    def read_tokens(
        self, cache: PagedInt8Cache, layer: int, slots: NDArray[np.int64]
    ) -> StoredTokens:
        """Return copies of the codes and scales stored at `slots` of a layer."""
        pools = cache.layers[layer]
        blocks, offsets = (
            torch.from_numpy(idx) for idx in np.divmod(slots, np.int64(cache.spec.block_size))
        )
        return StoredTokens(
            pools.k_codes[blocks, :, :, offsets].flatten(-2).numpy(),
            pools.k_scales[blocks, :, offsets].numpy(),
            pools.v_codes[blocks[:, None], :, _v_places(cache.spec, offsets)].mT.numpy(),
            pools.v_scales[blocks, :, offsets].numpy(),
        )

    def read_blocks(
        self, cache: PagedInt8Cache, layer: int, field: str, block_ids: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return a copy of one field of whole blocks of a layer, in token order."""
        pool: torch.Tensor = getattr(cache.layers[layer], field)
        blocks = pool.index_select(0, torch.from_numpy(block_ids)).numpy()
        num_tokens = len(block_ids) * cache.spec.block_size
        tokens = np.empty(field_shape(cache.spec, field, num_tokens), blocks.dtype)
        for in_pool, in_order in _paired_parts(cache.spec, field, blocks, tokens):
            np.copyto(in_order, in_pool)
        return tokens

    def write_blocks(
        self,
        cache: PagedInt8Cache,
        layer: int,
        field: str,
        block_ids: NDArray[np.int64],
        values: NDArray[Any],
    ) -> None:
        """Store one field of whole blocks of a layer: the inverse of `read_blocks`."""
        pool: NDArray[Any] = getattr(cache.layers[layer], field).numpy()
        blocks = np.empty((len(block_ids), *pool.shape[1:]), pool.dtype)
        for in_pool, in_order in _paired_parts(cache.spec, field, blocks, values):
            np.copyto(in_pool, in_order)
        pool[block_ids] = blocks

    def _alloc_pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return zeros in huge pages, where the system has them."""
        pool: torch.Tensor = self._ops.alloc_pool(self._runtime, math.prod(shape) * dtype.itemsize)
        return pool.view(dtype).view(shape)

    def _batch_tensors(self, batch: RaggedBatch) -> list[torch.Tensor]:
        """Return the batch's arrays in the operations' order; a step asks twice for the same."""
        if self._last_batch is None or self._last_batch[0] is not batch:
            arrays: tuple[NDArray[Any], ...] = (
                batch.layers,
                batch.start_pos,
                batch.token_starts,
                batch.kv_lens,
                batch.is_causal,
                batch.block_tables,
                batch.slot_mapping,
            )
            self._last_batch = batch, [_as_tensor(array) for array in arrays]
        return self._last_batch[1]


class _BoundCache:
    """A cache's pointers and options on the C++ side; they go when this does."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: int, free_cache: Callable[[int], None]) -> None:
        self.handle = handle
        weakref.finalize(self, free_cache, handle).atexit = False


def _codes_of(layer: PagedInt8Layer) -> torch.Tensor:
    """Return [num_blocks, num_kv_heads, 2, bytes] int8: the memory that both codes are views of."""
    shape, stride = layer.v_codes.shape, layer.v_codes.stride()
    both = (shape[0], shape[1], 2, shape[2])
    codes: torch.Tensor = layer.k_codes.as_strided(both, (*stride[:2], shape[2], 1))
    return codes


def _v_places(spec: ModelSpec, offsets: torch.Tensor) -> torch.Tensor:
    """Return [num_tokens, head_dim] where the codes of V at some offsets of a block lie in it."""
    dims = torch.arange(spec.head_dim)
    columns = dims // _VALUE_COLUMN * _VALUE_COLUMN
    widths = (spec.head_dim - columns).clamp(max=_VALUE_COLUMN)
    quads, rests = offsets[:, None] // _QUAD, offsets[:, None] % _QUAD
    return columns * spec.block_size + (quads * widths + dims - columns) * _QUAD + rests


_Pairs = Iterator[tuple[NDArray[Any], NDArray[Any]]]


def _paired_parts(
    spec: ModelSpec, field: str, blocks: NDArray[Any], tokens: NDArray[Any]
) -> _Pairs:
    """Yield views of a field as it lies in blocks and as it does in token order, each pair of one shape.

    Args:
        spec: The model.
        field: A field of `StoredTokens`.
        blocks: [num_blocks, ...] as a pool has it.
        tokens: [num_blocks * block_size, num_kv_heads, ...] in token order.
    """
    by_block = tokens.reshape(len(blocks), spec.block_size, *tokens.shape[1:])
    by_head = by_block.swapaxes(1, 2)
    if field == "k_codes":
        # A quad is moved as one number.
        yield blocks.view(np.int32)[..., 0], by_head.view(np.int32).swapaxes(-1, -2)
    elif field == "v_codes":
        yield from _paired_columns(spec, blocks, by_head)
    else:
        yield blocks, by_head


def _paired_columns(spec: ModelSpec, blocks: NDArray[Any], by_head: NDArray[Any]) -> _Pairs:
    """Yield `_paired_parts` of the codes of V: columns of one width together, each place in a quad by itself."""
    num_wide = spec.head_dim // _VALUE_COLUMN
    split = num_wide * _VALUE_COLUMN
    heads, num_quads = blocks.shape[:2], spec.block_size // _QUAD
    for first, num_columns, width in (
        (0, num_wide, _VALUE_COLUMN),
        (split, 1, spec.head_dim - split),
    ):
        dims = slice(first, first + num_columns * width)
        places = slice(dims.start * spec.block_size, dims.stop * spec.block_size)
        in_pool = blocks[..., places].reshape(*heads, num_columns, num_quads, width, _QUAD)
        in_order = by_head[..., dims].reshape(*heads, num_quads, _QUAD, num_columns, width)
        for place in range(_QUAD):
            yield in_pool[..., place], in_order[:, :, :, place].swapaxes(2, 3)


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this machine has kernels for, the fastest first.

    Raises:
        UnsupportedError: The kernels cannot be built.
    """
    return tuple(_load_ops().available_isas())


@functools.cache
def _load_ops() -> Any:
    """Return torch.ops.octavo_cpu, building its library if need be; a process loads one, once."""
    build_cpu_kernels()
    return torch.ops.octavo_cpu


def _as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return a tensor over the same memory, or over a copy of what is not contiguous.

    Messages arrive as read-only buffers, which torch would warn about: the kernels only read what
    they take as input, so such an array is passed as if it were writable.
    """
    is_bfloat16 = array.dtype == _BFLOAT16  # which numpy knows as a void of 2 bytes
    plain = array.view(np.uint16) if is_bfloat16 else array
    # numpy calls an axis of one element contiguous whatever its stride; torch refuses negative ones.
    if not plain.flags.c_contiguous or min(plain.strides) < 0:
        plain = plain.copy()
    if not plain.flags.writeable:
        plain = np.asarray(_WritableView(plain))
    tensor = torch.from_numpy(plain)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


class _WritableView:
    """The memory of a read-only array, in numpy's array interface, without the flag."""

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, array: NDArray[Any]) -> None:
        self._owner = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
