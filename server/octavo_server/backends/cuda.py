"""The cuda backend: kernels over INT8 blocks in a GPU's memory.

Pools are head-major: K and V codes `[block][kv_head][slot][head_dim]`, scales `[block][kv_head][slot]`. They are torch
tensors; the kernels, the stream and the staging of a step are in csrc/cuda, behind a C ABI.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
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
    UnsupportedError,
    check_layer_fits,
    check_shape,
)
from octavo_server.backends.cuda_library import (
    DATA_TYPES,
    CacheSpecStruct,
    CudaLibrary,
    LayerStruct,
    PropertiesStruct,
    StepStruct,
    batch_struct,
    pointer_to,
)
from octavo_server.cuda_build import find_cuda_kernels
from octavo_server.model import ModelSpec

_MAX_KV_HEADS = 65535
"""What the second axis of a launch holds."""

_STEP_BYTES = 2**30
"""Left free for steps, and for what torch's allocator rounds up: 4,096 float32 tokens of 128 heads stage 0.6 GB, and
the partial results of a deterministic model are up to 0.5 GB."""

_FLOAT_P, _INT32_P, _INT64_P = (
    ctypes.POINTER(kind) for kind in (ctypes.c_float, ctypes.c_int32, ctypes.c_int64)
)


def create_cuda_backend() -> CudaBackend:
    """Create the backend on the first GPU, building its kernels if need be.

    Raises:
        UnsupportedError: There is no GPU, torch or the kernels have no use of it, or it is too old.
    """
    if torch.version.cuda is None:
        raise UnsupportedError(
            f"the cuda backend allocates by torch, and torch {torch.__version__} is a CPU build: install a "
            "CUDA build of torch (https://pytorch.org/get-started/locally)"
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "torch sees no GPU: check that nvidia-smi lists one, and that the driver is new enough for CUDA "
            f"{torch.version.cuda}"
        )
    major, minor = torch.cuda.get_device_capability(0)
    library = CudaLibrary(find_cuda_kernels(10 * major + minor))
    return CudaBackend(library, torch.device("cuda", 0))


class CudaBackend:
    """Paged INT8 layers in a GPU's memory. Implements `Backend`.

    Args:
        library: The kernels.
        torch_device: Where the pools are allocated: the GPU, as torch names it.
        device_idx: The GPU, as CUDA numbers it.

    Raises:
        UnsupportedError: The GPU or its driver cannot run the kernels.
    """

    name = "cuda"
    binds_caller = True  # the current device is the thread's

    def __init__(
        self, library: CudaLibrary, torch_device: torch.device, device_idx: int = 0
    ) -> None:
        self._library = library
        self._torch_device = torch_device
        device = ctypes.c_void_p()
        library.call("open", device_idx, ctypes.byref(device))
        assert device.value is not None
        self._device: int = device.value
        weakref.finalize(self, library.close, self._device).atexit = False
        self.description = self._describe()

    def check_model(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError for a shape that the kernels do not take."""
        check_shape(spec)
        if spec.num_kv_heads > _MAX_KV_HEADS:
            raise UnsupportedError(
                f"num_kv_heads of {spec.name} must be at most {_MAX_KV_HEADS} on a GPU, got {spec.num_kv_heads}"
            )

    def free_bytes(self) -> int:
        """Return the bytes of device memory that are free for pools: all but what steps may need beside them."""
        return max(self._unused_bytes() - _STEP_BYTES, 0)

    def alloc_paged_int8_layer(self, spec: ModelSpec, num_blocks: int) -> PagedInt8Layer:
        """Allocate one layer of codes `[num_blocks, num_kv_heads, block_size, head_dim]`."""
        check_layer_fits(spec, num_blocks, self._unused_bytes())
        rows = (num_blocks, spec.num_kv_heads, spec.block_size)
        codes, scales = (*rows, spec.head_dim), rows
        try:
            return PagedInt8Layer(
                k_codes=torch.zeros(codes, dtype=torch.int8, device=self._torch_device),
                v_codes=torch.zeros(codes, dtype=torch.int8, device=self._torch_device),
                k_scales=torch.zeros(scales, dtype=torch.float16, device=self._torch_device),
                v_scales=torch.zeros(scales, dtype=torch.float16, device=self._torch_device),
            )
        except RuntimeError as error:  # torch's allocator, whose own remains are not all free to us
            raise UnsupportedError(
                f"torch cannot allocate {num_blocks} blocks of {spec.name} on {self._torch_device}: {error}"
            ) from error

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind allocated layers: pointers and per-layer options go to the device once."""
        self._wait_for_torch()
        pools = (LayerStruct * len(layers))(*map(_layer_struct, layers))
        sm_scale, soft_cap = (
            np.array(option, np.float32) for option in (spec.sm_scale, spec.soft_cap)
        )
        window = np.array(spec.window, np.int32)
        sinks = None if spec.sinks is None else np.ascontiguousarray(spec.sinks, np.float32)
        struct = CacheSpecStruct(
            spec.num_layers,
            num_blocks,
            spec.num_q_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            spec.deterministic,
            pools,
            pointer_to(sm_scale, _FLOAT_P),
            pointer_to(soft_cap, _FLOAT_P),
            pointer_to(window, _INT32_P),
            None if sinks is None else pointer_to(sinks, _FLOAT_P),
        )
        handle = ctypes.c_void_p()
        self._library.call("make_cache", self._device, ctypes.byref(struct), ctypes.byref(handle))
        assert handle.value is not None
        bound = _BoundCache(handle.value, self._library.free_cache)
        return PagedInt8Cache(spec, num_blocks, layers, bound)

    def int8_kv_append_paged(
        self, cache: PagedInt8Cache, batch: RaggedBatch, k: HostArray, v: HostArray
    ) -> NDArray[np.int64]:
        """Quantise k and v per (token, kv head) and store them at `batch.slot_mapping`."""
        return self.step(cache, batch, None, (k, v), return_lse=False).offences

    def int8_paged_decode_attention(
        self, cache: PagedInt8Cache, batch: RaggedBatch, q: HostArray, *, return_lse: bool
    ) -> DecodeOutput:
        """Attend over the cached tokens; a skipped entry's out is zeros, its lse -inf."""
        output = self.step(cache, batch, q, None, return_lse=return_lse)
        assert output.out is not None
        return DecodeOutput(output.out, output.lse, output.offences)

    def step(
        self,
        cache: PagedInt8Cache,
        batch: RaggedBatch,
        q: HostArray | None,
        kv: tuple[HostArray, HostArray] | None,
        *,
        return_lse: bool,
    ) -> StepOutput:
        """Append and attend in one go: one copy to the device, the kernels, one copy back, one wait."""
        inputs = {name: np.ascontiguousarray(x) for name, x in _named(q, kv)}
        if not inputs:
            return StepOutput(None, None, np.full(batch.num_entries, NO_OFFENCE, np.int64))
        dtype = next(iter(inputs.values())).dtype
        for name, array in inputs.items():
            _check_tensor(name, array, dtype, cache.spec, int(batch.token_starts[-1]))
        out = None if q is None else np.empty(q.shape, dtype)
        lse = np.empty(q.shape[:2], np.float32) if q is not None and return_lse else None
        offences = np.empty(batch.num_entries, np.int64)
        struct = StepStruct(
            batch_struct(batch),
            DATA_TYPES[dtype],
            **{name: array.ctypes.data for name, array in inputs.items()},
            out=None if out is None else out.ctypes.data,
            lse=None if lse is None else pointer_to(lse, _FLOAT_P),
            offences=pointer_to(offences, _INT64_P),
        )
        self._library.call("step", self._device, cache.prepared.handle, ctypes.byref(struct))
        return StepOutput(out, lse, offences)

    def copy_blocks(self, cache: PagedInt8Cache, copies: Sequence[tuple[int, int]]) -> None:
        """Copy block `source` to block `target` in every layer, for each (source, target)."""
        pairs = np.array(copies, np.int64).reshape(-1, 2)
        pointer = pointer_to(pairs, _INT64_P)
        self._library.call("copy_blocks", self._device, cache.prepared.handle, pointer, len(pairs))

    def read_tokens(
        self, cache: PagedInt8Cache, layer: int, slots: NDArray[np.int64]
    ) -> StoredTokens:
        """Return copies of the codes and scales stored at `slots` of a layer."""
        pools = cache.layers[layer]
        blocks, offsets = (
            torch.from_numpy(idx).to(self._torch_device)
            for idx in np.divmod(slots, np.int64(cache.spec.block_size))
        )
        return StoredTokens(
            pools.k_codes[blocks, :, offsets].cpu().numpy(),
            pools.k_scales[blocks, :, offsets].cpu().numpy(),
            pools.v_codes[blocks, :, offsets].cpu().numpy(),
            pools.v_scales[blocks, :, offsets].cpu().numpy(),
        )

    def read_blocks(
        self, cache: PagedInt8Cache, layer: int, field: str, block_ids: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return a copy of one field of whole blocks of a layer, in token order."""
        pool: torch.Tensor = getattr(cache.layers[layer], field)
        blocks = pool[torch.from_numpy(block_ids).to(self._torch_device)]
        values: NDArray[Any] = blocks.transpose(1, 2).flatten(0, 1).cpu().numpy()
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
        tokens = torch.tensor(values, device=self._torch_device)
        shape = (len(block_ids), cache.spec.block_size, *values.shape[1:])
        blocks = tokens.view(shape).transpose(1, 2)
        pool[torch.from_numpy(block_ids).to(self._torch_device)] = blocks
        self._wait_for_torch()

    def _unused_bytes(self) -> int:
        num_bytes = ctypes.c_int64()
        self._library.call("free_bytes", self._device, ctypes.byref(num_bytes))
        return num_bytes.value

    def _describe(self) -> str:
        found = PropertiesStruct()
        self._library.call("properties", self._device, ctypes.byref(found))
        compute = f"{found.compute_major}.{found.compute_minor}"
        return f"cuda: {found.name.decode()}, compute capability {compute}, {found.num_multiprocessors} multiprocessors"

    def _wait_for_torch(self) -> None:
        """Wait until torch has written the pools: it does so on a stream of its own."""
        if self._torch_device.type == "cuda":
            torch.cuda.synchronize(self._torch_device)


class _BoundCache:
    """A cache's tables on the device; they go when this does."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: int, free_cache: Callable[[int], None]) -> None:
        self.handle = handle
        weakref.finalize(self, free_cache, handle).atexit = False


def _named(
    q: HostArray | None, kv: tuple[HostArray, HostArray] | None
) -> list[tuple[str, HostArray]]:
    """Return the tensors that are there, by name."""
    queries = [] if q is None else [("q", q)]
    return queries if kv is None else [*queries, ("k", kv[0]), ("v", kv[1])]


def _check_tensor(
    name: str, array: HostArray, dtype: np.dtype[Any], spec: ModelSpec, num_tokens: int
) -> None:
    """Raise ValueError unless a tensor is what the library reads: it sees a pointer alone."""
    num_heads = spec.num_q_heads if name == "q" else spec.num_kv_heads
    shape = (num_tokens, num_heads, spec.head_dim)
    if array.shape != shape or array.dtype != dtype or dtype not in DATA_TYPES:
        expected = (
            f"{list(shape)} {dtype if dtype in DATA_TYPES else 'float16, bfloat16 or float32'}"
        )
        raise ValueError(f"{name} must be {expected}, got {list(array.shape)} {array.dtype}")


def _layer_struct(layer: PagedInt8Layer) -> LayerStruct:
    pools: tuple[Any, ...] = (layer.k_codes, layer.v_codes, layer.k_scales, layer.v_scales)
    return LayerStruct(*(pool.data_ptr() for pool in pools))
