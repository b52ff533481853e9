"""Decode streams by grpcio's public interface alone: what `test_streams` asks of them, where threads matter."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from octavo_server import service
from octavo_server.stream_call import DirectCall, ThreadedCall, stream_call
from tests.rpc.conftest import serving
from tests.rpc.test_streams import (  # noqa: F401 - collected here too
    test_a_client_that_waits_for_each_answer_gets_them_in_order,
    test_a_replay_gets_the_same_answer_and_grows_nothing,
    test_a_slow_reader_holds_up_only_itself,
    test_a_step_waits_and_expires_while_its_stream_is_full,
    test_a_waiting_client_that_vanishes_gives_its_stream_back,
    test_several_steps_are_in_flight_and_linked_by_step_id,
    test_steps_queued_by_a_client_that_vanishes_are_not_applied,
    test_streams_of_clients_that_vanished_are_given_back,
    test_the_next_step_is_read_whether_or_not_the_client_says_that_it_waits,
)
from tests.rpc.wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setattr(service, "stream_call", ThreadedCall)
    with serving() as wire:
        yield wire


def test_a_drained_stream_is_told(wire: Wire) -> None:
    with wire.stream() as stream:
        step = wire.step((caching := wire.open(), 0, 1))
        stream.send(step)
        wire.check(step, stream.receive(), [(caching, 0)])
        wire.server.stop()
        with pytest.raises(grpc.RpcError, match="the server is shutting down"):
            stream.receive()


def test_another_grpcio_gets_the_public_call() -> None:
    class Bare:
        """A context of a grpcio that keeps nothing where ours does."""

    call = stream_call(iter(()), Bare(), lambda _: None)  # type: ignore[arg-type]
    assert isinstance(call, ThreadedCall)
    assert not isinstance(call, DirectCall)
