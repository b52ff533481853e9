"""Open Decode calls, by grpcio's own threads and without them: the same messages, ends and errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from octavo_client import _call
from octavo_client._call import CallEnded, DecodeCall, DirectCall, QueuedCall, open_call
from tests.waiting import wait_until

METHOD = "/echo/Echo"
END, ABORT = b"end", b"abort"


class Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Sends every message back; END ends the call well, ABORT with a refusal."""

    def __init__(self) -> None:
        self.num_open = 0
        self.received: list[bytes] = []

    def service(self, _details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._echo)

    def _echo(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self.num_open += 1
        context.add_callback(self._on_end)
        for message in requests:
            self.received.append(message)
            if message == END:
                return
            if message == ABORT:
                context.set_trailing_metadata((("why", "asked"),))
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "as asked")
            yield message

    def _on_end(self) -> None:
        self.num_open -= 1


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def target(echo: Echo) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def channel(target: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target) as channel:
        yield channel


@pytest.fixture(params=[DirectCall, QueuedCall])
def call(request: pytest.FixtureRequest, channel: grpc.Channel) -> Iterator[DecodeCall]:
    call: DecodeCall = request.param(channel, METHOD)
    yield call
    call.cancel()
    call.drain()


def test_messages_come_back_in_order(call: DecodeCall) -> None:
    for number in range(50):
        call.send(b"%d" % number)
    assert [next(call) for _ in range(50)] == [b"%d" % number for number in range(50)]


def test_a_large_message_is_whole(call: DecodeCall) -> None:
    message = bytes(range(256)) * 8000
    for _ in range(3):
        call.send(message)
        assert next(call) == message


def test_the_server_may_end_the_call(call: DecodeCall) -> None:
    call.send(b"1")
    call.send(END)
    assert next(call) == b"1"
    with pytest.raises(StopIteration):
        next(call)
    call.send(b"lost")
    with pytest.raises(StopIteration):
        next(call)


def test_an_error_has_its_status_and_metadata(call: DecodeCall) -> None:
    call.send(ABORT)
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    error: Any = raised.value
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "as asked")
    assert ("why", "asked") in [tuple(pair) for pair in error.trailing_metadata()]


def test_cancelling_wakes_who_reads(call: DecodeCall) -> None:
    call.send(b"1")
    assert next(call) == b"1"
    raised: list[Any] = []

    def read() -> None:
        try:
            next(call)
        except grpc.RpcError as error:
            raised.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    call.cancel()
    reader.join(10)
    assert [error.code() for error in raised] == [grpc.StatusCode.CANCELLED]


def test_another_thread_sends_while_one_reads(call: DecodeCall) -> None:
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.extend(next(call) for _ in range(200)))
    reader.start()
    for number in range(200):
        call.send(b"%d" % number)
    reader.join(10)
    assert received == [b"%d" % number for number in range(200)]


def test_a_server_that_is_not_there_is_said() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as nowhere:
        for kind in (DirectCall, QueuedCall):
            call: DecodeCall = kind(nowhere, METHOD)
            call.send(b"1")
            with pytest.raises(grpc.RpcError) as raised:
                next(call)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            call.cancel()
            call.drain()


def test_a_drained_call_leaves_nothing_at_either_end(channel: grpc.Channel, echo: Echo) -> None:
    call = DirectCall(channel, METHOD)
    call.send(b"never read")
    wait_until(lambda: echo.num_open)
    call.cancel()
    call.drain()
    wait_until(lambda: not echo.num_open)
    channel.close()  # It would wait for a call that holds events.


def test_a_read_that_was_interrupted_loses_no_message(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = DirectCall(channel, METHOD)
    take_event = DirectCall._take_event

    def interrupt(_call: DirectCall) -> bytes | None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DirectCall, "_take_event", interrupt)
    call.send(b"1")
    with pytest.raises(KeyboardInterrupt):
        next(call)
    monkeypatch.setattr(DirectCall, "_take_event", take_event)
    assert next(call) == b"1"
    call.cancel()
    call.drain()


def test_a_call_needs_no_thread_where_grpcio_is_as_expected(channel: grpc.Channel) -> None:
    call = open_call(channel, METHOD)
    assert isinstance(call, DirectCall)
    call.cancel()
    call.drain()


@pytest.mark.parametrize("lacks", ["module", "method"])
def test_another_grpcio_is_used_by_its_public_interface(
    target: str, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    with grpc.insecure_channel(target) as channel:
        if lacks == "module":
            monkeypatch.setattr(_call, "cygrpc", None)
            call = open_call(channel, METHOD)
        else:
            call = open_call(_PublicChannel(channel), METHOD)  # type: ignore[arg-type]
        assert isinstance(call, QueuedCall)
        call.send(b"1")
        assert next(call) == b"1"
        call.cancel()


class _PublicChannel:
    def __init__(self, channel: grpc.Channel) -> None:
        self.stream_stream = channel.stream_stream


def test_the_error_reads_as_a_sentence() -> None:
    assert str(CallEnded(grpc.StatusCode.UNAVAILABLE, "gone", ())) == "UNAVAILABLE: gone"
