"""The ledger against a model of the server's rules, over connections that break at any moment."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo_client._ledger import Ledger, LedgerStep, SessionLayer

KEYS: list[SessionLayer] = [(1, 0), (1, 1), (2, 0)]
FAR = float("inf")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step of the model does: append at `starts`, or read; it must find `starts` tokens."""

    starts: dict[SessionLayer, int]


class ServerModel:
    """The position rules of the wire: appends at the length, replays of the last append, and nothing else."""

    def __init__(self) -> None:
        self.lengths = dict.fromkeys(KEYS, 0)
        self.last_appends: dict[SessionLayer, tuple[int, int]] = {}

    def apply(self, step: LedgerStep[Plan]) -> None:
        for key in step.keys:
            start = step.payload.starts[key]
            if not step.has_kv:
                assert self.lengths[key] == start, "a read saw an append submitted after it"
            elif self.lengths[key] == start:
                self.lengths[key] += 1
                self.last_appends[key] = (start, step.step_id)
            else:
                assert self.last_appends.get(key) == (start, step.step_id), "POSITION_MISMATCH"


class LedgerMachine(RuleBasedStateMachine):
    """Callers submit, a server applies and answers, and the connection breaks between any two of these."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[Plan] = Ledger()
        self.server = ServerModel()
        self.submitted = dict.fromkeys(KEYS, 0)
        self.unanswered: dict[int, LedgerStep[Plan]] = {}
        self.to_server: list[LedgerStep[Plan]] = []
        self.to_client: list[int] = []
        self.is_open = False

    def send(self, steps: list[LedgerStep[Plan]]) -> None:
        on_the_way = {step.step_id for step in self.to_server} | set(self.to_client)
        for step in steps:
            assert step.step_id not in on_the_way, "sent twice on one stream"
            assert step.is_sent
            assert self.is_open
        self.to_server.extend(steps)

    @rule(keys=st.sets(st.sampled_from(KEYS), min_size=1), has_kv=st.booleans())
    def submit(self, keys: set[SessionLayer], has_kv: bool) -> None:
        plan = Plan({key: self.submitted[key] for key in keys})
        step = self.ledger.submit(plan, sorted(keys), has_kv=has_kv, deadline=FAR)
        self.unanswered[step.step_id] = step
        for key in keys:
            self.submitted[key] += has_kv
        self.send([step] if step.is_sent else [])

    @precondition(lambda self: not self.is_open)
    @rule()
    def open_stream(self) -> None:
        self.is_open = True
        self.send(self.ledger.on_stream_open())

    @precondition(lambda self: self.to_server)
    @rule()
    def serve(self) -> None:
        step = self.to_server.pop(0)
        self.server.apply(step)
        self.to_client.append(step.step_id)

    @precondition(lambda self: self.to_client)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        # Results come in any order.
        step_id = self.to_client.pop(data.draw(st.integers(0, len(self.to_client) - 1)))
        step, to_send = self.ledger.resolve(step_id)
        assert step is self.unanswered.pop(step_id)
        self.send(to_send)

    @precondition(lambda self: self.is_open)
    @rule(data=st.data())
    def break_stream(self, data: st.DataObject) -> None:
        # The server may have received any part of what was on its way; every answer on its way is lost.
        num_served = data.draw(st.integers(0, len(self.to_server)))
        for step in self.to_server[:num_served]:
            self.server.apply(step)
        self.to_server, self.to_client, self.is_open = [], [], False
        self.ledger.on_stream_broken()

    @invariant()
    def an_append_is_alone(self) -> None:
        sent = [step for step in self.unanswered.values() if step.is_sent]
        for step in sent:
            others = [other for other in sent if other is not step and {*step.keys} & {*other.keys}]
            assert not others or not any(s.has_kv for s in [step, *others])

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        assert len(self.ledger) == len(self.unanswered)
        assert self.ledger.num_sent == sum(step.is_sent for step in self.unanswered.values())
        if self.is_open and self.unanswered:
            assert self.unanswered[min(self.unanswered)].is_sent, "the oldest step is held"

    def teardown(self) -> None:
        if not self.is_open:
            self.open_stream()
        while self.to_server or self.to_client:
            while self.to_server:
                self.serve()
            step, to_send = self.ledger.resolve(self.to_client.pop(0))
            assert step is not None
            del self.unanswered[step.step_id]
            self.send(to_send)
        assert not self.unanswered
        assert self.server.lengths == self.submitted, "an append was lost or stored twice"


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase


A, B, C = KEYS


def opened() -> Ledger[str]:
    ledger: Ledger[str] = Ledger()
    assert ledger.on_stream_open() == []
    return ledger


def submit(
    ledger: Ledger[str], name: str, *keys: SessionLayer, kv: bool = True, deadline: float = FAR
) -> LedgerStep[str]:
    return ledger.submit(name, keys, has_kv=kv, deadline=deadline)


def names(steps: list[LedgerStep[str]]) -> list[str]:
    return [step.payload for step in steps]


def test_layers_and_sessions_do_not_wait_for_each_other() -> None:
    ledger = opened()
    assert all(submit(ledger, "kv", key).is_sent for key in KEYS)


@pytest.mark.parametrize(
    ("first_kv", "second_kv", "is_sent"),
    [(True, True, False), (True, False, False), (False, True, False), (False, False, True)],
)
def test_only_reads_share_a_layer(first_kv: bool, second_kv: bool, is_sent: bool) -> None:
    ledger = opened()
    submit(ledger, "first", A, kv=first_kv)
    assert submit(ledger, "second", A, kv=second_kv).is_sent is is_sent


def test_an_answer_releases_what_it_held_in_the_order_of_submission() -> None:
    ledger = opened()
    first = submit(ledger, "first", A, B)
    submit(ledger, "read b", B, kv=False)
    submit(ledger, "read a", A, kv=False)
    submit(ledger, "append a", A)
    step, to_send = ledger.resolve(first.step_id)
    assert step is first
    assert names(to_send) == ["read b", "read a"]


def test_a_late_answer_is_dropped() -> None:
    ledger = opened()
    step = submit(ledger, "step", A)
    ledger.resolve(step.step_id)
    assert ledger.resolve(step.step_id) == (None, [])


def test_expired_steps_leave_together_and_release_the_rest() -> None:
    ledger = opened()
    sent = submit(ledger, "sent", A, deadline=1.0)
    held = submit(ledger, "held", A, deadline=2.0)
    submit(ledger, "late", A, deadline=3.0)
    assert ledger.next_deadline == 1.0
    overdue, to_send = ledger.expire(2.0)
    assert (overdue, names(to_send)) == ([sent, held], ["late"])
    assert (sent.may_be_applied, held.may_be_applied) == (True, False)
    assert ledger.next_deadline == 3.0


def test_a_step_cut_off_may_be_applied_although_it_is_held() -> None:
    ledger = opened()
    append, read = submit(ledger, "append", A), submit(ledger, "read", B, kv=False)
    ledger.on_stream_broken()
    assert not append.is_sent
    assert (append.may_be_applied, read.may_be_applied) == (True, False)


def test_a_step_refused_unapplied_goes_to_the_next_stream() -> None:
    ledger = opened()
    step = submit(ledger, "step", A)
    ledger.hold(step.step_id)
    assert (ledger.num_sent, step.may_be_applied) == (0, False)
    ledger.on_stream_broken()
    assert ledger.on_stream_open() == [step]


def test_pending_steps_of_a_session() -> None:
    ledger = opened()
    submit(ledger, "one", A, C)
    submit(ledger, "two", C)
    assert ledger.pending(1) == ["one"]
    assert ledger.pending(2) == ["one", "two"]
