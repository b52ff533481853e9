"""An append cut into messages, and where it goes on after a break."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import octavo_client as oc
from octavo.v1 import octavo_pb2 as pb
from octavo_client import _append
from octavo_client._append import AppendPlan, plan_append
from octavo_client._mirror import Mirror
from tests.unit.client_fakes import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, mirror

LOST = oc.ConnectionLost("gone", may_be_applied=True)
MISMATCH = oc.PositionMismatch("POSITION_MISMATCH", "no")
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2


def draw(num_tokens: int, *lead: int) -> Any:
    shape = (*lead, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def plan(
    session: Mirror,
    num_tokens: int,
    *,
    message_tokens: int = 4,
    start_pos: int | None = None,
) -> AppendPlan:
    limit = 256 + message_tokens * TOKEN_BYTES
    k, v = draw(num_tokens, NUM_LAYERS), draw(num_tokens, NUM_LAYERS)
    return plan_append(session, (k, v), None, start_pos, limit)


def sent(messages: Any) -> list[tuple[int, int, int]]:
    return [(message.layer, message.start_pos, message.num_tokens) for message in parsed(messages)]


def parsed(messages: Iterable[bytes]) -> list[Any]:
    return list(map(pb.AppendRequest.FromString, messages))


def test_layers_grow_together_from_their_own_lengths() -> None:
    messages = plan(mirror(3, 5), 9).next_wave()
    assert sent(messages) == [(0, 3, 4), (1, 5, 4), (0, 7, 4), (1, 9, 4), (0, 11, 1), (1, 13, 1)]


def test_an_explicit_start_is_that_of_every_layer() -> None:
    assert sent(plan(mirror(3, 5), 2, start_pos=1).next_wave()) == [(0, 1, 2), (1, 1, 2)]


def test_messages_carry_their_rows_and_keys_of_their_own() -> None:
    k, v = draw(6, NUM_LAYERS), -draw(6, NUM_LAYERS)
    append = plan_append(mirror(), (k, v), None, None, 256 + 4 * TOKEN_BYTES)
    messages = parsed(append.next_wave())
    assert messages[3].k.data == k[1, 4:].tobytes()
    assert messages[3].v.data == v[1, 4:].tobytes()
    assert len({message.step_key for message in messages} | {0}) == len(messages) + 1
    assert all(message.ByteSize() <= 256 + 4 * TOKEN_BYTES for message in messages)


def test_one_layer() -> None:
    messages = plan_append(mirror(3, 5), (draw(2), draw(2)), 1, None, 1 << 20).next_wave()
    assert sent(messages) == [(1, 5, 2)]


@pytest.mark.parametrize(
    ("k", "v", "layer", "expected"),
    [
        (draw(2), draw(2), None, r"k must be \[2, num_tokens, 2, 8\], got \[2, 2, 8\]"),
        (draw(2, 2), draw(2, 2), 0, r"k must be \[num_tokens, 2, 8\], got \[2, 2, 2, 8\]"),
        (draw(2, 2), draw(3, 2), None, r"v must be \[2, 2, 2, 8\], got \[2, 3, 2, 8\]"),
        (draw(0, 2), draw(0, 2), None, "k must be"),
        (draw(2), draw(2), 7, "layer must be from 0 to 1"),
    ],
)
def test_arrays_that_cannot_be(k: Any, v: Any, layer: int | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        plan_append(mirror(), (k, v), layer, None, 1 << 20)


def test_a_token_over_the_limit_cannot_be_sent() -> None:
    with pytest.raises(oc.MessageTooLarge):
        plan(mirror(), 1, message_tokens=0)


def test_waves_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_append, "_WAVE_BYTES", 5 * TOKEN_BYTES)
    append = plan(mirror(), 9)
    waves = []
    while not append.is_done:
        waves.append(sent(append.next_wave()))
        append.on_stored()
    assert [len(wave) for wave in waves] == [2, 2, 2]
    assert append.progress == (18, 18)


def test_it_goes_on_from_the_last_stored_message_with_the_same_key() -> None:
    append = plan(mirror(), 9)
    messages = list(append.next_wave())
    append.resume((8, 4), LOST)
    assert append.progress == (8, 18)
    again = list(append.next_wave())
    assert sent(again) == sent(messages[2:])
    assert [m.step_key for m in parsed(again)] == [m.step_key for m in parsed(messages[2:])]


def test_it_knows_when_a_call_that_failed_got_further() -> None:
    append = plan(mirror(), 9)
    append.next_wave()
    full = append.resumable(oc.QueueFull("QUEUE_FULL", "no", retry_after_s=0.1))
    assert append.resume((4, 4), full)
    assert not append.resume((4, 4), full)
    assert append.resume((8, 4), full)


def test_it_starts_over_when_nothing_is_stored() -> None:
    append = plan(mirror(), 9)
    messages = sent(append.next_wave())
    append.resume((0, 0), LOST)
    assert sent(append.next_wave()) == messages


def test_everything_stored_is_still_proved_by_a_replay() -> None:
    append = plan(mirror(), 9)
    messages = sent(append.next_wave())
    append.resume((9, 9), LOST)
    assert sent(append.next_wave()) == messages[-1:]


def test_a_mismatch_after_a_break_is_our_own_while_the_server_still_stores() -> None:
    append = plan(mirror(), 9)
    append.next_wave()
    with pytest.raises(oc.PositionMismatch):
        append.resumable(MISMATCH)
    append.resume((4, 0), append.resumable(LOST))
    append.resume((4, 4), append.resumable(MISMATCH))
    with pytest.raises(oc.PositionMismatch):
        append.resume((4, 4), append.resumable(MISMATCH))


@pytest.mark.parametrize(
    "error", [oc.OutOfBlocks("OUT_OF_BLOCKS", "no"), oc.CallTimeout("late", may_be_applied=True)]
)
def test_other_errors_end_it(error: oc.OctavoError) -> None:
    with pytest.raises(type(error)):
        plan(mirror(), 9).resumable(error)


def test_the_mirror_counts_what_is_in_flight() -> None:
    session = mirror(3, 5)
    append = plan(session, 9)
    with append.in_flight(nullcontext()):
        assert session.lengths == (12, 14)
    assert (session.stored, session.is_stale) == ((12, 14), False)


def test_after_an_error_the_mirror_is_stale() -> None:
    session = mirror(3, 5)
    with (
        pytest.raises(oc.OutOfBlocks),
        plan(session, 9).in_flight(nullcontext()),
    ):
        raise oc.OutOfBlocks("OUT_OF_BLOCKS", "no")
    assert (session.lengths, session.is_stale) == ((3, 5), True)


@given(
    num_tokens=st.integers(1, 30),
    message_tokens=st.integers(1, 7),
    starts=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    cuts=st.lists(st.integers(0, 10), max_size=6),
)
def test_any_breaks_store_every_token_once(
    num_tokens: int, message_tokens: int, starts: tuple[int, int], cuts: list[int]
) -> None:
    lengths, last_keys = list(starts), dict.fromkeys(range(NUM_LAYERS), 0)
    append = plan(mirror(*starts), num_tokens, message_tokens=message_tokens)
    while not append.is_done:
        messages = parsed(append.next_wave())
        num_served = cuts.pop() if cuts else len(messages)
        for message in messages[:num_served]:
            if message.start_pos == lengths[message.layer]:
                lengths[message.layer] += message.num_tokens
                last_keys[message.layer] = message.step_key
            assert last_keys[message.layer] == message.step_key, "POSITION_MISMATCH"
        if num_served < len(messages):
            append.resume(lengths[:], append.resumable(LOST))
        else:
            append.on_stored()
    assert lengths == [start + num_tokens for start in starts]
