"""A session: one sequence's lengths per layer, its block table, and the rules that make a retry safe."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo_server import errors
from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.model import ModelSpec
from octavo_server.tenant import Tenant

_APPEND_ADVICE = "go on from its length, or truncate first; only its last append can be replayed"
_GUARD_ADVICE = "expected_lengths is out of date, ask for the session's lengths again"


class AppendRecord(NamedTuple):
    """What a layer remembers of its last append; a step that repeats all of it is a replay."""

    start_pos: int
    num_tokens: int
    step_key: int


class Admission(NamedTuple):
    """What an admitted entry may do.

    Attributes:
        kv_len: Tokens of the layer that its queries see, what it appends included.
        is_append: Whether its rows are to be stored; the entry must then be confirmed or refused.
        copies: (source, target) block ids to copy in every layer before anything is stored.
    """

    kv_len: int
    is_append: bool = False
    copies: tuple[tuple[int, int], ...] = ()


class SessionOptions(NamedTuple):
    """What the client that opened a session asked for.

    Attributes:
        lease_s: Seconds without use after which it is closed.
        closes_on_disconnect: Whether it is closed when the stream that last carried a step of it ends.
        reserve_tokens: Tokens whose blocks it holds whatever its length.
    """

    lease_s: float
    closes_on_disconnect: bool = False
    reserve_tokens: int = 0

    @property
    def lease_ms(self) -> int:
        """The lease in milliseconds."""
        return round(self.lease_s * 1000)


class SessionState(NamedTuple):
    """A session at one moment.

    Attributes:
        session_id: Name for people.
        handle: Name on the wire's data calls.
        model: Name of its model.
        lengths: [num_layers] tokens.
        num_blocks: Blocks that it holds.
        options: As it was opened.
        lease_remaining_s: What is left of its lease.
    """

    session_id: str
    handle: int
    model: str
    lengths: tuple[int, ...]
    num_blocks: int
    options: SessionOptions
    lease_remaining_s: float


@dataclass(slots=True, eq=False)
class Session:
    """The cached tokens of one sequence.

    One block table serves all layers. Blocks are reserved when an append is admitted; a layer's length moves when the
    append is confirmed. Nothing here knows about tensors or threads, and time is the caller's.

    Attributes:
        session_id: Name for people.
        handle: Name on the wire's data calls, never 0.
        spec: The model.
        pool: The model's block pool.
        tenant: Whose it is.
        options: As it was opened.
        used_at: When it was last used; its lease counts from there.
        lengths: [num_layers] confirmed tokens.
        block_table: Logical to physical block ids.
        is_closed: Whether the session was closed; its blocks are gone then.
        has_expired: Whether that was because its lease ended.
        connection: The stream that last carried a step of it, where that decides when it is closed.
        max_tokens: Most tokens that it can ever hold.
        num_truncates: Times that it was truncated: tokens below its lengths are the same for as long as this is.
    """

    session_id: str
    handle: int
    spec: ModelSpec
    pool: BlockPool
    tenant: Tenant
    options: SessionOptions
    used_at: float = 0.0
    lengths: list[int] = field(init=False)
    block_table: array[int] = field(default_factory=lambda: array("i"))
    is_closed: bool = False
    has_expired: bool = False
    connection: Hashable = None
    max_tokens: int = field(init=False)
    num_truncates: int = 0
    _last_appends: list[AppendRecord | None] = field(init=False)
    _pending: dict[int, AppendRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = [0] * self.spec.num_layers
        self._last_appends = [None] * self.spec.num_layers
        self.max_tokens = min(self.spec.max_context, self.pool.num_blocks * self.spec.block_size)

    @property
    def lease_ends_at(self) -> float:
        """When its lease ends, unless it is used before."""
        return self.used_at + self.options.lease_s

    def state(self, now: float) -> SessionState:
        """Return the session as it is now."""
        return SessionState(
            self.session_id,
            self.handle,
            self.spec.name,
            tuple(self.lengths),
            len(self.block_table),
            self.options,
            max(self.lease_ends_at - now, 0.0),
        )

    def reserve(self) -> None:
        """Take the blocks of a new session's first `reserve_tokens` tokens.

        Raises:
            OctavoError: CONTEXT_TOO_LONG, TENANT_LIMIT or OUT_OF_BLOCKS; nothing changed.
        """
        num_tokens = self.options.reserve_tokens
        if num_tokens > self.max_tokens:
            raise _context_too_long(self.max_tokens, num_tokens)
        self.block_table.extend(self._take_blocks(self._num_blocks_for(num_tokens)))

    @property
    def last_appends(self) -> tuple[AppendRecord | None, ...]:
        """[num_layers] what can be replayed."""
        return tuple(self._last_appends)

    def load(self, lengths: Sequence[int], last_appends: Sequence[AppendRecord | None]) -> None:
        """Make a new session one that holds tokens already; the caller stores them.

        Raises:
            OctavoError: CONTEXT_TOO_LONG, TENANT_LIMIT or OUT_OF_BLOCKS; nothing changed.
        """
        num_tokens = max(lengths)
        if num_tokens > self.max_tokens:
            raise _context_too_long(self.max_tokens, num_tokens)
        num_missing = self._num_blocks_for(num_tokens) - len(self.block_table)
        self.block_table.extend(self._take_blocks(max(num_missing, 0)))
        self.lengths, self._last_appends = list(lengths), list(last_appends)

    def admit_append(self, layer: int, record: AppendRecord) -> Admission:
        """Admit an entry with K and V: an append, for which blocks are reserved, or a replay.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED, LAYER_NOT_FOUND, POSITION_MISMATCH, CONTEXT_TOO_LONG,
                TENANT_LIMIT or OUT_OF_BLOCKS; nothing changed.
        """
        length = self._checked_length(layer)
        if record.start_pos != length:
            if record.step_key == 0 or record != self._last_appends[layer]:
                raise errors.position_mismatch(layer, record.start_pos, length, _APPEND_ADVICE)
            return Admission(kv_len=length)
        end = record.start_pos + record.num_tokens
        if end > self.max_tokens:
            raise _context_too_long(self.max_tokens, end)
        copies = self._reserve(record.start_pos, end)
        self._pending[layer] = record
        return Admission(end, is_append=True, copies=copies)

    def admit_attend(
        self, layer: int, start_pos: int, num_tokens: int, *, is_causal: bool
    ) -> Admission:
        """Admit an entry without K and V, which only reads.

        Raises:
            OctavoError: SESSION_NOT_FOUND, SESSION_EXPIRED, LAYER_NOT_FOUND, SHAPE_MISMATCH (not causal on a layer with
                a window) or POSITION_MISMATCH (an empty cache, or a causal entry that ends past it).
        """
        length = self._checked_length(layer)
        if not is_causal and self.spec.window[layer]:
            expected = f"true on layer {layer}, which has a window"
            raise errors.mismatch(Reason.SHAPE_MISMATCH, "causal", expected, "false")
        end = start_pos + num_tokens if is_causal else length
        if length == 0 or end > length:
            advice = f"{num_tokens} tokens without k and v must lie within what is cached"
            raise errors.position_mismatch(layer, start_pos, length, advice)
        return Admission(end)

    def confirm(self, layer: int) -> None:
        """Make the admitted append of a layer visible."""
        record = self._pending.pop(layer)
        self.lengths[layer] = record.start_pos + record.num_tokens
        self._last_appends[layer] = record

    def refuse(self, layer: int) -> None:
        """Undo the admitted append of a layer: its length stays, blocks reserved for it alone are freed."""
        del self._pending[layer]
        self._trim()

    def truncate(self, length: int, expected_lengths: Sequence[int] = ()) -> None:
        """Set every layer to min(its length, `length`), free what is left behind, forget the last appends.

        Raises:
            OctavoError: POSITION_MISMATCH when `expected_lengths` is given and a layer's length differs;
                SHAPE_MISMATCH when it is not one value a layer; nothing changed.
        """
        self._check_lengths(expected_lengths)
        self.lengths = [min(old, length) for old in self.lengths]
        self._last_appends = [None] * self.spec.num_layers
        self.num_truncates += 1
        self._trim()

    def close(self) -> int:
        """Give all blocks back; the session takes no further entry.

        Returns:
            Blocks that became free.
        """
        self._count_blocks(-len(self.block_table))
        num_freed = self.pool.free(self.block_table)
        self.block_table = array("i")
        self.is_closed = True
        return num_freed

    def gone(self) -> OctavoError:
        """Return the refusal of what comes after it was closed."""
        if self.has_expired:
            return errors.session_expired(self.session_id, self.options.lease_ms)
        return errors.session_not_found(self.session_id)

    def _checked_length(self, layer: int) -> int:
        if self.is_closed:
            raise self.gone()
        if layer >= self.spec.num_layers:
            message = f"layer must be below {self.spec.num_layers}, got {layer}"
            raise OctavoError(
                Reason.LAYER_NOT_FOUND, message, layer=layer, num_layers=self.spec.num_layers
            )
        return self.lengths[layer]

    def _check_lengths(self, expected: Sequence[int]) -> None:
        if not expected:
            return
        if len(expected) != len(self.lengths):
            raise errors.mismatch(
                Reason.SHAPE_MISMATCH, "expected_lengths", [len(self.lengths)], [len(expected)]
            )
        for layer, (length, believed) in enumerate(zip(self.lengths, expected, strict=True)):
            if length != believed:
                raise errors.position_mismatch(layer, believed, length, _GUARD_ADVICE)

    def _reserve(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Make [start, end) writable, all or nothing; return the blocks to copy because another session reads them."""
        first, last = start // self.spec.block_size, self._num_blocks_for(end)
        is_inside = last == first + 1 <= len(self.block_table)
        if is_inside and not self.pool.is_shared(self.block_table[first]):
            return ()  # as with most tokens of a decode
        shared = [
            idx
            for idx in range(first, min(last, len(self.block_table)))
            if self.pool.is_shared(self.block_table[idx])
        ]
        num_new = max(0, last - len(self.block_table))
        block_ids = self._take_blocks(num_new, len(shared))
        copies = []
        for idx in shared:
            source, target = self.block_table[idx], block_ids.pop()
            self.pool.free([source])
            self.block_table[idx] = target
            copies.append((source, target))
        self.block_table.extend(block_ids)
        return tuple(copies)

    def _trim(self) -> None:
        """Free the blocks past everything that is stored or admitted."""
        ends = [record.start_pos + record.num_tokens for record in self._pending.values()]
        num_needed = self._num_blocks_for(max(*self.lengths, self.options.reserve_tokens, *ends))
        left_over = self.block_table[num_needed:]
        self._count_blocks(-len(left_over))
        self.pool.free(reversed(left_over))
        del self.block_table[num_needed:]

    def _take_blocks(self, num_new: int, num_copies: int = 0) -> list[int]:
        """Take blocks that make the table longer, and blocks that replace shared ones; all or none."""
        size, num_bytes = self.spec.block_size, self.spec.block_bytes
        self.tenant.check_blocks(num_new, size, num_bytes)
        block_ids = self.pool.allocate(num_new + num_copies)
        self._count_blocks(num_new)
        return block_ids

    def _count_blocks(self, num_blocks: int) -> None:
        self.tenant.add_blocks(num_blocks, self.spec.block_size, self.spec.block_bytes)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.spec.block_size)


def _context_too_long(max_tokens: int, requested: int) -> OctavoError:
    message = (
        f"a session of this model holds at most {max_tokens} tokens, got {requested}; "
        "truncate it, or raise max_context and the pool's size in the server's config"
    )
    return OctavoError(
        Reason.CONTEXT_TOO_LONG, message, max_context=max_tokens, requested=requested
    )
