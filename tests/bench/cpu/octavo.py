"""Octavo itself: sessions with shuffled blocks in a pool of the cpu backend, filled by its append operation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from octavo_server.backends.base import NO_OFFENCE, RaggedBatch, alloc_paged_int8_cache
from octavo_server.backends.cpu import CpuBackend
from octavo_server.model import ModelSpec, default_sm_scale
from tests.bench.contest import Contestant
from tests.bench.cpu.draws import Draw, HalfArray
from tests.bench.cpu.racers import Racer, copies_of, rotating
from tests.bench.shapes import Heads

OCTAVO = "Octavo"

Result = TypeVar("Result")

_CALLER = ThreadPoolExecutor(1, "octavo-caller")
_is_caller = threading.local()


def on_caller(run: Callable[[], Result]) -> Result:
    """Run something on the thread that calls the backend, as the server's engine thread does.

    A backend with pinned threads binds its caller to the first core. The main thread is not to be bound: it would
    share that core with a thread of the peers, and those that it starts would be bound with it.
    """
    if getattr(_is_caller, "here", False):
        return run()

    def here() -> Result:
        _is_caller.here = True
        return run()

    return _CALLER.submit(here).result()


def octavo_contestant(
    name: str, launch_bytes: int, num_caches: int, run: Callable[[int], object]
) -> Contestant:
    """Return a rotating contestant all of whose launches of a sample are the caller's."""
    contestant = rotating(name, "int8", launch_bytes, num_caches, run)
    return replace(
        contestant, launch=lambda first, count: on_caller(lambda: contestant.launch(first, count))
    )


class Sessions:
    """Sessions of one length in one pool.

    Args:
        backend: Holds the pool.
        heads: Of the one layer.
        num_sessions: Sessions.
        capacity: Tokens that there is room for in each.
        block_size: Tokens of a block.
    """

    def __init__(
        self,
        backend: CpuBackend,
        heads: Heads,
        num_sessions: int,
        capacity: int,
        block_size: int = 32,
    ) -> None:
        self.backend = backend
        blocks_each = -(-capacity // block_size)
        num_blocks = num_sessions * blocks_each
        self._block_size = block_size
        self.cache = alloc_paged_int8_cache(
            backend, _spec(heads, block_size, blocks_each * block_size), num_blocks
        )
        shuffled = np.random.default_rng(3).permutation(num_blocks)
        self._tables = shuffled.reshape(num_sessions, blocks_each).astype(np.int32)

    def batch(
        self, sessions: Sequence[int], start_pos: int, num_tokens: int, *, appends: bool
    ) -> RaggedBatch:
        """Return a launch of equal entries, one a session: tokens start_pos .. start_pos + num_tokens - 1 of each."""
        num_entries = len(sessions)
        shape = np.full(num_entries, 1, np.int32)
        slots = [self.slots(one, start_pos, num_tokens) for one in sessions]
        return RaggedBatch(
            layers=0 * shape,
            start_pos=start_pos * shape,
            token_starts=num_tokens * np.arange(num_entries + 1, dtype=np.int32),
            kv_lens=(start_pos + num_tokens) * shape,
            is_causal=shape.astype(bool),
            block_tables=self._tables[list(sessions)],
            slot_mapping=np.concatenate(slots)
            if appends
            else np.full(num_entries * num_tokens, -1),
        )

    def slots(self, session: int, start_pos: int, num_tokens: int) -> NDArray[np.int64]:
        """Return the slots of some positions of a session."""
        positions = np.arange(start_pos, start_pos + num_tokens)
        block_idx, offset = np.divmod(positions, self._block_size)
        blocks = self._tables[session, block_idx].astype(np.int64)
        return np.asarray(blocks * self._block_size + offset)

    def fill(self, sessions: Sequence[int], k: HalfArray, v: HalfArray) -> None:
        """Append tokens to empty sessions.

        Args:
            sessions: Which.
            k: [len(sessions), num_tokens, num_kv_heads, head_dim].
            v: Like k.
        """
        batch = self.batch(sessions, 0, k.shape[1], appends=True)
        rows = (-1, *k.shape[2:])
        offences = self.append(batch, k.reshape(rows), v.reshape(rows))
        assert (offences == NO_OFFENCE).all(), "normal draws can be stored"

    def append(self, batch: RaggedBatch, k: HalfArray, v: HalfArray) -> NDArray[np.int64]:
        """Append; returns offences."""
        return on_caller(lambda: self.backend.int8_kv_append_paged(self.cache, batch, k, v))

    def attend(self, batch: RaggedBatch, q: HalfArray) -> HalfArray:
        """Attend; returns the answer."""
        attend = self.backend.int8_paged_decode_attention
        return on_caller(lambda: attend(self.cache, batch, q, return_lse=False)).out

    def step(self, batch: RaggedBatch, q: HalfArray, kv: tuple[HalfArray, HalfArray]) -> HalfArray:
        """Append and attend; returns the answer."""
        step = self.backend.step
        out = on_caller(lambda: step(self.cache, batch, q, kv, return_lse=False)).out
        assert out is not None, "q was given"
        return out


def octavo_racer(backend: CpuBackend, draw: Draw, llc_bytes: int) -> Racer:
    """Return Octavo over a case's tokens: one decode call for all sessions."""
    case, num_sessions = draw.case, draw.num_sessions
    num_caches = copies_of(case.cache_bytes, llc_bytes)
    sessions = Sessions(
        backend, case.heads, num_caches * num_sessions, draw.length, case.block_size
    )
    batches = []
    for copy in range(num_caches):
        members = range(copy * num_sessions, (copy + 1) * num_sessions)
        sessions.fill(members, draw.k, draw.v)
        batches.append(sessions.batch(members, draw.length - 1, 1, appends=False))

    def attend(copy: int) -> HalfArray:
        return sessions.attend(batches[copy], draw.q)

    contestant = octavo_contestant(OCTAVO, case.cache_bytes, num_caches, attend)
    return Racer(contestant, num_caches, attend)


def _spec(heads: Heads, block_size: int, max_context: int) -> ModelSpec:
    return ModelSpec(
        name="bench",
        num_layers=1,
        num_q_heads=heads.num_q_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        block_size=block_size,
        max_context=max_context,
        sm_scale=(default_sm_scale(heads.head_dim),),
        window=(0,),
        soft_cap=(0.0,),
    )
