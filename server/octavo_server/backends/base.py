"""The backend interface: three operations over paged INT8 layers, batched and ragged.

A step is `int8_kv_append_paged` followed by `int8_paged_decode_attention` on the same `RaggedBatch`, which a backend
may run as one. Arrays that cross this interface are host arrays (numpy; bfloat16 as `ml_dtypes.bfloat16`); where the
pool lives, and in which layout, is the backend's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo_server.model import BLOCK_SIZES, MAX_HEAD_DIM, ModelSpec

HostArray = NDArray[Any]
"""A C-contiguous host array of float16, bfloat16 or float32."""

NO_OFFENCE = np.iinfo(np.int64).max
"""The offence of an entry whose rows are all finite and quantisable."""


class UnsupportedError(Exception):
    """A device, dtype or model that a backend does not support; the text says what it does support."""


class Offence(NamedTuple):
    """An entry's first value that cannot be stored or attended with, in the order field, token, head.

    Packed into an int64 as `field << 60 | token << 24 | head << 8 | kind`, so that the smallest is the first.
    """

    field: str
    token_idx: int
    head_idx: int
    is_overflow: bool

    @classmethod
    def unpack(cls, code: int) -> Offence | None:
        """Return the offence that `code` stands for, None for NO_OFFENCE."""
        if code == NO_OFFENCE:
            return None
        return cls(
            "kvq"[code >> 60], code >> 24 & (1 << 32) - 1, code >> 8 & 0xFFFF, bool(code & 0xFF)
        )


class RaggedBatch(NamedTuple):
    """One launch: entries of one model, each with its own session, layer and length.

    Entry e owns the rows token_starts[e] .. token_starts[e + 1] of q, k and v.

    Attributes:
        layers: [num_entries] int32 layer of each entry.
        start_pos: [num_entries] int32 position of the entry's first token: the length before an append.
        token_starts: [num_entries + 1] int32 first row of each entry; the last is total_tokens.
        kv_lens: [num_entries] int32 valid tokens of the entry's layer once this batch is appended; 0 skips the entry
            in attention: its rows of out are 0, of lse -inf, and its q is not checked.
        is_causal: [num_entries] bool; row i attends to [0, start_pos + i] where true, else to [0, kv_len).
        block_tables: [num_entries, max_num_blocks] int32 block ids, padded with -1.
        slot_mapping: [total_tokens] int64 `block_id * block_size + offset` of each row; -1 = do not store.
    """

    layers: NDArray[np.int32]
    start_pos: NDArray[np.int32]
    token_starts: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    is_causal: NDArray[np.bool_]
    block_tables: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]

    @property
    def num_entries(self) -> int:
        """Entries of the batch."""
        return len(self.layers)


@dataclass(frozen=True, slots=True, eq=False)
class PagedInt8Layer:
    """One layer's pool: codes and scales of K and V, as torch tensors in the backend's own layout and device."""

    k_codes: Any
    v_codes: Any
    k_scales: Any
    v_scales: Any


@dataclass(frozen=True, slots=True, eq=False)
class PagedInt8Cache:
    """The paged INT8 layers of one model, as its backend allocated them.

    Attributes:
        spec: The model.
        num_blocks: Blocks of every layer.
        layers: One pool a layer.
        prepared: What the backend derived once from spec and layers (pointer tables, option arrays).
    """

    spec: ModelSpec
    num_blocks: int
    layers: Sequence[PagedInt8Layer]
    prepared: Any = None


class DecodeOutput(NamedTuple):
    """What attention returns.

    Attributes:
        out: [total_tokens, num_q_heads, head_dim] in q's dtype; float16 saturates at 65504, which V stored in a
            wider dtype may exceed.
        lse: [total_tokens, num_q_heads] float32, or None when not asked for.
        offences: [num_entries] int64 packed `Offence` of q, or NO_OFFENCE.
    """

    out: HostArray
    lse: NDArray[np.float32] | None
    offences: NDArray[np.int64]


class StepOutput(NamedTuple):
    """What a step returns: `DecodeOutput` where it attended, without `out` and `lse` where it did not.

    Attributes:
        out: [total_tokens, num_q_heads, head_dim] in q's dtype, or None.
        lse: [total_tokens, num_q_heads] float32, or None.
        offences: [num_entries] int64 packed first `Offence` of k, v and q, or NO_OFFENCE.
    """

    out: HostArray | None
    lse: NDArray[np.float32] | None
    offences: NDArray[np.int64]


class StoredTokens(NamedTuple):
    """Cached tokens as they are stored, in one layout whatever the backend's.

    Attributes:
        k_codes: [num_tokens, num_kv_heads, head_dim] int8.
        k_scales: [num_tokens, num_kv_heads] float16.
        v_codes: Like k_codes.
        v_scales: Like k_scales.
    """

    k_codes: NDArray[np.int8]
    k_scales: NDArray[np.float16]
    v_codes: NDArray[np.int8]
    v_scales: NDArray[np.float16]


def field_shape(spec: ModelSpec, field: str, num_tokens: int) -> tuple[int, ...]:
    """Return the shape of a field of `StoredTokens`."""
    rows = (num_tokens, spec.num_kv_heads)
    return rows if field.endswith("scales") else (*rows, spec.head_dim)


class Backend(Protocol):
    """Paged INT8 layers and the operations over them.

    Calls come from one thread at a time, and from the same one always where `binds_caller` says so. Sessions past their
    lengths may hold anything; a backend uses no slot that neither this batch nor an earlier one stored, though it may
    read past kv_len within a tile.

    In a `deterministic` model an entry is answered with the same bits whatever else is in the batch and however many
    threads there are. The same tokens cut into other entries (8 tokens in one, or one in each of 8) may differ in the
    last bits.
    """

    name: str
    """What `--backend` calls it."""

    description: str
    """Device, instruction set and threads, for logs and ServerInfo."""

    binds_caller: bool
    """Whether steps must all come from one thread, which the backend binds to a core or a device."""

    def check_model(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError when this backend cannot serve `spec`; called before anything is allocated."""

    def free_bytes(self) -> int:
        """Return the bytes that are free for pools on this backend's device."""

    def alloc_paged_int8_layer(self, spec: ModelSpec, num_blocks: int) -> PagedInt8Layer:
        """Allocate one layer of `num_blocks` blocks.

        Raises:
            UnsupportedError: The device cannot hold it; the text has the numbers.
        """

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind allocated layers into the cache that the operations take."""

    def int8_kv_append_paged(
        self, cache: PagedInt8Cache, batch: RaggedBatch, k: HostArray, v: HostArray
    ) -> NDArray[np.int64]:
        """Quantise k and v per (token, kv head) and store them at `batch.slot_mapping`.

        Args:
            cache: The model's cache.
            batch: The launch.
            k: [total_tokens, num_kv_heads, head_dim] float16, bfloat16 or float32.
            v: Like k.

        Returns:
            [num_entries] int64 packed `Offence` of each entry, or NO_OFFENCE. Slots of an offending entry may hold
            anything afterwards. Rows whose slot is -1 are neither read nor checked.
        """

    def int8_paged_decode_attention(
        self, cache: PagedInt8Cache, batch: RaggedBatch, q: HostArray, *, return_lse: bool
    ) -> DecodeOutput:
        """Attend over the cached tokens, dequantising on the fly.

        Args:
            cache: The model's cache.
            batch: The launch; `kv_lens` counts what `int8_kv_append_paged` stored before.
            q: [total_tokens, num_q_heads, head_dim] float16, bfloat16 or float32.
            return_lse: Whether to return the log-sum-exp.
        """

    def step(
        self,
        cache: PagedInt8Cache,
        batch: RaggedBatch,
        q: HostArray | None,
        kv: tuple[HostArray, HostArray] | None,
        *,
        return_lse: bool,
    ) -> StepOutput:
        """Append k and v where they are given, then attend where q is: the two operations, or what equals them.

        Args:
            cache: The model's cache.
            batch: The launch.
            q: As for `int8_paged_decode_attention`.
            kv: k and v as for `int8_kv_append_paged`.
            return_lse: Whether to return the log-sum-exp.
        """

    def copy_blocks(self, cache: PagedInt8Cache, copies: Sequence[tuple[int, int]]) -> None:
        """Copy block `source` to block `target` in every layer, for each (source, target)."""

    def read_tokens(
        self, cache: PagedInt8Cache, layer: int, slots: NDArray[np.int64]
    ) -> StoredTokens:
        """Return copies of the codes and scales stored at `slots` of a layer, in the order given.

        Args:
            cache: The model's cache.
            layer: 0-based layer.
            slots: [num_tokens] int64 `block_id * block_size + offset`, each stored before.
        """

    def read_blocks(
        self, cache: PagedInt8Cache, layer: int, field: str, block_ids: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return a copy of one field of whole blocks of a layer, in token order.

        Args:
            cache: The model's cache.
            layer: 0-based layer.
            field: A field of `StoredTokens`.
            block_ids: [num_blocks] int64.

        Returns:
            The field, with num_tokens = num_blocks * block_size; slots that were not stored may hold anything.
        """

    def write_blocks(
        self,
        cache: PagedInt8Cache,
        layer: int,
        field: str,
        block_ids: NDArray[np.int64],
        values: NDArray[Any],
    ) -> None:
        """Store one field of whole blocks of a layer: the inverse of `read_blocks`.

        Args:
            cache: The model's cache.
            layer: 0-based layer.
            field: A field of `StoredTokens`.
            block_ids: [num_blocks] int64, each once.
            values: What `read_blocks` returns, C-contiguous; also what another backend's returned.
        """


