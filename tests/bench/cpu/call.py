"""What a call costs beyond its kernels' work: one token, a short context, one session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from octavo_server.backends.base import RaggedBatch
from tests.bench.contest import Contestant
from tests.bench.cpu.draws import Draw, HalfArray, draw_case, relative_error, worst_ratio
from tests.bench.cpu.octavo import OCTAVO, Sessions, octavo_contestant
from tests.bench.cpu.racers import copies_of
from tests.bench.cpu.results import Entry, Row
from tests.bench.cpu.setting import Setting
from tests.bench.shapes import LLAMA, Case, Workload

CONTEXT = 128
CALL = f"one token, context {CONTEXT}, one session"

EMPTY = f"{OCTAVO}, empty kernels"
ATTENTION, EMPTY_ATTENTION = f"{OCTAVO}, attention alone", f"{OCTAVO}, attention alone, empty"

Call = Callable[[RaggedBatch], HalfArray]


@dataclass(frozen=True, slots=True, eq=False)
class _Calls:
    """The calls, and the launches that they take in turn.

    Attributes:
        step: Appends the token and attends.
        attend: Attends alone.
        full: One launch a session: its last token, over all of its context.
        empty: The same entries; nothing is stored, nothing is attended to.
    """

    step: Call
    attend: Call
    full: Sequence[RaggedBatch]
    empty: Sequence[RaggedBatch]


def measure_call(setting: Setting) -> None:
    """Time a step of one token beside the same call in which the kernels have nothing to do."""
    draw = draw_case(Case(LLAMA, Workload(CALL, (CONTEXT,))))
    calls = _calls(setting, draw)
    of_bound = max(worst_ratio(calls.step(batch), draw.exact) for batch in calls.full)
    if setting.is_wrong(CALL, of_bound):
        return
    assert not calls.step(calls.empty[0]).any(), "a skipped entry answers zeros"
    contestants = _contestants(calls, draw.case.cache_bytes)
    entries = [Entry(c.name, c.dtype, c.launch_bytes, len(calls.full)) for c in contestants]
    error = relative_error(calls.step(calls.full[0]), draw.exact)
    entries[0] = replace(entries[0], error=error, of_bound=of_bound)
    setting.add(Row(CALL, entries, setting.race(contestants), CONTEXT))


def emptied(batch: RaggedBatch) -> RaggedBatch:
    """Return a launch of the same entries that stores nothing and attends to nothing."""
    return batch._replace(
        start_pos=np.zeros_like(batch.start_pos),
        kv_lens=np.zeros_like(batch.kv_lens),
        slot_mapping=np.full_like(batch.slot_mapping, -1),
    )


def _calls(setting: Setting, draw: Draw) -> _Calls:
    """Return the calls over as many sessions as the last-level cache cannot hold."""
    num_sessions = copies_of(draw.case.cache_bytes, setting.llc_bytes)
    sessions = Sessions(setting.backend, LLAMA, num_sessions, CONTEXT)
    for one in range(num_sessions):
        sessions.fill([one], draw.k, draw.v)
    full = [sessions.batch([one], CONTEXT - 1, 1, appends=True) for one in range(num_sessions)]
    kv = draw.k[0, -1:], draw.v[0, -1:]
    return _Calls(
        lambda batch: sessions.step(batch, draw.q, kv),
        lambda batch: sessions.attend(batch, draw.q),
        full,
        [emptied(batch) for batch in full],
    )


def _contestants(calls: _Calls, launch_bytes: int) -> list[Contestant]:
    def contestant(name: str, call: Call, batches: Sequence[RaggedBatch]) -> Contestant:
        return octavo_contestant(name, launch_bytes, len(batches), lambda idx: call(batches[idx]))

    return [
        contestant(OCTAVO, calls.step, calls.full),
        contestant(EMPTY, calls.step, calls.empty),
        contestant(ATTENTION, calls.attend, calls.full),
        contestant(EMPTY_ATTENTION, calls.attend, calls.empty),
    ]
