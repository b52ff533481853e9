"""A launch: the entries of one or more steps, admitted, laid out as the arrays that a backend takes, and settled."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_server import errors
from octavo_server.backends.base import (
    Backend,
    HostArray,
    Offence,
    PagedInt8Cache,
    RaggedBatch,
    StepOutput,
)
from octavo_server.errors import OctavoError, Reason
from octavo_server.session import Admission, AppendRecord, Session
from octavo_server.stats import LaunchTimes
from octavo_server.step import StepAnswer, StepRequest

NO_BLOCK = -1
NO_SLOT = -1
_REFUSED = Admission(kv_len=0)
_NO_TABLE: array[int] = array("i")


@dataclass(slots=True, eq=False)
class LaunchEntry:
    """One entry of a launch; a refused one keeps its rows, with kv_len 0, so that no tensor is cut.

    Attributes:
        session: Whose cache it reads and writes; None when its handle names no open session.
        layer: Layer of the entry.
        start_pos: Position of its first token.
        num_tokens: Its rows.
        is_causal: Whether row i attends to [0, start_pos + i].
        admission: What it may do.
        error: Why it was refused, before the launch or by its outcome.
    """

    session: Session | None
    layer: int
    start_pos: int
    num_tokens: int
    is_causal: bool
    admission: Admission = _REFUSED
    error: OctavoError | None = None

    def settle(self, offence: Offence | None) -> int:
        """Confirm or refuse what was admitted, by what the backend found in the entry's rows.

        Returns:
            Tokens that are stored by it.
        """
        if self.error is None and offence is not None:
            self.error = _offence_error(offence)
        if self.session is None or not self.admission.is_append:
            return 0
        if self.error is None:
            self.session.confirm(self.layer)
            return self.num_tokens
        self.session.refuse(self.layer)
        return 0


def admit_step(request: StepRequest, sessions: Sequence[Session | None]) -> list[LaunchEntry]:
    """Admit the entries of a step, each on its own: blocks are reserved for those that append.

    Args:
        request: The step.
        sessions: [num_entries] session of each handle, None where there is none.
    """
    return [_admit_entry(request, session, entry_idx) for entry_idx, session in enumerate(sessions)]


def _admit_entry(request: StepRequest, session: Session | None, entry_idx: int) -> LaunchEntry:
    layer, start_pos = request.layers[entry_idx], request.start_pos[entry_idx]
    num_tokens = request.num_tokens[entry_idx]
    entry = LaunchEntry(session, layer, start_pos, num_tokens, request.is_causal)
    try:
        if session is None:
            raise errors.session_not_found(str(request.handles[entry_idx]))
        if request.k is None:
            entry.admission = session.admit_attend(
                layer, start_pos, num_tokens, is_causal=request.is_causal
            )
        else:
            record = AppendRecord(start_pos, num_tokens, request.step_key)
            entry.admission = session.admit_append(layer, record)
    except OctavoError as error:
        entry.error = error
    return entry


NOTHING_RAN = StepOutput(None, None, np.empty(0, np.int64))
"""The outcome when no entry names an open session."""


def run_launch(
    backend: Backend,
    cache: PagedInt8Cache,
    requests: Sequence[StepRequest],
    entries: Sequence[LaunchEntry],
    batch: RaggedBatch,
    times: LaunchTimes,
) -> StepOutput:
    """Run a batch on the backend: copy shared blocks, append, attend; each only where it has a use.

    Notes in `times` when the backend was called and when it returned.
    """
    copies = [copy for entry in entries for copy in entry.admission.copies]
    if copies:
        backend.copy_blocks(cache, copies)
    q = None if all(entry.error for entry in entries) else _joined(requests, "q")
    kv = None
    if any(entry.admission.is_append for entry in entries):
        k, v = _joined(requests, "k"), _joined(requests, "v")
        assert k is not None
        assert v is not None, "a step that appends has both"
        kv = k, v
    return_lse = any(request.return_lse for request in requests)
    times.staged_at = time.monotonic()
    outcome = backend.step(cache, batch, q, kv, return_lse=return_lse)
    times.ran_at = time.monotonic()
    return outcome


def settle(entries: Sequence[LaunchEntry], outcome: StepOutput) -> int:
    """Confirm or refuse every entry; return the tokens that are stored by it."""
    num_stored = 0
    for entry, code in zip(entries, outcome.offences.tolist(), strict=True):
        num_stored += entry.settle(Offence.unpack(code))
    return num_stored


def answer_step(
    request: StepRequest, entries: Sequence[LaunchEntry], outcome: StepOutput, first_row: int
) -> StepAnswer:
    """Cut one step's answer out of a launch: its rows, with zeros where an entry was refused."""
    answer = StepAnswer(entry_errors={i: e.error for i, e in enumerate(entries) if e.error})
    if request.q is None:
        return answer
    rows = slice(first_row, first_row + len(request.q))
    answer.out = np.zeros_like(request.q) if outcome.out is None else outcome.out[rows]
    if request.return_lse:
        no_lse = np.zeros(request.q.shape[:2], np.float32)
        answer.lse = no_lse if outcome.lse is None else outcome.lse[rows]
    _clear_refused(answer.out, entries)
    _clear_refused(answer.lse, entries)
    return answer


