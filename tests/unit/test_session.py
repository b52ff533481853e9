"""A session: positions, replays, reservation and truncation, with exact block ids on a pool of 10 blocks."""

from collections.abc import Callable

import pytest

from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.model import ModelSpec
from octavo_server.session import Admission, AppendRecord, Session
from tests.unit.conftest import make_session, make_spec

SpecOf = Callable[..., ModelSpec]


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(10)


@pytest.fixture
def session(pool: BlockPool, spec_of: SpecOf) -> Session:
    return make_session(spec_of(), pool)


def append(
    session: Session, layer: int, start_pos: int, num_tokens: int, key: int = 7
) -> Admission:
    """Admit and confirm."""
    admission = session.admit_append(layer, AppendRecord(start_pos, num_tokens, key))
    if admission.is_append:
        session.confirm(layer)
    return admission


def refusal(
    session: Session, layer: int, start_pos: int, num_tokens: int, key: int = 7
) -> OctavoError:
    with pytest.raises(OctavoError) as refused:
        session.admit_append(layer, AppendRecord(start_pos, num_tokens, key))
    return refused.value


def test_layers_share_one_block_table(session: Session, pool: BlockPool) -> None:
    append(session, 0, 0, 17)
    assert list(session.block_table) == [0, 1]
    append(session, 1, 0, 33)
    assert list(session.block_table) == [0, 1, 2]
    assert session.lengths == [17, 33]
    assert pool.num_free == 7


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_blocks_are_reserved_as_tokens_need_them(
    session: Session, num_tokens: int, num_blocks: int
) -> None:
    append(session, 0, 0, num_tokens)
    assert len(session.block_table) == num_blocks


def test_the_length_moves_when_the_append_is_confirmed(session: Session, pool: BlockPool) -> None:
    admission = session.admit_append(0, AppendRecord(0, 20, 7))
    assert admission == Admission(kv_len=20, is_append=True)
    assert session.lengths == [0, 0]
    assert pool.num_free == 8
    session.confirm(0)
    assert session.lengths == [20, 0]


def test_a_refused_append_gives_its_blocks_back(session: Session, pool: BlockPool) -> None:
    append(session, 0, 0, 16)
    session.admit_append(0, AppendRecord(16, 40, 7))
    assert pool.num_free == 6
    session.refuse(0)
    assert session.lengths == [16, 0]
    assert list(session.block_table) == [0]
    assert pool.num_free == 9


def test_a_refused_append_leaves_what_another_layer_has_reserved(
    session: Session, pool: BlockPool
) -> None:
    session.admit_append(0, AppendRecord(0, 64, 7))
    session.admit_append(1, AppendRecord(0, 32, 7))
    session.refuse(0)
    assert list(session.block_table) == [0, 1]
    session.confirm(1)
    assert session.lengths == [0, 32]


@pytest.mark.parametrize("start_pos", [0, 4, 6, 100])
def test_only_the_length_is_a_position_to_append_at(session: Session, start_pos: int) -> None:
    append(session, 1, 0, 5, key=7)
    error = refusal(session, 1, start_pos, 5, key=8)
    assert error.reason is Reason.POSITION_MISMATCH
    assert error.metadata == {"start_pos": str(start_pos), "length": "5", "layer": "1"}


def test_the_last_append_replays_without_growth(session: Session, pool: BlockPool) -> None:
    append(session, 0, 0, 5, key=7)
    append(session, 0, 5, 20, key=8)
    assert append(session, 0, 5, 20, key=8) == Admission(kv_len=25)
    assert session.lengths == [25, 0]
    assert pool.num_free == 8


@pytest.mark.parametrize(
    ("start_pos", "num_tokens", "key"), [(0, 5, 7), (5, 20, 9), (5, 19, 8), (4, 20, 8)]
)
def test_anything_but_all_of_the_last_append_is_no_replay(
    session: Session, start_pos: int, num_tokens: int, key: int
) -> None:
    append(session, 0, 0, 5, key=7)
    append(session, 0, 5, 20, key=8)
    assert refusal(session, 0, start_pos, num_tokens, key).reason is Reason.POSITION_MISMATCH


