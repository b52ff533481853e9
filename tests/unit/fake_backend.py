"""A backend without kernels, for tests of the engine: it records launches, waits and fails on command."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    composed_step,
    field_shape,
)
from octavo_server.model import ModelSpec


class FakeBackend:
    """Answers every query with its own q plus the entry's kv_len; a NaN in k or v is an offence; lse is kv_len + 0.5.

    Attributes:
        batches: Every batch appended or attended, in order.
        threads: The thread that each came from.
        may_run: Clear it to hold the next launch; `is_running` is set once one is held.
        is_broken: Makes the next launch raise.
    """

    name = "fake"
    description = "fake"

    def __init__(self) -> None:
        self.batches: list[RaggedBatch] = []
        self.threads: list[threading.Thread] = []
        self.copies: list[tuple[int, int]] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.is_running = threading.Event()
        self.is_broken = False
        self.binds_caller = False

    def check_model(self, spec: ModelSpec) -> None:
        """Serve everything."""

    def free_bytes(self) -> int:
        """Return 1 GiB."""
        return 2**30

    def alloc_paged_int8_layer(self, spec: ModelSpec, num_blocks: int) -> PagedInt8Layer:
        """Allocate nothing."""
        return PagedInt8Layer(None, None, None, None)

    def prepare(
        self, spec: ModelSpec, num_blocks: int, layers: Sequence[PagedInt8Layer]
    ) -> PagedInt8Cache:
        """Bind nothing."""
        return PagedInt8Cache(spec, num_blocks, layers)

    def int8_kv_append_paged(
        self, cache: PagedInt8Cache, batch: RaggedBatch, k: HostArray, v: HostArray
    ) -> NDArray[np.int64]:
        """Find the entries with a NaN."""
        self._run(batch)
        offences = np.full(batch.num_entries, NO_OFFENCE, np.int64)
        for entry_idx in range(batch.num_entries):
            rows = slice(*batch.token_starts[entry_idx : entry_idx + 2])
            is_stored = batch.slot_mapping[rows] >= 0
            for field, tensor in ((0, k), (1, v)):
                bad = np.argwhere(np.isnan(tensor[rows][is_stored]))
                if len(bad):
                    token_idx, head_idx, _ = bad[0].tolist()
                    code = field << 60 | token_idx << 24 | head_idx << 8
                    offences[entry_idx] = min(offences[entry_idx], code)
        return offences

    def int8_paged_decode_attention(
        self, cache: PagedInt8Cache, batch: RaggedBatch, q: HostArray, *, return_lse: bool
    ) -> DecodeOutput:
        """Return q + kv_len."""
        self._run(batch)
        kv_lens = np.repeat(batch.kv_lens, np.diff(batch.token_starts))
        out = q + kv_lens[:, None, None].astype(q.dtype)
        lse = np.full(q.shape[:2], kv_lens[:, None] + 0.5, np.float32) if return_lse else None
        return DecodeOutput(out, lse, np.full(batch.num_entries, NO_OFFENCE, np.int64))

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
        """Record the copies."""
        self.copies += copies

    def read_tokens(
        self, cache: PagedInt8Cache, layer: int, slots: NDArray[np.int64]
    ) -> StoredTokens:
        """Refuse: nothing is stored."""
        raise NotImplementedError

    def read_blocks(
        self, cache: PagedInt8Cache, layer: int, field: str, block_ids: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Return codes of 1 and scales of 1: nothing is stored."""
        num_tokens = len(block_ids) * cache.spec.block_size
        dtype = np.float16 if field.endswith("scales") else np.int8
        return np.ones(field_shape(cache.spec, field, num_tokens), dtype)

    def write_blocks(
        self,
        cache: PagedInt8Cache,
        layer: int,
        field: str,
        block_ids: NDArray[np.int64],
        values: NDArray[Any],
    ) -> None:
        """Store nothing."""

    def _run(self, batch: RaggedBatch) -> None:
        if not self.batches or self.batches[-1] is not batch:
            self.batches.append(batch)
            self.threads.append(threading.current_thread())
        self.is_running.set()
        assert self.may_run.wait(10)
        if self.is_broken:
            raise RuntimeError("planted")