def _clear_refused(rows: NDArray[Any] | None, entries: Sequence[LaunchEntry]) -> None:
    start = 0
    for entry in entries:
        end = start + entry.num_tokens
        if entry.error and rows is not None:
            rows[start:end] = 0
        start = end


def build_batch(entries: Sequence[LaunchEntry], block_size: int) -> RaggedBatch:
    """Lay entries out as arrays and compute their slots on the host."""
    admitted = [entry.admission.kv_len > 0 for entry in entries]
    # Only a causal entry's position means anything; any other may be out of range.
    start_pos = np.array(
        [
            entry.start_pos if ok and entry.is_causal else 0
            for entry, ok in zip(entries, admitted, strict=True)
        ],
        np.int32,
    )
    token_starts = np.zeros(len(entries) + 1, np.int32)
    np.cumsum([entry.num_tokens for entry in entries], out=token_starts[1:])
    block_tables = pad_block_tables([_block_table(entry) for entry in entries])
    is_append = np.array([entry.admission.is_append for entry in entries], np.bool_)
    return RaggedBatch(
        layers=np.array(
            [entry.layer if ok else 0 for entry, ok in zip(entries, admitted, strict=True)],
            np.int32,
        ),
        start_pos=start_pos,
        token_starts=token_starts,
        kv_lens=np.array([entry.admission.kv_len for entry in entries], np.int32),
        is_causal=np.array([entry.is_causal for entry in entries], np.bool_),
        block_tables=block_tables,
        slot_mapping=map_slots(block_tables, start_pos, token_starts, is_append, block_size),
    )


def pad_block_tables(tables: Sequence[array[int]]) -> NDArray[np.int32]:
    """Return [num_entries, max_num_blocks] int32 block ids, padded with -1."""
    padded = np.full((len(tables), max(map(len, tables), default=0)), NO_BLOCK, np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def map_slots(
    block_tables: NDArray[np.int32],
    start_pos: NDArray[np.int32],
    token_starts: NDArray[np.int32],
    is_append: NDArray[np.bool_],
    block_size: int,
) -> NDArray[np.int64]:
    """Return [total_tokens] int64 slots, `block_id * block_size + offset`, -1 for entries that store nothing."""
    slots = np.full(token_starts[-1], NO_SLOT, np.int64)
    entry_idx = np.repeat(np.arange(len(start_pos)), np.diff(token_starts))
    rows = np.flatnonzero(is_append[entry_idx])
    entry_idx = entry_idx[rows]
    positions = start_pos[entry_idx] + (rows - token_starts[entry_idx])
    block_ids = block_tables[entry_idx, positions // block_size].astype(np.int64)
    slots[rows] = block_ids * block_size + positions % block_size
    return slots


def _joined(requests: Sequence[StepRequest], name: str) -> HostArray | None:
    """Join the steps' tensors on the token axis; all have it or none does. That of one step is not copied."""
    tensors = [request.tensors[name] for request in requests if name in request.tensors]
    if len(tensors) <= 1:
        return tensors[0] if tensors else None
    return np.concatenate(tensors)


def _block_table(entry: LaunchEntry) -> array[int]:
    return entry.session.block_table if entry.session and not entry.error else _NO_TABLE


def _offence_error(offence: Offence) -> OctavoError:
    where = f"{offence.field}, token {offence.token_idx}, head {offence.head_idx}"
    reason, what = (
        (Reason.SCALE_OVERFLOW, "too large for an FP16 scale: |x| must be at most 127 * 65504")
        if offence.is_overflow
        else (Reason.NON_FINITE, "NaN or infinite")
    )
    message = f"{where} is {what}; nothing of this entry was stored, send finite values"
    return OctavoError(
        reason, message, field=offence.field, token=offence.token_idx, head=offence.head_idx
    )