def composed_step(
    backend: Backend,
    cache: PagedInt8Cache,
    batch: RaggedBatch,
    q: HostArray | None,
    kv: tuple[HostArray, HostArray] | None,
    *,
    return_lse: bool,
) -> StepOutput:
    """Run `Backend.step` as its two operations, one after the other."""
    offences = np.full(batch.num_entries, NO_OFFENCE, np.int64)
    if kv is not None:
        offences = backend.int8_kv_append_paged(cache, batch, *kv)
    if q is None:
        return StepOutput(None, None, offences)
    decoded = backend.int8_paged_decode_attention(cache, batch, q, return_lse=return_lse)
    return StepOutput(decoded.out, decoded.lse, np.minimum(offences, decoded.offences))


def check_shape(spec: ModelSpec) -> None:
    """Raise UnsupportedError for a shape that no backend serves."""
    if spec.head_dim % 8 or not 0 < spec.head_dim <= MAX_HEAD_DIM:
        raise UnsupportedError(
            f"head_dim of {spec.name} must be a multiple of 8 up to {MAX_HEAD_DIM}, got {spec.head_dim}"
        )
    if spec.block_size not in BLOCK_SIZES:
        raise UnsupportedError(
            f"block_size of {spec.name} must be one of {BLOCK_SIZES}, got {spec.block_size}"
        )


def check_layer_fits(spec: ModelSpec, num_blocks: int, free_bytes: int) -> None:
    """Raise UnsupportedError with the numbers when one layer takes more than is free."""
    layer_bytes = num_blocks * spec.block_bytes // spec.num_layers
    if layer_bytes > free_bytes:
        raise UnsupportedError(
            f"one layer of {spec.name} with {num_blocks} blocks takes {layer_bytes} bytes, and "
            f"{free_bytes} are free; lower num_blocks or memory"
        )


def alloc_paged_int8_cache(backend: Backend, spec: ModelSpec, num_blocks: int) -> PagedInt8Cache:
    """Allocate every layer of a model and bind them."""
    layers = [backend.alloc_paged_int8_layer(spec, num_blocks) for _ in range(spec.num_layers)]
    return backend.prepare(spec, num_blocks, layers)
