"""An append of a prompt, beside a memcpy that moves as many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo_client.oracle import quantize
from tests.bench.contest import Contestant
from tests.bench.cpu.draws import HalfArray, normal
from tests.bench.cpu.memory import Memory, random_bytes
from tests.bench.cpu.octavo import OCTAVO, Sessions, octavo_contestant
from tests.bench.cpu.racers import copies_of, rotating
from tests.bench.cpu.results import Entry, Row
from tests.bench.cpu.setting import Setting
from tests.bench.shapes import LLAMA

NUM_TOKENS = 8192
LAUNCH_BYTES = NUM_TOKENS * LLAMA.append_token_bytes
"""FP16 rows read, codes and scales written."""

APPEND = f"append of {NUM_TOKENS} tokens, {LLAMA.num_kv_heads} kv heads x {LLAMA.head_dim}"
MEMCPY = "memcpy"

Pair = tuple[HalfArray, HalfArray]


def measure_append(setting: Setting) -> None:
    """Time both; what the append stored is first compared with the oracle's, bit by bit."""
    num_copies = copies_of(LAUNCH_BYTES, setting.llc_bytes)
    sessions = Sessions(setting.backend, LLAMA, num_copies, NUM_TOKENS)
    k, v = _prompt()
    ours = _append(sessions, [(k.copy(), v.copy()) for _ in range(num_copies)])
    ours.launch(0, num_copies)
    if not all(_is_stored(sessions, one, k, v) for one in range(num_copies)):
        setting.fail(APPEND, "stored bits differ from the oracle's")
        return
    contestants = [ours, _memcpy(setting.memory, num_copies)]
    entries = [Entry(c.name, c.dtype, c.launch_bytes, num_copies) for c in contestants]
    setting.add(Row(APPEND, entries, setting.race(contestants), NUM_TOKENS))


def _prompt() -> Pair:
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_TOKENS, LLAMA.num_kv_heads, LLAMA.head_dim)
    return normal(generator, shape), normal(generator, shape)


def _append(sessions: Sessions, prompts: Sequence[Pair]) -> Contestant:
    batches = [sessions.batch([one], 0, NUM_TOKENS, appends=True) for one in range(len(prompts))]
    return octavo_contestant(
        OCTAVO,
        LAUNCH_BYTES,
        len(prompts),
        lambda idx: sessions.append(batches[idx], *prompts[idx]),
    )


def _memcpy(memory: Memory, num_copies: int) -> Contestant:
    """Return a copy of half as many bytes, which are read and written."""
    half = LAUNCH_BYTES // 2
    pairs = [(random_bytes(half), random_bytes(half)) for _ in range(num_copies)]
    return rotating(MEMCPY, "-", 2 * half, num_copies, lambda idx: memory.copy(*pairs[idx]))


def _is_stored(sessions: Sessions, session: int, k: HalfArray, v: HalfArray) -> bool:
    slots = sessions.slots(session, 0, len(k))
    stored: tuple[NDArray[Any], ...] = sessions.backend.read_tokens(sessions.cache, 0, slots)
    expected: tuple[NDArray[Any], ...] = (*quantize(k), *quantize(v))
    return all(np.array_equal(x, y) for x, y in zip(stored, expected, strict=True))
