"""The sync driver of a Decode stream.

Threads: callers encode and enqueue; gRPC's own thread sends; one thread reads, gives futures their results and opens a
new stream when one breaks; one thread, mostly asleep, gives up steps whose time has passed. Callbacks of futures run in
those two, so they must not wait for other steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

import grpc

from octavo.v1 import octavo_pb2 as pb
from octavo_client._config import Retry
from octavo_client._errors import ClientClosed, MessageTooLarge, OctavoError
from octavo_client._exchange import Exchange, Job, Outcome, deliver, unexpected
from octavo_client._retry import Backoff, is_passing
from octavo_client._shared_memory import SharedMemory
from octavo_client._status import error_from_rpc
from octavo_client._steps import Draft

Outbox = SimpleQueue[bytes | None]


class DecodeCall(Protocol):
    """An open Decode call: its responses, and a way to end it."""

    def __iter__(self) -> Iterator[pb.DecodeResponse]: ...

    def cancel(self) -> bool:
        """End the call."""


class DecodeStream:
    """One Decode stream, opened by the first step and again whenever it breaks while steps are pending.

    Args:
        open_call: Starts a Decode call that sends the given messages.
        retry: How often to open again.
        on_too_large: Called when the server ended a stream because a message was over its limit.
        memory: What the client may share with the server.
    """

    def __init__(
        self,
        open_call: Callable[[Iterator[bytes]], DecodeCall],
        retry: Retry,
        on_too_large: Callable[[], None],
        memory: SharedMemory | None = None,
    ) -> None:
        self._open_call = open_call
        self._on_too_large = on_too_large
        self._backoff = Backoff(retry)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._exchange = Exchange(memory)
        self._outbox: Outbox = SimpleQueue()
        self._call: DecodeCall | None = None
        self._reader: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._watch_until = float("inf")
        self._is_closed = False

    @property
    def lock(self) -> threading.Lock:
        """Guards the exchange and the mirrors that its steps settle; hold it briefly, and never while waiting."""
        return self._lock

    def check_open(self) -> None:
        """Check that the client was not closed.

        Raises:
            ClientClosed: It was.
        """
        if self._is_closed:
            raise ClientClosed("the client was closed; open a new one")

    def submit(self, draft: Draft, *, is_single: bool) -> Future[Any]:
        """Place a step and send it as soon as the steps before it allow.

        Raises:
            ClientClosed, ValueError: It cannot be placed.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self.check_open()
            now = time.monotonic()
            _, to_send = self._exchange.submit(Job(draft, future, is_single), now)
            self._send(to_send)
            self._ensure_threads(now + draft.timeout_s)
        return future

    def futures(self, session_handle: int) -> list[Future[Any]]:
        """Return the futures of a session's steps."""
        with self._lock:
            return self._exchange.futures(session_handle)

    def close(self) -> None:
        """End the stream; steps without an answer fail with ClientClosed."""
        with self._lock:
            self._is_closed = True
            outcomes = self._exchange.fail_all(ClientClosed("the client was closed"))
            call, threads = self._call, (self._reader, self._watcher)
            self._changed.notify_all()
        deliver(outcomes)
        if call is not None:
            call.cancel()
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def _send(self, messages: list[bytes]) -> None:
        for message in messages:
            self._outbox.put(message)

    def _ensure_threads(self, deadline: float) -> None:
        if self._reader is None:
            self._reader = _start(self._read_streams, "octavo-decode")
        if self._watcher is None:
            self._watcher = _start(self._watch_deadlines, "octavo-deadlines")
        elif deadline < self._watch_until:
            self._changed.notify_all()

    def _read_streams(self) -> None:
        self._backoff.reset()
        while True:
            error = self._read_to_end()
            if isinstance(error, MessageTooLarge) and self._fail_too_large(error):
                delay: float | None = 0.0
            else:
                delay = self._backoff.next_delay(error) if is_passing(error) else None
            if not self._goes_on(error, delay):
                return

    def _read_to_end(self) -> OctavoError:
        """Read a stream; whatever happens, this thread goes on to tell those who wait."""
        try:
            return self._read_stream()
        except Exception as error:
            return unexpected(error)

    def _fail_too_large(self, error: MessageTooLarge) -> bool:
        """Fail the steps that are over the server's limit; False when there are none."""
        self._on_too_large()
        with self._lock:
            outcomes = self._exchange.fail_too_large(error)
        deliver(outcomes)
        return bool(outcomes)

    def _goes_on(self, error: OctavoError, delay: float | None) -> bool:
        """Wait before the next stream; False when there is to be none, and then this thread ends."""
        outcomes: list[Outcome] = []
        with self._lock:
            self._call = None
            self._exchange.on_broken()
            if delay is None:
                outcomes = self._exchange.fail_all(error)
            elif len(self._exchange):
                self._changed.wait_for(lambda: self._is_closed, delay)
            goes_on = not self._is_closed and len(self._exchange) > 0
            if not goes_on:
                self._reader = None
        deliver(outcomes)
        return goes_on

    def _read_stream(self) -> OctavoError:
        """Open a stream and read it to its end; return why it ended."""
        outbox: Outbox = SimpleQueue()
        call = self._open(outbox)
        try:
            for response in call:
                if self._on_response(response):
                    break
        except grpc.RpcError as error:
            return error_from_rpc(error)
        finally:
            call.cancel()
            outbox.put(None)
        with self._lock:
            return self._exchange.ended()

    def _open(self, outbox: Outbox) -> DecodeCall:
        call = self._open_call(iter(outbox.get, None))
        with self._lock:
            self._call, self._outbox = call, outbox
            self._send(self._exchange.on_open(time.monotonic()))
            is_closed = self._is_closed
        if is_closed:
            call.cancel()
        return call

    def _on_response(self, response: pb.DecodeResponse) -> bool:
        """Take a message; return whether it is time for another stream."""
        with self._lock:
            outcomes, to_send, is_drained = self._exchange.on_response(response, time.monotonic())
            self._send(to_send)
        if outcomes:
            self._backoff.reset()
        deliver(outcomes)
        return is_drained

    def _watch_deadlines(self) -> None:
        try:
            self._expire_steps()
        except Exception as error:
            with self._lock:
                self._watcher = None
                outcomes = self._exchange.fail_all(unexpected(error))
            deliver(outcomes)

    def _expire_steps(self) -> None:
        while True:
            with self._lock:
                if self._is_closed:
                    return
                self._watch_until = self._exchange.next_deadline
                self._changed.wait(_seconds_until(self._watch_until))
                outcomes, to_send, _ = self._exchange.expire(time.monotonic())
                self._send(to_send)
            deliver(outcomes)


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    # Daemons: a client that was never closed must not keep the process alive.
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def _seconds_until(deadline: float) -> float | None:
    if deadline == float("inf"):
        return None
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
