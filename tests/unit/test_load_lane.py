"""One lane of the load test against a scripted client: what is sent, sent again, given up and noted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from octavo_client import BatchResult, OutOfBlocks, PositionMismatch, QueueFull, StepTimeout
from octavo_client.access import Endpoint
from octavo_client.load import lane as lane_module
from octavo_client.load.book import Book
from octavo_client.load.chaos import Chaos
from octavo_client.load.content import draw_rows
from octavo_client.load.distribution import parse_lengths, parse_mix
from octavo_client.load.lane import Lane
from octavo_client.load.pace import ClosedPace, Pace, Span, Turn
from octavo_client.load.plan import Share, Workload
from octavo_client.load.source import Rig
from octavo_client.load.tally import Tally
from tests.unit.client_fakes import model

MODEL = model()
Answer = Callable[[list[Any]], Any]


def refusal(kind: Any, **metadata: str) -> Any:
    return kind(kind.__name__, "text", "CODE", metadata, 0.0001)


class FakeClient:
    """Opens sessions, and answers steps by a script; what is not scripted is answered well."""

    def __init__(self, script: list[Answer]) -> None:
        self.script = script
        self.steps: list[list[tuple[str, int, int]]] = []
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.options: list[dict[str, Any]] = []

    def open_session(self, _name: str) -> Any:
        session_id = f"s{len(self.opened)}"
        self.opened.append(session_id)
        return SimpleNamespace(
            session_id=session_id,
            model=MODEL,
            append=lambda *_, **__: None,
            close=lambda: self.closed.append(session_id),
        )

    def submit_batch(self, entries: list[Any], *tensors: Any, **options: Any) -> Future[Any]:
        self.options.append(options)
        self.steps.append([(e.session.session_id, e.layer, e.start_pos) for e in entries])
        future: Future[Any] = Future()
        try:
            answer = self.script.pop(0)(entries) if self.script else answered(entries)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(answer)
        return future


class FakeConnection:
    """Always the same client."""

    endpoint = Endpoint("nowhere")

    def __init__(self, client: FakeClient) -> None:
        self.client: Any = client

    def current(self) -> tuple[Any, int]:
        return self.client, 0

    def adopt(self, _members: Any) -> Any:
        return self.client

    def close_session(self, member: Any) -> None:
        member.session.close()


def answered(entries: list[Any], errors: dict[int, Any] | None = None) -> BatchResult:
    out = np.zeros((len(entries), MODEL.num_q_heads, MODEL.head_dim), np.float16)
    slices = tuple(slice(i, i + 1) for i in range(len(entries)))
    return BatchResult(out, None, errors or {}, slices)


class LatePace:
    """Gives turns that were due 1,000 ns before the clock began, when no lane was free or one was."""

    def __init__(self, *were_free: bool) -> None:
        self._turns = [Turn(-1000, was_free, is_measured=True) for was_free in were_free]

    def next_turn(self) -> Turn | None:
        return self._turns.pop(0) if self._turns else None

    def is_over(self) -> bool:
        return not self._turns

    def stop(self) -> None:
        self._turns.clear()


def run_lane(
    script: list[Answer],
    num_steps: int,
    *,
    sessions: str = "1",
    output: str = "100",
    pace: Pace | None = None,
) -> tuple[FakeClient, Tally]:
    """Run a lane for some steps of measured turns; return its client and what it noted."""
    workload = Workload(
        target="nowhere",
        mix=parse_mix(["tiny"]),
        models={"tiny": MODEL},
        dtype="float16",
        seed=0,
        prompt_tokens=parse_lengths("5"),
        output_tokens=parse_lengths(output),
        sessions_per_step=parse_lengths(sessions),
        layers=None,
        steps_per_stream=1,
        check=1.0,
        stage_times=1.0,
        timeout_s=1.0,
        expected=frozenset({"QueueFull", "OutOfBlocks", "STEP_TIMEOUT"}),
        chaos=frozenset(),
        chaos_rate=0.0,
    )
    ticks = iter(range(10**9))
    book = Book(workload.expected)
    rig = Rig(
        workload,
        Share(0, 0, 0, 1, 1, None, None),
        {"tiny": draw_rows(0, MODEL, "float16")},
        book,
        Chaos(frozenset(), 0.0, 0),
        lambda: next(ticks),
        threading.Event(),
    )
    client = FakeClient(script)
    connection: Any = FakeConnection(client)
    lane = Lane(rig, 0, connection)
    lane.set_up()
    lane.run(pace or ClosedPace(Span(0, 0, 10**9, num_steps), lambda: 0))
    lane.close()
    return client, book.turn().tally


def test_tokens_go_through_the_layers_in_order() -> None:
    client, tally = run_lane([], 5)
    assert client.steps == [
        [("s0", layer, 5 + token)] for token, layer in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    ]
    assert (tally.num_steps, tally.num_layer_steps, tally.num_tokens) == (5, 5, 2)
    assert tally.context == 6 + 6 + 7 + 7 + 8
    assert tally.num_sampled == 5
    assert client.closed == client.opened == ["s0"]


def test_sessions_end_and_others_begin() -> None:
    client, tally = run_lane([], 12, output="1")
    assert client.opened == [f"s{idx}" for idx in range(6)]
    assert client.closed == client.opened
    assert (tally.num_opened, tally.num_closed, tally.prompt_tokens) == (6, 6, 30)


def test_a_full_queue_is_waited_for_and_not_measured() -> None:
    def full(_: Any) -> Any:
        raise refusal(QueueFull)

    client, tally = run_lane([full, full], 1)
    assert client.steps == [[("s0", 0, 5)]] * 3
    assert tally.num_steps == 1
    assert tally.refusals == {"QueueFull": 2}
    assert not tally.faults


def test_only_the_refused_entry_is_sent_again_and_given_up_at_last() -> None:
    def lacks_blocks(entries: list[Any]) -> Any:
        idx = [e.session.session_id for e in entries].index("s1")
        return answered(entries, {idx: refusal(OutOfBlocks)})

    client, tally = run_lane([lacks_blocks] * 3, 1, sessions="3")
    assert [[name for name, *_ in step] for step in client.steps] == [
        ["s0", "s1", "s2"],
        ["s1"],
        ["s1"],
    ]
    assert tally.num_layer_steps == 2, "steps without an answered entry do not count"
    assert tally.num_steps == 1
    assert client.closed[0] == "s1"


def test_a_lost_answer_is_asked_for_by_sending_again() -> None:
    def lost(_: Any) -> Any:
        raise StepTimeout("late", may_be_applied=True)

    def is_stored(entries: list[Any]) -> Any:
        error = refusal(PositionMismatch, start_pos="5", length="6", layer="0")
        return answered(entries, {0: error})

    client, tally = run_lane([lost, is_stored], 2)
    assert client.steps == [[("s0", 0, 5)], [("s0", 0, 5)], [("s0", 1, 5)]]
    assert tally.num_stored_unanswered == 1
    assert not tally.faults


def test_a_position_that_nobody_took_is_a_fault() -> None:
    def is_stored(entries: list[Any]) -> Any:
        return answered(
            entries, {0: refusal(PositionMismatch, start_pos="5", length="6", layer="0")}
        )

    client, tally = run_lane([is_stored], 1)
    assert tally.faults.total() == 1
    assert client.closed == ["s0"], "the session is given up"


def test_stage_times_are_asked_for_and_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def staged(entries: list[Any]) -> Any:
        stages = SimpleNamespace(
            queue_us=5, batch_size=3, copy_in_us=1, kernel_us=40, copy_out_us=2
        )
        plain = answered(entries)
        return SimpleNamespace(out=plain.out, errors={}, stage_times=stages)

    monkeypatch.setattr(lane_module, "HAS_STAGE_TIMES", True)
    client, tally = run_lane([staged, staged], 3)
    assert client.options == [{"stage_times": True}] * 3
    assert (tally.num_staged, tally.queue_ns, tally.kernel_ns) == (2, 10_000, 80_000)
    assert (tally.copy_in_ns, tally.copy_out_ns) == (2_000, 4_000)
    assert tally.batch_sizes == {3: 2}


def test_a_client_without_stage_times_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "HAS_STAGE_TIMES", False)
    client, _ = run_lane([], 2)
    assert client.options == [{}] * 2


def test_latency_counts_from_the_moment_due_and_from_sending_without_one() -> None:
    _, late = run_lane([], 2, pace=LatePace(True, False))
    assert late.latency.least > 1000
    assert (late.num_without_lane, late.lateness.num_values) == (1, 1)
    assert late.lateness.least > 1000
    _, closed = run_lane([], 2)
    assert closed.latency.most < 100


def test_waiting_for_a_full_queue_is_part_of_an_open_loop_s_latency() -> None:
    def full(_: Any) -> Any:
        raise refusal(QueueFull)

    _, tally = run_lane([full], 1, pace=LatePace(True))
    assert (tally.num_steps, tally.latency.num_values) == (1, 1)
    assert tally.latency.least > 1000
    assert tally.lateness.num_values == 0, "the second attempt is late because of the server"
