"""Invariants of pools and sessions under any sequence of operations, against a model that copies everything.

The machine keeps, beside the real pool, what every slot of every layer holds, and for every session a plain list of
tokens per layer. After each step the lists must be readable through the block tables, and every block must be free or
counted once per holder.
"""

import copy
from collections import Counter
from contextlib import suppress
from itertools import count

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.session import Admission, AppendRecord, Session
from tests.unit.conftest import make_session, make_spec

NUM_BLOCKS = 10
SPEC = make_spec(max_context=96)
LAYERS = st.integers(0, SPEC.num_layers - 1)


class Twin:
    """A session and what it must hold: the tokens of each layer."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: list[list[int]] = [[] for _ in range(SPEC.num_layers)]


class CacheMachine(RuleBasedStateMachine):
    """Opens, appends, replays, refuses, shares, truncates and closes in any order."""

    twins = Bundle("twins")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.open: list[Twin] = []
        self.slots: list[dict[int, int]] = [{} for _ in range(SPEC.num_layers)]
        self.drawn = count(1)

    @rule(target=twins)
    def open_session(self) -> Twin:
        twin = Twin(make_session(SPEC, self.pool, handle=next(self.drawn)))
        self.open.append(twin)
        return twin

    @rule(twin=twins, layer=LAYERS, num_tokens=st.integers(1, 60), is_refused=st.booleans())
    def append(self, twin: Twin, layer: int, num_tokens: int, is_refused: bool) -> None:
        """Append where the length is; half of the time the device refuses what was admitted."""
        before = (twin.session.block_table[:], self.pool.num_free)
        if not self._store(twin, layer, num_tokens):
            assert before == (twin.session.block_table, self.pool.num_free)
            return
        if is_refused:
            twin.session.refuse(layer)
            return
        twin.session.confirm(layer)
        twin.tokens[layer] += self.written

    @rule(twin=twins, num_tokens=st.tuples(st.integers(1, 60), st.integers(1, 60)), first=LAYERS)
    def append_two_layers_at_once(
        self, twin: Twin, num_tokens: tuple[int, int], first: int
    ) -> None:
        """Two entries of one launch: the first is refused by the device after both were admitted."""
        second = 1 - first
        if not self._store(twin, first, num_tokens[0]):
            return
        if not self._store(twin, second, num_tokens[1]):
            twin.session.refuse(first)
            return
        written = self.written
        twin.session.refuse(first)
        twin.session.confirm(second)
        twin.tokens[second] += written

    @rule(twin=twins, layer=LAYERS, key=st.integers(1, 2**64 - 1), num_tokens=st.integers(1, 20))
    def replay(self, twin: Twin, layer: int, key: int, num_tokens: int) -> None:
        """A replay changes nothing; the same position under another key is refused."""
        start_pos = twin.session.lengths[layer]
        if not self._store(twin, layer, num_tokens, key):
            return
        twin.session.confirm(layer)
        twin.tokens[layer] += self.written
        before = (twin.session.block_table[:], self.pool.num_free)
        admission = twin.session.admit_append(layer, AppendRecord(start_pos, num_tokens, key))
        assert not admission.is_append
        assert admission.kv_len == twin.session.lengths[layer]
        with pytest.raises(OctavoError) as refused:
            twin.session.admit_append(layer, AppendRecord(start_pos, num_tokens, key ^ 1))
        assert refused.value.reason is Reason.POSITION_MISMATCH
        assert before == (twin.session.block_table, self.pool.num_free)

    @rule(twin=twins, length=st.integers(0, 100))
    def truncate(self, twin: Twin, length: int) -> None:
        twin.session.truncate(length)
        twin.tokens = [tokens[:length] for tokens in twin.tokens]

    @rule(target=twins, twin=twins)
    def share(self, twin: Twin) -> Twin:
        """A second session on the same blocks, as a fork will make it."""
        session = make_session(SPEC, self.pool, handle=next(self.drawn))
        self.pool.share(twin.session.block_table)
        session.block_table = twin.session.block_table[:]
        session.lengths = twin.session.lengths[:]
        forked = Twin(session)
        forked.tokens = copy.deepcopy(twin.tokens)
        self.open.append(forked)
        return forked

    @rule(target=twins, twin=consumes(twins))
    def close(self, twin: Twin) -> object:
        twin.session.close()
        self.open.remove(twin)
        return multiple()

    @invariant()
    def every_block_is_free_or_counted_once_a_holder(self) -> None:
        holders = Counter(block for twin in self.open for block in twin.session.block_table)
        for block_id in range(NUM_BLOCKS):
            assert self.pool.ref_count(block_id) == holders[block_id]
        assert self.pool.num_free + len(holders) == NUM_BLOCKS

    @invariant()
    def sessions_hold_the_blocks_of_their_tokens_and_no_more(self) -> None:
        for twin in self.open:
            longest = max(map(len, twin.tokens))
            assert len(twin.session.block_table) == -(-longest // SPEC.block_size)

    @invariant()
    def every_token_is_where_the_block_table_says(self) -> None:
        for twin in self.open:
            assert twin.session.lengths == [len(tokens) for tokens in twin.tokens]
            for layer, tokens in enumerate(twin.tokens):
                found = [self.slots[layer][self._slot(twin, pos)] for pos in range(len(tokens))]
                assert found == tokens

    def _store(self, twin: Twin, layer: int, num_tokens: int, key: int = 0) -> bool:
        """Admit an append and write its tokens, as a launch does before its outcome is known.

        Returns:
            Whether it was admitted; it is refused only for want of room.
        """
        start_pos = twin.session.lengths[layer]
        record = AppendRecord(start_pos, num_tokens, key)
        with suppress(OctavoError):
            admission = twin.session.admit_append(layer, record)
            self._write(twin, layer, record, admission)
            return True
        has_room = self.pool.num_free >= -(-num_tokens // SPEC.block_size) + 1
        assert not has_room or start_pos + num_tokens > SPEC.max_context
        return False

    def _write(self, twin: Twin, layer: int, record: AppendRecord, admission: Admission) -> None:
        for source, target in admission.copies:
            self._copy_block(source, target)
        self.written = [next(self.drawn) for _ in range(record.num_tokens)]
        for offset, token in enumerate(self.written):
            self.slots[layer][self._slot(twin, record.start_pos + offset)] = token

    def _copy_block(self, source: int, target: int) -> None:
        size = SPEC.block_size
        for slots in self.slots:
            for offset in range(size):
                if source * size + offset in slots:
                    slots[target * size + offset] = slots[source * size + offset]

    def _slot(self, twin: Twin, pos: int) -> int:
        block_id = twin.session.block_table[pos // SPEC.block_size]
        return block_id * SPEC.block_size + pos % SPEC.block_size


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase
