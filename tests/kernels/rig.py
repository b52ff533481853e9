"""A backend with sessions on it and an oracle beside every (session, layer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo_client.oracle import AttentionOptions, ExactAttention, OracleCache, check
from octavo_server.backends.base import (
    NO_OFFENCE,
    Backend,
    DecodeOutput,
    HostArray,
    RaggedBatch,
    StoredTokens,
    alloc_paged_int8_cache,
)
from octavo_server.model import ModelSpec, default_sm_scale
from tests.kernels.draws import FLOAT32, Inputs, draw

LSE_TOLERANCE = 1e-4
"""An error of the lse is a relative error of the probabilities: FP32's bound."""

HAS_GPU = torch.cuda.is_available()

POISON_CODE = -128
POISON_SCALE_BITS = 0x7E00
"""What slots hold that nothing was stored in: a code that never occurs, and NaN."""


def make_spec(
    num_kv_heads: int = 2, group_size: int = 2, head_dim: int = 64, **options: Any
) -> ModelSpec:
    """Return a model of two layers without attention options, unless `options` says otherwise."""
    num_layers = options.pop("num_layers", 2)
    fields: dict[str, Any] = {
        "block_size": 16,
        "max_context": 8192,
        "sm_scale": (default_sm_scale(head_dim),) * num_layers,
        "window": (0,) * num_layers,
        "soft_cap": (0.0,) * num_layers,
    }
    return ModelSpec(
        name="test",
        num_layers=num_layers,
        num_q_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **(fields | options),
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a batch.

    Attributes:
        session: From `Rig.open`.
        layer: 0-based layer.
        num_tokens: Tokens of the entry.
        start_pos: Position of the first one; None = the length, so that an append fits.
        causal: Whether token i attends to [0, start_pos + i] only.
    """

    session: int
    layer: int
    num_tokens: int = 1
    start_pos: int | None = None
    causal: bool = True


class Rig:
    """Drives a backend over sessions with shuffled block tables in a pool full of poison.

    Args:
        backend: Under test.
        spec: The model.
        num_blocks: Blocks of the pool.
        seed: Of the shuffle and of `draw`.
    """

    def __init__(self, backend: Backend, spec: ModelSpec, num_blocks: int, seed: int = 0) -> None:
        self.backend = backend
        self.spec = spec
        self.rng = np.random.default_rng(seed)
        self.cache = alloc_paged_int8_cache(backend, spec, num_blocks)
        self._poison()
        self._free_blocks = self.rng.permutation(num_blocks).tolist()
        self.block_tables: list[list[int]] = []
        self._oracles: dict[tuple[int, int], OracleCache] = {}

    def open(self, num_tokens: int) -> int:
        """Open a session with room for `num_tokens` tokens."""
        num_blocks = -(-num_tokens // self.spec.block_size)
        self.block_tables.append([self._free_blocks.pop() for _ in range(num_blocks)])
        return len(self.block_tables) - 1

    def oracle(self, session: int, layer: int) -> OracleCache:
        """Return the oracle of a (session, layer)."""
        spec = self.spec
        sinks = None if spec.sinks is None else spec.sinks[layer]
        options = AttentionOptions(
            spec.sm_scale[layer], spec.window[layer], spec.soft_cap[layer], sinks
        )
        return self._oracles.setdefault((session, layer), OracleCache(options))

    def slots(self, session: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the slots of positions start .. stop - 1."""
        table = np.array(self.block_tables[session], dtype=np.int64)
        positions = np.arange(start, stop)
        block_size = self.spec.block_size
        return np.asarray(table[positions // block_size] * block_size + positions % block_size)

    def draw(
        self, entries: Sequence[Entry], name: str = "normal", dtype: np.dtype[Any] = FLOAT32
    ) -> Inputs:
        """Draw q, k and v of a step."""
        return draw(name, self.rng, sum(entry.num_tokens for entry in entries), self.spec, dtype)

    def batch(self, entries: Sequence[Entry], *, appends: bool) -> RaggedBatch:
        """Return the launch of `entries`; without `appends` no row has a slot."""
        starts = [self._start_pos(entry) for entry in entries]
        counts = [entry.num_tokens for entry in entries]
        lengths = [
            start + count if appends else len(self.oracle(entry.session, entry.layer))
            for entry, start, count in zip(entries, starts, counts, strict=True)
        ]
        slots = [
            self.slots(entry.session, start, start + count) if appends else np.full(count, -1)
            for entry, start, count in zip(entries, starts, counts, strict=True)
        ]
        return RaggedBatch(
            layers=np.array([entry.layer for entry in entries], dtype=np.int32),
            start_pos=np.array(starts, dtype=np.int32),
            token_starts=np.cumsum([0, *counts], dtype=np.int32),
            kv_lens=np.array(lengths, dtype=np.int32),
            is_causal=np.array([entry.causal for entry in entries]),
            block_tables=self._padded_tables(entries),
            slot_mapping=np.concatenate(slots).astype(np.int64),
        )

    def append(self, entries: Sequence[Entry], inputs: Inputs) -> RaggedBatch:
        """Append k and v to the backend and to the oracles; returns the launch."""
        batch = self.batch(entries, appends=True)
        offences = self.backend.int8_kv_append_paged(self.cache, batch, inputs.k, inputs.v)
        assert offences.tolist() == [NO_OFFENCE] * len(entries)
        for entry_idx, entry in enumerate(entries):
            rows = entry_rows(batch, entry_idx)
            self.oracle(entry.session, entry.layer).append(inputs.k[rows], inputs.v[rows])
        return batch

    def fill(
        self,
        session: int,
        layer: int,
        num_tokens: int,
        name: str = "normal",
        dtype: np.dtype[Any] = FLOAT32,
    ) -> None:
        """Append `num_tokens` drawn tokens to a (session, layer)."""
        if num_tokens:
            entries = [Entry(session, layer, num_tokens)]
            self.append(entries, self.draw(entries, name, dtype))

    def attend(self, batch: RaggedBatch, q: HostArray) -> DecodeOutput:
        """Run attention with lse; no entry may offend."""
        output = self.backend.int8_paged_decode_attention(self.cache, batch, q, return_lse=True)
        assert output.offences.tolist() == [NO_OFFENCE] * batch.num_entries
        return output

    def step(self, entries: Sequence[Entry], inputs: Inputs) -> DecodeOutput:
        """Append, attend, and hold the answer against the oracle."""
        batch = self.append(entries, inputs)
        output = self.attend(batch, inputs.q)
        self.verify(entries, batch, inputs.q, output)
        return output

    def query(self, entries: Sequence[Entry], q: HostArray) -> DecodeOutput:
        """Attend without appending, and hold the answer against the oracle."""
        batch = self.batch(entries, appends=False)
        output = self.attend(batch, q)
        self.verify(entries, batch, q, output)
        return output

    def verify(
        self, entries: Sequence[Entry], batch: RaggedBatch, q: HostArray, output: DecodeOutput
    ) -> None:
        """Hold out and lse of every entry against the oracle."""
        for entry_idx, entry in enumerate(entries):
            self.verify_entry(entry, batch, entry_idx, q, output)

    def verify_entry(
        self,
        entry: Entry,
        batch: RaggedBatch,
        entry_idx: int,
        q: HostArray,
        output: DecodeOutput,
    ) -> None:
        """Hold out and lse of one entry against the oracle."""
        rows = entry_rows(batch, entry_idx)
        exact = self.exact(entry, q[rows], int(batch.start_pos[entry_idx]))
        assert output.out.dtype == q.dtype
        assert output.lse is not None
        check(output.out[rows], exact)
        check_lse(output.lse[rows], exact)

    def exact(self, entry: Entry, q: HostArray, start_pos: int) -> ExactAttention:
        """Return what the oracle answers to an entry's queries."""
        oracle = self.oracle(entry.session, entry.layer)
        return oracle.attend(q, start_pos=start_pos, causal=entry.causal)

    def verify_stored(self, session: int, layer: int) -> None:
        """Hold the codes and scales of a (session, layer) against the oracle's, bit by bit."""
        oracle = self.oracle(session, layer)
        stored = self.read(layer, self.slots(session, 0, len(oracle)))
        for (name, actual), expected in zip(stored._asdict().items(), oracle.stored(), strict=True):
            np.testing.assert_array_equal(bits(actual), bits(expected), err_msg=name)

    def read(self, layer: int, slots: NDArray[np.int64]) -> StoredTokens:
        """Return what the backend stores at `slots`."""
        return self.backend.read_tokens(self.cache, layer, slots)

    def poisoned_slots(self, layer: int) -> NDArray[np.int64]:
        """Return the slots of a layer in which nothing at all was stored, ascending."""
        num_slots = self.cache.num_blocks * self.spec.block_size
        k_codes, k_scales, v_codes, v_scales = self.read(layer, np.arange(num_slots))
        is_poison = (bits(k_scales) == POISON_SCALE_BITS) & (bits(v_scales) == POISON_SCALE_BITS)
        is_poison &= ((k_codes == POISON_CODE) & (v_codes == POISON_CODE)).all(axis=-1)
        return np.flatnonzero(is_poison.all(axis=-1))

    def _poison(self) -> None:
        for layer in self.cache.layers:
            layer.k_codes.fill_(POISON_CODE)
            layer.v_codes.fill_(POISON_CODE)
            layer.k_scales.view(torch.int16).fill_(POISON_SCALE_BITS)
            layer.v_scales.view(torch.int16).fill_(POISON_SCALE_BITS)
        if HAS_GPU:  # torch has a stream of its own, for which a backend's does not wait
            torch.cuda.synchronize()

    def _start_pos(self, entry: Entry) -> int:
        if entry.start_pos is not None:
            return entry.start_pos
        return len(self.oracle(entry.session, entry.layer))

    def _padded_tables(self, entries: Sequence[Entry]) -> NDArray[np.int32]:
        tables = [self.block_tables[entry.session] for entry in entries]
        width = max(len(table) for table in tables)
        padded = [table + [-1] * (width - len(table)) for table in tables]
        return np.array(padded, dtype=np.int32)


def entry_rows(batch: RaggedBatch, entry_idx: int) -> slice:
    """Return an entry's rows of q, k, v and out."""
    return slice(int(batch.token_starts[entry_idx]), int(batch.token_starts[entry_idx + 1]))


def bits(x: NDArray[Any]) -> NDArray[Any]:
    """Return an array's bits, so that NaN equals itself and -0 differs from 0."""
    return x.view(f"u{x.dtype.itemsize}")


def check_lse(lse: NDArray[np.float32], exact: ExactAttention) -> None:
    """Hold an lse against the oracle's wherever the bound on the error holds."""
    assert lse.shape == exact.lse.shape
    assert lse.dtype == np.float32
    is_bounded = exact.peak_score <= 100
    errors = np.abs(lse - exact.lse)[is_bounded]
    assert (errors <= LSE_TOLERANCE).all(), f"lse is off by up to {errors.max()}"
