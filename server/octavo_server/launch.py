"""A launch: the entries of one or more steps, admitted, laid out as the arrays that a backend takes, and settled."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_server.backends.base import (
    Backend,
    HostArray,
    Offence,
    PagedInt8Cache,
    RaggedBatch,
    StepOutput,
)
from octavo_server.errors import OctavoError, Reason
from octavo_server.model import ModelSpec
from octavo_server.session import Admission, AppendRecord, Session
from octavo_server.stats import LaunchTimes
from octavo_server.step import StepAnswer, StepRequest

NO_SLOT = -1
_NO_BLOCK_BYTE = b"\xff"
"""Four of them are block id -1."""

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

    def settle(self, offence: Offence | None, now: float) -> int:
        """Confirm or refuse what was admitted, by what the backend found in the entry's rows; renew the lease.

        Returns:
            Tokens that are stored by it.
        """
        if self.error is None and offence is not None:
            self.error = _offence_error(offence)
        if self.session is None:
            return 0
        self.session.used_at = now
        if not self.admission.is_append:
            return 0
        if self.error is None:
            self.session.confirm(self.layer)
            return self.num_tokens
        self.session.refuse(self.layer)
        return 0


def admit_step(
    request: StepRequest, sessions: Sequence[Session | OctavoError]
) -> list[LaunchEntry]:
    """Admit the entries of a step, each on its own: blocks are reserved for those that append.

    Args:
        request: The step.
        sessions: [num_entries] session of each handle, or the refusal where there is none.
    """
    entries = []
    for found, layer, start_pos, num_tokens in zip(
        sessions, request.layers, request.start_pos, request.num_tokens, strict=True
    ):
        if isinstance(found, OctavoError):
            entry = LaunchEntry(None, layer, start_pos, num_tokens, request.is_causal, error=found)
        else:
            entry = LaunchEntry(found, layer, start_pos, num_tokens, request.is_causal)
            try:
                entry.admission = _admit(request, found, entry)
            except OctavoError as error:
                entry.error = error
        entries.append(entry)
    return entries


def _admit(request: StepRequest, session: Session, entry: LaunchEntry) -> Admission:
    if request.k is None:
        return session.admit_attend(
            entry.layer, entry.start_pos, entry.num_tokens, is_causal=entry.is_causal
        )
    record = AppendRecord(entry.start_pos, entry.num_tokens, request.step_key)
    return session.admit_append(entry.layer, record)


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
    q = (
        None
        if all(entry.error for entry in entries)
        else _joined([request.q for request in requests])
    )
    kv = None
    if any(entry.admission.is_append for entry in entries):
        k = _joined([request.k for request in requests])
        v = _joined([request.v for request in requests])
        assert k is not None
        assert v is not None, "a step that appends has both"
        kv = k, v
    return_lse = any(request.return_lse for request in requests)
    times.staged_at = time.monotonic()
    outcome = backend.step(cache, batch, q, kv, return_lse=return_lse)
    times.ran_at = time.monotonic()
    return outcome


def num_read_tokens(spec: ModelSpec, batch: RaggedBatch) -> int:
    """Return the cached tokens that attention over a batch reads, each entry's counted once.

    Of a layer with a window those that none of the entry's queries attends to are left out. A kernel that reads whole
    tiles, or reads a prompt's cache once for each tile of its queries, reads more.
    """
    kv_lens: list[int] = batch.kv_lens.tolist()
    if spec.window.count(0) == spec.num_layers:
        return sum(kv_lens)
    starts = batch.token_starts.tolist()
    windows = [spec.window[layer] for layer in batch.layers.tolist()]
    return sum(
        min(kv_len, window + end - start - 1) if window else kv_len
        for kv_len, window, start, end in zip(kv_lens, windows, starts, starts[1:], strict=False)
    )


def settle(entries: Sequence[LaunchEntry], outcome: StepOutput, now: float) -> int:
    """Confirm or refuse every entry, and renew the leases of their sessions; return the tokens stored by it."""
    num_stored = 0
    for entry, code in zip(entries, outcome.offences.tolist(), strict=True):
        num_stored += entry.settle(Offence.unpack(code), now)
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
    num_entries = len(entries)
    # The layer and position of a refused entry, and the position of one that is not causal, may be out of range.
    layers = [entry.layer if entry.admission.kv_len else 0 for entry in entries]
    start_pos = [
        entry.start_pos if entry.admission.kv_len and entry.is_causal else 0 for entry in entries
    ]
    kv_lens = [entry.admission.kv_len for entry in entries]
    token_starts = list(accumulate([entry.num_tokens for entry in entries], initial=0))
    is_append = [entry.admission.is_append for entry in entries]
    tables = [_block_table(entry, block_size) for entry in entries]
    map_rows = _map_tokens if token_starts[-1] == num_entries else map_slots
    # One array and views of it: for a few entries it is making arrays that takes the time.
    numbers = np.array([*layers, *start_pos, *kv_lens, *token_starts], np.int32)
    return RaggedBatch(
        layers=numbers[:num_entries],
        start_pos=numbers[num_entries : 2 * num_entries],
        token_starts=numbers[3 * num_entries :],
        kv_lens=numbers[2 * num_entries : 3 * num_entries],
        is_causal=np.array([entry.is_causal for entry in entries], np.bool_),
        block_tables=pad_block_tables(tables),
        slot_mapping=map_rows(tables, start_pos, token_starts, is_append, block_size),
    )


def pad_block_tables(tables: Sequence[array[int]]) -> NDArray[np.int32]:
    """Return [num_entries, max_num_blocks] int32 block ids, padded with -1; read-only."""
    width = max(map(len, tables), default=0)
    num_bytes = width * np.dtype(np.int32).itemsize
    rows = b"".join([table.tobytes().ljust(num_bytes, _NO_BLOCK_BYTE) for table in tables])
    return np.frombuffer(rows, np.int32).reshape(len(tables), width)


def _map_tokens(
    tables: Sequence[array[int]],
    start_pos: Sequence[int],
    _token_starts: Sequence[int],
    is_append: Sequence[bool],
    block_size: int,
) -> NDArray[np.int64]:
    """Return `map_slots` of entries of one token each, for which lists are faster than arrays."""
    slots = [
        table[position // block_size] * block_size + position % block_size if stores else NO_SLOT
        for table, position, stores in zip(tables, start_pos, is_append, strict=True)
    ]
    return np.array(slots, np.int64)


def map_slots(
    tables: Sequence[array[int]],
    start_pos: Sequence[int],
    token_starts: Sequence[int],
    is_append: Sequence[bool],
    block_size: int,
) -> NDArray[np.int64]:
    """Return [total_tokens] int64 slots, `block_id * block_size + offset`, -1 for entries that store nothing."""
    slots = np.full(token_starts[-1], NO_SLOT, np.int64)
    for entry_idx, stores in enumerate(is_append):
        if stores:
            first_row, end_row = token_starts[entry_idx : entry_idx + 2]
            start = start_pos[entry_idx]
            positions = np.arange(start, start + end_row - first_row)
            block_ids = np.array(tables[entry_idx], np.int64)[positions // block_size]
            slots[first_row:end_row] = block_ids * block_size + positions % block_size
    return slots


def _joined(tensors: Sequence[HostArray | None]) -> HostArray | None:
    """Join the steps' tensors on the token axis; all have it or none does. That of one step is not copied."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) <= 1:
        return given[0] if given else None
    return np.concatenate(given)


def _block_table(entry: LaunchEntry, block_size: int) -> array[int]:
    """Return the blocks that the entry's tokens are in, without those that are only reserved."""
    if entry.session is None or entry.error:
        return _NO_TABLE
    table = entry.session.block_table
    num_blocks = -(-entry.admission.kv_len // block_size)
    return table if len(table) == num_blocks else table[:num_blocks]


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
