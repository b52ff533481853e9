"""A backend that computes nothing, so that what is left of a step is the path to it and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_server.backends.base import (
    NO_OFFENCE,
    Backend,
    DecodeOutput,
    HostArray,
    PagedInt8Cache,
    PagedInt8Layer,
    RaggedBatch,
    StepOutput,
    StoredTokens,
)
from octavo_server.model import ModelSpec

FREE_BYTES = 1 << 50


class NullBackend:
    """Stores nothing and answers whatever its memory holds, in the shape and dtype that it was asked for."""

    name = "null"
    binds_caller = False
    description = "null: nothing is stored or computed"

    def check_model(self, spec: ModelSpec) -> None:
        """Serve any model."""

    def free_bytes(self) -> int:
        """Return more than any pool takes."""
        return FREE_BYTES

    def alloc_paged_int8_layer(self, _spec: ModelSpec, _num_blocks: int) -> PagedInt8Layer:
        """Allocate nothing."""
        return PagedInt8Layer(None, None, None, None)

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind the layers."""
        return PagedInt8Cache(spec, num_blocks, layers)

    def int8_kv_append_paged(
        self, _cache: PagedInt8Cache, batch: RaggedBatch, _k: HostArray, _v: HostArray
    ) -> NDArray[np.int64]:
        """Store nothing."""
        return np.full(batch.num_entries, NO_OFFENCE, np.int64)

    def int8_paged_decode_attention(
        self, _cache: PagedInt8Cache, batch: RaggedBatch, q: HostArray, *, return_lse: bool
    ) -> DecodeOutput:
        """Answer without a look at q."""
        lse = np.empty(q.shape[:2], np.float32) if return_lse else None
        return DecodeOutput(np.empty_like(q), lse, np.full(batch.num_entries, NO_OFFENCE, np.int64))

    def step(
        self,
        cache: PagedInt8Cache,
        batch: RaggedBatch,
        q: HostArray | None,
        _kv: tuple[HostArray, HostArray] | None,
        *,
        return_lse: bool,
    ) -> StepOutput:
        """Answer without a look at anything."""
        if q is None:
            return StepOutput(None, None, np.full(batch.num_entries, NO_OFFENCE, np.int64))
        return StepOutput(*self.int8_paged_decode_attention(cache, batch, q, return_lse=return_lse))

    def copy_blocks(self, _cache: PagedInt8Cache, _copies: Sequence[tuple[int, int]]) -> None:
        """Copy nothing."""

    def read_tokens(
        self, _cache: PagedInt8Cache, _layer: int, _slots: NDArray[np.int64]
    ) -> StoredTokens:
        """Refuse: nothing is stored."""
        raise NotImplementedError("the null backend stores nothing")

    def read_blocks(
        self, _cache: PagedInt8Cache, _layer: int, _field: str, _block_ids: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Refuse: nothing is stored."""
        raise NotImplementedError("the null backend stores nothing")

    def write_blocks(
        self,
        _cache: PagedInt8Cache,
        _layer: int,
        _field: str,
        _block_ids: NDArray[np.int64],
        _values: NDArray[Any],
    ) -> None:
        """Store nothing."""


class CountingBackend:
    """Passes everything on to `inner`, and counts launches and what was in them.

    Attributes:
        num_launches: Launches.
        num_entries: Entries of them all.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.num_launches = 0
        self.num_entries = 0

    def step(
        self, cache: PagedInt8Cache, batch: RaggedBatch, *args: Any, **kwargs: Any
    ) -> StepOutput:
        """Run a step and count it."""
        self.num_launches += 1
        self.num_entries += batch.num_entries
        return self._inner.step(cache, batch, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
