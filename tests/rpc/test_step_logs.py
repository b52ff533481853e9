"""Steps in the logs of both ends, under the same step_key."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import octavo_client as oc
from octavo import v1
from octavo_server import step_log
from octavo_server.errors import draining
from tests.rpc.checked_session import draw_prompt, draw_step
from tests.rpc.cutting_proxy import cutting_proxy
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Caching, Wire
from tests.waiting import wait_until

SERVER, CLIENT = "octavo_server.step_log", "octavo_client"


@pytest.fixture
def client(wire: Wire) -> Iterator[oc.Client]:
    with oc.Client(wire.address) as client:
        yield client


def lines(caplog: pytest.LogCaptureFixture, logger: str) -> list[Any]:
    """Return what a logger has written, as records with their extra fields."""
    return [record for record in caplog.records if record.name == logger]


def test_both_ends_log_a_refused_step_by_its_key(
    client: oc.Client, caplog: pytest.LogCaptureFixture
) -> None:
    session = client.open_session(MODEL)
    with caplog.at_level(logging.INFO), pytest.raises(oc.PositionMismatch):
        session.decode(0, *draw_step(), start_pos=3)
    wait_until(lambda: lines(caplog, SERVER))
    (theirs,), (ours,) = lines(caplog, SERVER), lines(caplog, CLIENT)
    assert theirs.step_key == ours.step_key
    assert len(theirs.step_key) == 16
    assert int(theirs.step_key, 16) != 0
    assert theirs.step_id == ours.step_id
    assert theirs.entry_idx == 0
    assert theirs.reason == ours.reason == "POSITION_MISMATCH"
    assert theirs.step_key in theirs.getMessage()
    assert theirs.levelname == "INFO"


def test_a_refused_entry_of_a_batch_is_logged_at_both_ends(
    client: oc.Client, caplog: pytest.LogCaptureFixture
) -> None:
    session = client.open_session(MODEL)
    entries = [oc.Entry(session, 0), oc.Entry(session, 1, start_pos=9)]
    with caplog.at_level(logging.INFO):
        client.decode_batch(entries, *draw_step(2))
    for logger in (SERVER, CLIENT):
        (line,) = lines(caplog, logger)
        assert (line.entry_idx, line.reason) == (1, "POSITION_MISMATCH")


def test_answered_steps_are_logged_at_debug_alone(
    client: oc.Client, caplog: pytest.LogCaptureFixture
) -> None:
    session = client.open_session(MODEL)
    with caplog.at_level(logging.INFO):
        session.decode(0, *draw_step())
    assert not lines(caplog, SERVER)
    with caplog.at_level(logging.DEBUG, SERVER):
        session.decode(0, draw_step()[0])
    wait_until(lambda: lines(caplog, SERVER))
    (line,) = lines(caplog, SERVER)
    assert line.levelname == "DEBUG"
    assert int(line.step_key, 16) != 0, "a step that only reads has a key as well"


def test_refused_steps_of_unary_calls_are_logged(
    wire: Wire, client: oc.Client, caplog: pytest.LogCaptureFixture
) -> None:
    session = client.open_session(MODEL)
    step = wire.step((Caching(session.session_id, session._mirror.handle), 0, 1))
    step.step_key = 0xAB
    step.q.dtype = v1.DATA_TYPE_UNSPECIFIED
    with caplog.at_level(logging.INFO):
        with pytest.raises(grpc.RpcError):
            wire.stub.DecodeOnce(v1.DecodeOnceRequest(step=step), timeout=CALL_TIMEOUT_S)
        with pytest.raises(oc.PositionMismatch):
            session.append(*draw_prompt(3), start_pos=7)
    once, append = lines(caplog, SERVER)
    assert (once.step_key, once.reason) == ("00000000000000ab", "BAD_TENSOR")
    assert (append.step_id, append.reason) == (0, "POSITION_MISMATCH")
    assert int(append.step_key, 16) != 0


def test_a_client_in_error_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((1000.0, 1000.1, 1000.2, 1001.0))
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(step_log, "time", clock)
    monkeypatch.setattr(step_log, "MAX_LINES_A_S", 1)
    log = step_log.StepLog()
    with caplog.at_level(logging.INFO, SERVER):
        for step_id in range(4):
            log.on_refusal(step_id, 1, draining())
    assert [line.getMessage().partition(":")[0] for line in lines(caplog, SERVER)] == [
        "step 0 (0000000000000001) was refused",
        "2 further refusals were not logged",
        "step 3 (0000000000000001) was refused",
    ]


def test_a_step_that_is_sent_again_says_so(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    with (
        cutting_proxy(wire.address) as proxy,
        oc.Client(proxy.target, retry=oc.Retry(initial_backoff_s=0.01)) as client,
        caplog.at_level(logging.INFO, CLIENT),
    ):
        session = client.open_session(MODEL)
        session.decode(0, *draw_step())
        with wire.busy():
            future = session.submit(0, *draw_step())
            wire.wait_for_queued(1)
            proxy.cut()
        future.result(CALL_TIMEOUT_S)
    messages = [line.getMessage() for line in lines(caplog, CLIENT)]
    assert any(message.startswith("trying again in") for message in messages)
    (again,) = (line for line in lines(caplog, CLIENT) if "sent again" in line.getMessage())
    assert int(again.step_key, 16) != 0