def test_a_step_without_a_key_is_never_a_replay(session: Session) -> None:
    append(session, 0, 0, 5, key=0)
    assert refusal(session, 0, 0, 5, key=0).reason is Reason.POSITION_MISMATCH


def test_a_context_over_the_models_limit_is_refused(session: Session, pool: BlockPool) -> None:
    error = refusal(session, 0, 0, 97)
    assert error.reason is Reason.CONTEXT_TOO_LONG
    assert error.metadata == {"max_context": "96", "requested": "97"}
    assert pool.num_free == 10
    append(session, 0, 0, 96)


def test_a_context_over_the_whole_pool_is_too_long_and_not_out_of_blocks(spec_of: SpecOf) -> None:
    session = make_session(spec_of(max_context=4096), BlockPool(2))
    assert refusal(session, 0, 0, 33).metadata == {"max_context": "32", "requested": "33"}


def test_reservation_is_all_or_nothing(session: Session, pool: BlockPool, spec_of: SpecOf) -> None:
    other = make_session(spec_of(max_context=160), pool, handle=2)
    append(other, 0, 0, 128)
    error = refusal(session, 0, 0, 33)
    assert error.reason is Reason.OUT_OF_BLOCKS
    assert error.metadata == {"required_blocks": "3", "free_blocks": "2"}
    assert list(session.block_table) == []
    assert pool.num_free == 2


def test_a_layer_must_exist(session: Session) -> None:
    error = refusal(session, 2, 0, 1)
    assert error.reason is Reason.LAYER_NOT_FOUND
    assert error.metadata == {"layer": "2", "num_layers": "2"}


def test_attending_sees_what_is_stored(session: Session) -> None:
    append(session, 0, 0, 20)
    assert session.admit_attend(0, 3, 2, is_causal=True) == Admission(kv_len=5)
    assert session.admit_attend(0, 19, 1, is_causal=True) == Admission(kv_len=20)
    assert session.admit_attend(0, 999, 2, is_causal=False) == Admission(kv_len=20)


@pytest.mark.parametrize(
    ("layer", "start_pos", "is_causal"), [(0, 20, True), (1, 0, True), (1, 0, False)]
)
def test_attending_past_the_end_or_on_nothing_is_refused(
    session: Session, layer: int, start_pos: int, is_causal: bool
) -> None:
    append(session, 0, 0, 20)
    with pytest.raises(OctavoError) as refused:
        session.admit_attend(layer, start_pos, 1, is_causal=is_causal)
    assert refused.value.reason is Reason.POSITION_MISMATCH


def test_full_attention_is_refused_on_a_layer_with_a_window(spec_of: SpecOf) -> None:
    session = make_session(spec_of(window=(8, 0)), BlockPool(10))
    append(session, 0, 0, 20)
    append(session, 1, 0, 20)
    with pytest.raises(OctavoError) as refused:
        session.admit_attend(0, 0, 1, is_causal=False)
    assert refused.value.reason is Reason.SHAPE_MISMATCH
    assert session.admit_attend(1, 0, 1, is_causal=False) == Admission(kv_len=20)


def test_truncate_cuts_every_layer_and_frees_blocks(session: Session, pool: BlockPool) -> None:
    append(session, 0, 0, 40)
    append(session, 1, 0, 10)
    session.truncate(20, expected_lengths=[40, 10])
    assert session.lengths == [20, 10]
    assert list(session.block_table) == [0, 1]
    assert pool.allocate(1) == [2]


def test_truncate_forgets_the_last_appends(session: Session) -> None:
    append(session, 0, 0, 40, key=7)
    session.truncate(40)
    assert session.lengths == [40, 0]
    assert refusal(session, 0, 0, 40, key=7).reason is Reason.POSITION_MISMATCH


