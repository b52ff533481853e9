"""Well-formed messages with fields that nobody would send: each is answered or refused with one reason.

The bytes-level fuzz of test_streams.py hardly ever builds a message that parses; here every message parses, and its
fields are drawn from the edges of their types. After each example the victim's next step must be answered.
"""

from __future__ import annotations

from typing import Any

import grpc
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from octavo import v1
from tests.rpc.conftest import NUM_BLOCKS
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Caching, Wire, refusal_of, refusal_of_call

EDGES = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 160, 161, 2**31 - 1, 2**31, 2**32 - 1])
EXAMPLES = settings(max_examples=80, deadline=None)

SHAPES = st.one_of(
    st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([2, 4]), st.just(16)).map(list),
    st.lists(EDGES, max_size=5),
    st.just([1] * 70),
    st.just([2**32 - 1] * 600),
)

DATA = st.sampled_from([b"", b"\0" * 128, b"\0" * 256, b"\xff" * 256, b"\x7f" * 512])
"""Zeros, NaNs and large numbers, of the sizes that some of the shapes have."""

TENSORS = (
    st.builds(v1.Tensor, data=DATA, dtype=st.sampled_from([0, 1, 2, 3, 77]), shape=SHAPES)
    | st.none()
)

TEXTS = st.sampled_from(["", "x", MODEL, "é" * 3000, "x" * 30_000, "9" * 400])


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the fields of a step; handles are drawn as whether they are the victim's."""
    count = draw(st.integers(0, 3))
    lists = st.lists(EDGES, min_size=count, max_size=count)
    return {
        "step_id": draw(st.integers(0, 2**64 - 1)),
        "step_key": draw(st.integers(0, 2**64 - 1)),
        "is_victim": draw(st.lists(st.booleans(), min_size=count, max_size=count)),
        "layers": draw(lists | st.lists(EDGES, max_size=3)),
        "start_pos": draw(lists),
        "num_tokens": draw(lists | st.just([1] * count)),
        "q": draw(TENSORS),
        "k": draw(TENSORS | st.none()),
        "v": draw(TENSORS | st.none()),
        "timeout_ms": draw(EDGES),
        "return_lse": draw(st.booleans()),
        "causal": draw(st.none() | st.booleans()),
    }


def make_step(fields: dict[str, Any], victim: Caching) -> v1.Step:
    handles = [victim.handle if mine else 12345 for mine in fields["is_victim"]]
    rest = {name: value for name, value in fields.items() if name != "is_victim"}
    return v1.Step(session_handles=handles, **rest)


@pytest.fixture(scope="module")
def victim(module_wire: Wire) -> Caching:
    """A session that all examples are thrown at."""
    caching = module_wire.open()
    module_wire.append(caching, 0, 3)
    return caching


def still_serves(wire: Wire, victim: Caching) -> None:
    """Have a session of one's own answered, and then the victim, from an empty cache."""
    own = wire.open()
    wire.append(own, 1, 2)
    wire.close(own)
    request = v1.TruncateSessionRequest(session_id=victim.session_id)
    wire.stub.TruncateSession(request, timeout=CALL_TIMEOUT_S)
    wire.append(fresh := Caching(victim.session_id, victim.handle), 0, 3)
    assert wire.lengths(fresh) == [3, 0]
    assert wire.num_free_blocks() == NUM_BLOCKS - 1
    assert wire.health("ready") == "SERVING"


@EXAMPLES
@given(drawn=st.lists(steps(), min_size=1, max_size=3))
def test_any_step_is_answered_or_refused(
    module_wire: Wire, victim: Caching, drawn: list[dict[str, Any]]
) -> None:
    requests = [v1.DecodeRequest(step=make_step(fields, victim)) for fields in drawn]
    answers = module_wire.stub.Decode(iter(requests), timeout=CALL_TIMEOUT_S)
    results = [answer.result for answer in answers]
    sent = sorted(request.step.step_id for request in requests)
    assert sorted(result.step_id for result in results) == sent
    for result in results:
        if result.HasField("error"):
            refusal_of(result.error)
        for entry in result.entry_errors:
            refusal_of(entry.error)
    still_serves(module_wire, victim)


@EXAMPLES
@given(fields=steps())
def test_any_unary_step_and_append_is_answered_or_refused(
    module_wire: Wire, victim: Caching, fields: dict[str, Any]
) -> None:
    wire, step = module_wire, make_step(fields, victim)
    answered_or_refused(wire.stub.DecodeOnce, v1.DecodeOnceRequest(step=step))
    append = v1.AppendRequest(
        session_handle=victim.handle,
        layer=next(iter(step.layers), 0),
        start_pos=next(iter(step.start_pos), 0),
        num_tokens=next(iter(step.num_tokens), 0),
        k=step.k,
        v=step.v,
    )
    answered_or_refused(wire.stub.Append, iter([append]))
    still_serves(wire, victim)


@EXAMPLES
@given(text=TEXTS, other=TEXTS, number=EDGES, lengths=st.lists(EDGES, max_size=3))
def test_any_control_call_is_answered_or_refused(
    module_wire: Wire, victim: Caching, text: str, other: str, number: int, lengths: list[int]
) -> None:
    stub = module_wire.stub
    opened = answered_or_refused(
        stub.OpenSession, v1.OpenSessionRequest(model=text, request_id=other)
    )
    answered_or_refused(stub.GetSession, v1.GetSessionRequest(session_id=text))
    answered_or_refused(
        stub.ListSessions, v1.ListSessionsRequest(page_size=number, page_token=text)
    )
    answered_or_refused(
        stub.TruncateSession,
        v1.TruncateSessionRequest(
            session_id=victim.session_id, length=number, expected_lengths=lengths
        ),
    )
    answered_or_refused(stub.CloseSession, v1.CloseSessionRequest(session_id=text))
    if opened is not None:
        closing = v1.CloseSessionRequest(session_id=opened.session.session_id)
        stub.CloseSession(closing, timeout=CALL_TIMEOUT_S)
    still_serves(module_wire, victim)


def answered_or_refused(call: Any, request: Any) -> Any:
    """Return the answer, or None when the call was refused with exactly one reason."""
    try:
        return call(request, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        refusal_of_call(error)
        return None
