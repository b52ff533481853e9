"""Random bytes and changed valid messages to every call: each is answered, or refused with exactly one reason.

Where tests/rpc/test_hostile.py draws fields of messages that parse, here bytes are changed, so that what parses is
mostly nearly right. Calls come from the committed contract: one that is added is tested.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from octavo import v1
from tests.fuzz.calls import CALLS, answer_of, fault_in
from tests.fuzz.mutation import mutated
from tests.fuzz.valid_messages import ModelShape, valid_messages
from tests.rpc.conftest import NUM_BLOCKS, serving
from tests.rpc.wire import CALL_TIMEOUT_S, HEAD_DIM, MODEL, NUM_KV_HEADS, NUM_Q_HEADS, Wire
from tests.waiting import wait_until

SHAPE = ModelShape(MODEL, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM)
CHANGES = settings(max_examples=30, deadline=None)
RANDOM = settings(max_examples=10, deadline=None)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    """A server that all messages are thrown at."""
    with serving() as wire:
        yield wire


def test_every_call_has_a_valid_message() -> None:
    assert sorted(valid_messages(SHAPE, "x" * 41, 1)) == sorted(CALLS)


def test_valid_messages_change_into_many_others() -> None:
    """Most of them still parse: those are the ones that reach past the parser."""
    rng = random.Random(1)
    messages = valid_messages(SHAPE, "x" * 41, 1)
    drawn = [mutated(messages["DecodeOnce"], rng) for _ in range(200)]
    assert len(set(drawn)) > 150
    assert 100 < sum(map(_parses, drawn)) < 190


@pytest.mark.parametrize("name", sorted(CALLS))
@CHANGES
@given(seed=st.integers(0, 2**32 - 1))
def test_changed_messages_are_answered_or_refused(wire: Wire, name: str, seed: int) -> None:
    rng = random.Random(seed)
    victim = wire.open()
    valid = valid_messages(SHAPE, victim.session_id, victim.handle)[name]
    messages = [mutated(valid, rng) for _ in range(rng.randint(1, 3))]
    assert fault_in(answer_of(wire.channel, name, messages, CALL_TIMEOUT_S)) == ""
    still_serves(wire)


@pytest.mark.parametrize("name", sorted(CALLS))
@RANDOM
@given(data=st.binary(max_size=64))
def test_random_bytes_are_answered_or_refused(wire: Wire, name: str, data: bytes) -> None:
    assert fault_in(answer_of(wire.channel, name, [data], CALL_TIMEOUT_S)) == ""
    still_serves(wire)


def still_serves(wire: Wire) -> None:
    """Close all that is open, see that no block leaked, and have a new session answered."""
    for session in wire.sessions():
        # Messages may have asked for leases of a millisecond: then it is gone by now.
        request = v1.CloseSessionRequest(session_id=session.session_id)
        message = request.SerializeToString()
        closed = answer_of(wire.channel, "CloseSession", [message], CALL_TIMEOUT_S)
        assert closed.refusals in [(), ("SESSION_EXPIRED",)]
    wait_until(lambda: wire.num_free_blocks() == NUM_BLOCKS)
    own = wire.open()
    wire.append(own, 1, 2)
    wire.close(own)


def _parses(data: bytes) -> bool:
    try:
        v1.DecodeOnceRequest.FromString(data)
    except Exception:
        return False
    return True