@pytest.mark.parametrize(
    ("expected", "reason"),
    [([40, 11], Reason.POSITION_MISMATCH), ([40], Reason.SHAPE_MISMATCH)],
)
def test_a_wrong_guard_refuses_the_truncate(
    session: Session, expected: list[int], reason: Reason
) -> None:
    append(session, 0, 0, 40)
    append(session, 1, 0, 10)
    with pytest.raises(OctavoError) as refused:
        session.truncate(0, expected)
    assert refused.value.reason is reason
    assert session.lengths == [40, 10]


def test_close_frees_everything_and_takes_nothing_more(session: Session, pool: BlockPool) -> None:
    append(session, 0, 0, 40)
    assert session.close() == 3
    assert pool.num_free == 10
    assert refusal(session, 0, 40, 1).reason is Reason.SESSION_NOT_FOUND


def share_blocks(session: Session, pool: BlockPool, spec: ModelSpec) -> Session:
    """Return a session that holds the same tokens in the same blocks."""
    twin = make_session(spec, pool, handle=2)
    pool.share(session.block_table)
    twin.block_table = session.block_table[:]
    twin.lengths = session.lengths[:]
    return twin


def test_a_shared_block_is_copied_before_it_is_written(
    session: Session, pool: BlockPool, spec_of: SpecOf
) -> None:
    append(session, 0, 0, 20)
    twin = share_blocks(session, pool, spec_of())
    admission = append(twin, 0, 20, 20)
    assert admission.copies == ((1, 3),)
    assert list(twin.block_table) == [0, 3, 2]
    assert list(session.block_table) == [0, 1]
    assert [pool.ref_count(block_id) for block_id in range(4)] == [2, 1, 1, 1]
    assert append(session, 0, 20, 1).copies == ()


def test_copying_counts_in_the_reservation(
    session: Session, pool: BlockPool, spec_of: SpecOf
) -> None:
    append(session, 0, 0, 20)
    twin = share_blocks(session, pool, spec_of())
    pool.allocate(7)
    assert refusal(twin, 0, 20, 20).metadata == {"required_blocks": "2", "free_blocks": "1"}
    assert list(twin.block_table) == [0, 1]
    assert append(twin, 0, 20, 4).copies == ((1, 9),)


def test_a_reservation_is_taken_at_once_and_kept_until_the_close(pool: BlockPool) -> None:
    session = make_session(make_spec(), pool, reserve_tokens=40)
    session.reserve()
    assert (session.block_table.tolist(), pool.num_free) == ([0, 1, 2], 7)
    append(session, 0, 0, 17)
    assert session.state(0.0).num_blocks == 3
    append(session, 0, 17, 40)
    assert pool.num_free == 6
    session.truncate(0)
    assert (session.block_table.tolist(), pool.num_free) == ([0, 1, 2], 7)
    assert session.close() == 3


def test_a_reserved_session_never_runs_out_of_blocks(pool: BlockPool) -> None:
    session = make_session(make_spec(), pool, reserve_tokens=96)
    session.reserve()
    pool.allocate(pool.num_free)
    for start in range(0, 96, 8):
        append(session, 0, start, 8)
    assert session.lengths == [96, 0]


def test_its_lease_counts_from_its_last_use(pool: BlockPool) -> None:
    session = make_session(make_spec(), pool, lease_s=10)
    session.used_at = 5
    assert session.lease_ends_at == 15
    assert session.state(12).lease_remaining_s == 3
    assert session.state(99).lease_remaining_s == 0


def test_an_expired_session_says_so(pool: BlockPool) -> None:
    session = make_session(make_spec(), pool, lease_s=10)
    session.has_expired = True
    session.close()
    with pytest.raises(OctavoError, match="10000 ms without use") as refused:
        session.admit_append(0, AppendRecord(0, 1, 7))
    assert refused.value.reason is Reason.SESSION_EXPIRED
