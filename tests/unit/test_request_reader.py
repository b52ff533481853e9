"""Reading the one request of a unary call: who makes way for whom, and when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NoReturn

import grpc
import pytest

from octavo_server.request_reader import RequestReader

WAIT_S = 10


class AbortedError(Exception):
    """What a context raises to end its call."""


class Call:
    """A call that says nothing until it is cancelled, and then fails as gRPC's does, or says a last word."""

    def __init__(self, last_word: bytes | None = None) -> None:
        self.is_cancelled, self.is_read = threading.Event(), threading.Event()
        self.aborted_with: grpc.StatusCode | None = None
        self._last_word = last_word

    def cancel(self) -> None:
        self.is_cancelled.set()

    def abort(self, code: grpc.StatusCode, _details: str) -> NoReturn:
        self.aborted_with = code
        raise AbortedError

    def requests(self) -> Iterator[bytes]:
        self.is_read.set()
        assert self.is_cancelled.wait(WAIT_S)
        if self._last_word is None:
            raise grpc.RpcError
        yield self._last_word


def read(reader: RequestReader, call: Call) -> Future[bytes]:
    """Read a call's request in a thread of its own, as the server does; return once that has begun."""
    future: Future[bytes] = Future()
    context: Any = call

    def run() -> None:
        try:
            future.set_result(reader.read(call.requests(), context))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    assert call.is_read.wait(WAIT_S)
    return future


def test_the_call_silent_longest_makes_way_for_the_next() -> None:
    reader = RequestReader(2)
    calls = [Call() for _ in range(4)]
    futures = [read(reader, call) for call in calls]
    assert [call.is_cancelled.is_set() for call in calls] == [True, True, False, False]
    for call in calls[2:]:
        call.cancel()
    for future in futures:
        assert type(future.exception(WAIT_S)) is grpc.RpcError
    read(reader, calls[0])


def test_a_request_that_comes_as_its_call_is_cancelled_is_not_taken() -> None:
    reader = RequestReader(1)
    late, next_call = Call(b"late"), Call()
    future = read(reader, late)
    read(reader, next_call)
    assert isinstance(future.exception(WAIT_S), AbortedError)
    assert late.aborted_with is grpc.StatusCode.CANCELLED
    next_call.cancel()


def test_a_place_is_free_again_once_its_call_has_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo_server.request_reader.GRACE_S", WAIT_S)
    reader = RequestReader(1)
    context: Any = Call()
    for word in (b"one", b"", b"three"):
        assert reader.read(iter([word, b"more"]), context) == word
    assert not context.is_cancelled.is_set()
