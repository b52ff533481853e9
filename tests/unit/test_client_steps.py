"""Steps checked, placed and read without a connection; the mirror of a session's lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import octavo_client as oc
from octavo.v1 import octavo_pb2 as pb
from octavo_client._encoding import result_of
from octavo_client._exchange import Exchange, Job
from octavo_client._mirror import Mirror
from octavo_client._steps import Draft, Placement, draft_step
from tests.unit.client_fakes import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, mirror, status

MISMATCH = oc.PositionMismatch("POSITION_MISMATCH", "no", metadata={"length": "4"})
OUT_OF_BLOCKS = oc.OutOfBlocks("OUT_OF_BLOCKS", "no")
LOST = oc.ConnectionLost("gone", may_be_applied=True)


def rows(num_tokens: int, num_heads: int, dtype: Any = np.float16) -> Any:
    return np.arange(num_tokens * num_heads * HEAD_DIM, dtype=dtype).reshape(
        -1, num_heads, HEAD_DIM
    )


def tensors(num_tokens: int, *, has_kv: bool = True) -> tuple[Any, Any, Any]:
    k = rows(num_tokens, NUM_KV_HEADS) if has_kv else None
    return rows(num_tokens, NUM_Q_HEADS), k, k


def draft(
    *entries: tuple[Mirror, int, int, int | None], arrays: Any = None, **options: Any
) -> Draft:
    placements = [Placement(*entry) for entry in entries]
    num_tokens = sum(placement.num_tokens for placement in placements)
    return draft_step(
        placements,
        arrays or tensors(num_tokens),
        options,  # type: ignore[arg-type]
        default_timeout_s=30.0,
        max_message_bytes=options.pop("max_message_bytes", 1 << 20),
    )


def message_of(placed: Draft) -> pb.Step:
    return pb.DecodeRequest.FromString(placed.encode(step_id=1, timeout_ms=1)).step


def start_of(step: Draft) -> list[int]:
    step.place()
    return list(message_of(step).start_pos)


def test_a_message_says_all_of_its_step() -> None:
    first, second = mirror(3, 5), mirror(8, 8, handle=12)
    placed = draft(
        (first, 1, 2, None), (second, 0, 1, 7), return_lse=True, causal=True, stage_times=True
    )
    placed.place()
    step = message_of(placed)
    assert list(step.session_handles) == [11, 12]
    assert (list(step.layers), list(step.start_pos), list(step.num_tokens)) == (
        [1, 0],
        [5, 7],
        [2, 1],
    )
    assert list(step.q.shape) == [3, NUM_Q_HEADS, HEAD_DIM]
    assert step.v.data == rows(3, NUM_KV_HEADS).tobytes()
    assert step.return_lse
    assert step.return_stage_times
    assert step.step_key != 0
    assert not step.HasField("causal")
    assert placed.keys == [(11, 1), (12, 0)]
    assert (first.lengths, second.lengths) == ((3, 7), (8, 8))


def test_a_step_that_only_reads_moves_nothing() -> None:
    session = mirror(3, 5)
    placed = draft((session, 1, 2, None), arrays=tensors(2, has_kv=False))
    assert start_of(placed) == [3]
    assert (placed.has_kv, session.lengths) == (False, (3, 5))


def test_every_step_has_a_key_of_its_own() -> None:
    session = mirror(3, 5)
    keys = {
        message_of(draft((session, 1, 1, None), arrays=tensors(1, has_kv=has_kv))).step_key
        for has_kv in (False, True, False)
    }
    assert len(keys - {0}) == 3


def test_uncausal_queries_need_no_position() -> None:
    placed = draft((mirror(1, 0), 0, 4, None), arrays=tensors(4, has_kv=False), causal=False)
    assert start_of(placed) == [0]
    assert message_of(placed).HasField("causal")


def test_more_causal_queries_than_tokens_have_no_position() -> None:
    placed = draft((mirror(1, 0), 0, 4, None), arrays=tensors(4, has_kv=False))
    with pytest.raises(ValueError, match=r"4 causal queries .* has 1"):
        placed.place()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((2, 1, None), "layer must be from 0 to 1 in model 'tiny', got 2"),
        ((-1, 1, None), "layer must be from 0 to 1"),
        ((0, 0, None), "num_tokens must be 1 or more, got 0"),
        ((0, 1, -1), "start_pos must be 0 or more, got -1"),
        ((0, 1, 2**32 - 1), "start_pos must be at most 4294967294, got 4294967295"),
    ],
)
def test_entries_that_cannot_be(entry: tuple[int, int, int | None], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        draft((mirror(), *entry), arrays=tensors(1))


def test_an_empty_step_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one entry"):
        draft(arrays=tensors(1))


def test_two_entries_of_one_layer_cannot_be() -> None:
    session = mirror()
    with pytest.raises(ValueError, match="one entry per session and layer"):
        draft((session, 0, 1, None), (session, 0, 1, None))


@pytest.mark.parametrize(
    ("q", "k", "v", "expected"),
    [
        (rows(1, 3), None, None, r"q must be \[1, 4, 8\], got \[1, 3, 8\]"),
        (rows(2, 4), None, None, r"q must be \[1, 4, 8\], got \[2, 4, 8\]"),
        (rows(1, 4), rows(1, 4), rows(1, 2), r"k must be \[1, 2, 8\], got \[1, 4, 8\]"),
        (rows(1, 4), rows(1, 2), rows(2, 2), r"v must be \[1, 2, 8\], got \[2, 2, 8\]"),
        (rows(1, 4), rows(1, 2), None, "k and v must be given together"),
    ],
)
def test_arrays_that_cannot_be(q: Any, k: Any, v: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        draft((mirror(), 0, 1, None), arrays=(q, k, v))


def test_arrays_of_two_dtypes_cannot_be() -> None:
    arrays = rows(1, 4), rows(1, 2), rows(1, 2, np.float32)
    with pytest.raises(TypeError, match="v must be float16 like the others, got float32"):
        draft((mirror(), 0, 1, None), arrays=arrays)


def test_a_step_over_the_servers_limit_is_not_sent() -> None:
    with pytest.raises(oc.MessageTooLarge) as raised:
        draft((mirror(), 0, 9, None), max_message_bytes=1000)
    assert raised.value.limit_bytes == 1000


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_bounded(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be positive and finite"):
        draft((mirror(), 0, 1, None), timeout=timeout)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"casual": False}, "no option casual; it has causal, return_lse, stage_times, timeout"),
        ({"causal": None}, "causal must be True or False, got None"),
        ({"return_lse": 1}, "return_lse must be True or False, got 1"),
        ({"timeout": "3"}, "timeout must be a number of seconds, got '3'"),
    ],
)
def test_options_that_cannot_be(options: Any, expected: str) -> None:
    placements = [Placement(mirror(), 0, 1, None)]
    with pytest.raises(TypeError, match=expected):
        draft_step(
            placements, tensors(1), options, default_timeout_s=30.0, max_message_bytes=1 << 20
        )


def test_no_timeout_is_the_clients() -> None:
    assert draft((mirror(), 0, 1, None), timeout=None).timeout_s == 30.0


@pytest.mark.parametrize("seconds", [1e7, 1e308])
def test_a_long_timeout_fits_its_field(seconds: float) -> None:
    _, _, (message,) = in_exchange(draft((mirror(), 0, 1, None), timeout=seconds))
    assert pb.DecodeRequest.FromString(message).step.timeout_ms == 2**32 - 1


def test_a_closed_session_takes_no_step() -> None:
    session = mirror()
    session.is_closed = True
    with pytest.raises(oc.ClientClosed, match="was closed"):
        draft((session, 0, 1, None))


def answer_to(placed: Draft, **refusals: Any) -> pb.StepResult:
    result = pb.StepResult(out=message_of(placed).q)
    for entry_idx, refusal in refusals.items():
        result.entry_errors.add(entry_idx=int(entry_idx[1:]), error=refusal)
    return result


def test_an_answer_is_cut_by_entries() -> None:
    session, other = mirror(3, 5), mirror(8, 8, handle=12)
    placed = draft((session, 0, 2, None), (other, 0, 1, None), (session, 1, 3, None))
    placed.place()
    refusal = status("OUT_OF_BLOCKS", "RESOURCE_EXHAUSTED", free_blocks=1)
    batch = placed.read(result_of(answer_to(placed, e1=refusal)))
    assert batch.slices == (slice(0, 2), slice(2, 3), slice(3, 6))
    np.testing.assert_array_equal(batch[2].out, rows(6, NUM_Q_HEADS)[3:])
    assert len(batch) == 3
    with pytest.raises(oc.OutOfBlocks):
        batch[1]
    with pytest.raises(oc.OutOfBlocks):
        batch[-2]
    with pytest.raises(oc.OutOfBlocks):
        batch.raise_for_errors()
    assert (session.lengths, other.lengths) == ((5, 8), (8, 8))


def test_an_answer_that_makes_no_sense_is_an_error() -> None:
    placed = draft((mirror(), 0, 1, None))
    placed.place()
    with pytest.raises(oc.OctavoError, match="makes no sense"):
        placed.read(
            result_of(
                pb.StepResult(out=pb.Tensor(data=b"abc", dtype=pb.DATA_TYPE_FLOAT16, shape=[1]))
            )
        )


@pytest.mark.parametrize(
    ("error", "stored", "is_stale"),
    [(None, 7, False), (MISMATCH, 4, False), (OUT_OF_BLOCKS, 5, False), (LOST, 5, True)],
)
def test_the_mirror_follows_the_outcome(
    error: oc.OctavoError | None, stored: int, is_stale: bool
) -> None:
    session = mirror(5, 9)
    session.begin(0, 7)
    assert (session.lengths, session.stored) == ((7, 9), (5, 9))
    session.settle(0, 7, error)
    assert (session.lengths, session.is_stale) == ((stored, 9), is_stale)
    session.refresh((1, 2))
    assert (session.lengths, session.is_stale) == ((1, 2), False)


def test_the_mirror_holds_through_a_row_of_appends() -> None:
    session = mirror(5, 0)
    for end in (6, 7, 8):
        session.begin(0, end)
    session.settle(0, 6, OUT_OF_BLOCKS)
    assert session.length(0) == 8
    session.settle(0, 7, MISMATCH)
    session.settle(0, 8, MISMATCH)
    assert session.length(0) == 4


class Waiter:
    """Stands for a future."""

    def __init__(self) -> None:
        self.outcome: Any = None


def in_exchange(*placed: Draft) -> tuple[Exchange, list[int], list[bytes]]:
    exchange = Exchange()
    exchange.on_open(0.0)
    ids, sent = [], []
    for step in placed:
        step_id, messages = exchange.submit(Job(step, Waiter(), is_single=True), 0.0)
        ids.append(step_id)
        sent.extend(messages)
    return exchange, ids, sent


def test_a_step_may_queue_for_most_of_its_time_and_less_when_sent_again() -> None:
    exchange, (step_id,), (message,) = in_exchange(draft((mirror(), 0, 1, None), timeout=10.0))
    sent = pb.DecodeRequest.FromString(message).step
    assert (sent.step_id, sent.timeout_ms) == (step_id, 9000)
    exchange.on_broken()
    (again,) = exchange.on_open(5.0)
    step = pb.DecodeRequest.FromString(again).step
    assert (step.step_key, step.timeout_ms) == (sent.step_key, 4500)


def test_a_step_expires_with_its_fate() -> None:
    session = mirror()
    step = draft((session, 0, 1, None), timeout=1.0), draft((session, 0, 1, None), timeout=1.0)
    exchange, _, sent = in_exchange(*step)
    assert len(sent) == 1
    outcomes, to_send, _ = exchange.expire(1.0)
    fates = [(type(error), error.may_be_applied) for _, _, error in outcomes]  # type: ignore[union-attr]
    assert fates == [(oc.StepTimeout, True), (oc.StepTimeout, False)]
    assert (to_send, session.is_stale, len(exchange)) == ([], True, 0)


def test_a_step_that_expires_while_the_server_is_away_says_why() -> None:
    exchange, (step_id,), _ = in_exchange(draft((mirror(), 0, 1, None), timeout=1.0))
    away = oc.ConnectionLost("connection refused", may_be_applied=True)
    exchange.on_broken(away)
    (outcome,) = exchange.expire(1.0).outcomes
    assert outcome.error is not None
    assert outcome.error.__cause__ is away
    exchange.on_result(result_of(pb.StepResult(step_id=step_id)), 1.0)
    exchange.submit(Job(draft((mirror(), 0, 1, None), timeout=1.0), Waiter(), is_single=True), 1.0)
    (outcome,) = exchange.expire(2.0).outcomes
    assert outcome.error is not None
    assert outcome.error.__cause__ is None


def test_an_expiry_after_a_cut_leaves_the_fate_open() -> None:
    session = mirror()
    exchange, (step_id,), _ = in_exchange(draft((session, 0, 1, None)))
    exchange.on_broken()
    exchange.on_open(1.0)
    refusal = status("STEP_EXPIRED", "DEADLINE_EXCEEDED", timeout_ms=9)
    outcomes = exchange.on_result(
        result_of(pb.StepResult(step_id=step_id, error=refusal)), 2.0
    ).outcomes
    (error,) = [outcome.error for outcome in outcomes]
    assert isinstance(error, oc.StepTimeout)
    assert error.may_be_applied
    assert session.is_stale


def test_an_expiry_without_a_cut_is_the_servers_word() -> None:
    session = mirror()
    exchange, (step_id,), _ = in_exchange(draft((session, 0, 1, None)))
    refusal = status("STEP_EXPIRED", "DEADLINE_EXCEEDED", timeout_ms=9)
    outcomes = exchange.on_result(
        result_of(pb.StepResult(step_id=step_id, error=refusal)), 2.0
    ).outcomes
    (error,) = [outcome.error for outcome in outcomes]
    assert isinstance(error, oc.StepExpired)
    assert (error.timeout_ms, session.lengths, session.is_stale) == (9, (0, 0), False)


def test_a_full_queue_after_a_cut_leaves_the_fate_open() -> None:
    session = mirror()
    exchange, (step_id,), _ = in_exchange(draft((session, 0, 1, None)))
    exchange.on_broken()
    exchange.on_open(1.0)
    refusal = status("QUEUE_FULL", "RESOURCE_EXHAUSTED", 0.1, limit=2)
    outcomes = exchange.on_result(
        result_of(pb.StepResult(step_id=step_id, error=refusal)), 2.0
    ).outcomes
    (error,) = [outcome.error for outcome in outcomes]
    assert isinstance(error, oc.ConnectionLost)
    assert isinstance(error.__cause__, oc.QueueFull)
    assert error.may_be_applied
    assert session.is_stale


def test_a_full_queue_applies_nothing_and_says_when_to_come_back() -> None:
    session = mirror()
    exchange, (step_id,), _ = in_exchange(draft((session, 0, 1, None)))
    refusal = status("QUEUE_FULL", "RESOURCE_EXHAUSTED", 0.1, limit=2)
    outcomes = exchange.on_result(
        result_of(pb.StepResult(step_id=step_id, error=refusal)), 2.0
    ).outcomes
    (error,) = [outcome.error for outcome in outcomes]
    assert isinstance(error, oc.QueueFull)
    assert (error.limit, error.retry_after_s) == (2, 0.1)
    assert (session.lengths, session.is_stale) == ((0, 0), False)


def test_giving_up_releases_the_next() -> None:
    session = mirror()
    exchange, (first, _), sent = in_exchange(
        draft((session, 0, 1, None)), draft((session, 0, 1, None))
    )
    assert len(sent) == 1
    assert len(exchange.give_up(first, 1.0)) == 1
    assert exchange.give_up(first, 1.0) == []
    assert session.is_stale


def test_an_answer_that_breaks_the_client_fails_its_step() -> None:
    session = mirror()
    step = draft((session, 0, 1, None))
    exchange, (step_id,), _ = in_exchange(step)
    result = answer_to(step)
    result.step_id = step_id

    def fail(_array: Any) -> Any:
        raise RuntimeError("no memory")

    step.to_caller = fail
    (outcome,) = exchange.on_result(result_of(result), 1.0).outcomes
    assert isinstance(outcome.error, oc.InterruptedCall)
    assert outcome.error.may_be_applied
    assert session.lengths == (1, 0), "what the answer said is lost"
    session.refresh((4, 4))
    assert session.lengths == (4, 4), "the step was settled twice"


def test_only_what_is_over_the_limit_fails_for_it() -> None:
    small, large = draft((mirror(), 0, 1, None)), draft((mirror(handle=12), 0, 9, None))
    behind = draft((large.placements[0].mirror, 0, 1, None))
    exchange, _, (first, second) = in_exchange(small, large, behind)
    limit = {"limit_bytes": str(len(second) - 1)}
    assert len(first) < len(second) - 1
    (outcome,) = exchange.fail_too_large(oc.MessageTooLarge("", "large", metadata=limit))
    assert isinstance(outcome.error, oc.MessageTooLarge)
    assert [step.may_be_applied for step in exchange._ledger._steps.values()] == [True, False]
    assert len(exchange.on_open(1.0)) == 2


def test_draining_holds_what_was_refused_until_the_rest_is_answered() -> None:
    one, two = draft((mirror(), 0, 1, None)), draft((mirror(handle=12), 0, 1, None))
    exchange, (first, second), _ = in_exchange(one, two)
    exchange.on_result(
        result_of(pb.StepResult(step_id=first, error=status("DRAINING", "UNAVAILABLE"))), 1.0
    )
    assert not exchange.is_drained
    result = answer_to(two)
    result.step_id = second
    assert len(exchange.on_result(result_of(result), 1.0).outcomes) == 1
    assert exchange.is_drained
    assert isinstance(exchange.ended(), oc.Draining)
    exchange.on_broken()
    assert len(exchange.on_open(2.0)) == 1
    assert not exchange.is_drained


@pytest.mark.parametrize(
    ("error", "was_sent", "kind"),
    [
        (LOST, True, oc.ConnectionLost),
        (oc.Draining("DRAINING", "no"), True, oc.ConnectionLost),
        (oc.DeviceFailure("DEVICE_FAILURE", "no"), True, oc.ConnectionLost),
        (oc.DeviceFailure("DEVICE_FAILURE", "no"), False, oc.DeviceFailure),
        (oc.CallTimeout("late", may_be_applied=True), False, oc.CallTimeout),
        (oc.Draining("DRAINING", "no"), False, oc.Draining),
        (oc.ClientClosed("closed"), True, oc.ClientClosed),
    ],
)
def test_all_fail_with_their_own_fate(
    error: oc.OctavoError, was_sent: bool, kind: type[oc.OctavoError]
) -> None:
    exchange = Exchange()
    if was_sent:
        exchange.on_open(0.0)
    exchange.submit(Job(draft((mirror(), 0, 1, None)), Waiter(), is_single=True), 0.0)
    exchange.on_broken()
    (outcome,) = exchange.fail_all(error)
    assert type(outcome.error) is kind
    assert outcome.error is not error
    assert getattr(outcome.error, "may_be_applied", was_sent) is was_sent
    assert len(exchange) == 0
