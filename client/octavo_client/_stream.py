"""The sync driver of a Decode stream.

Threads: callers encode and send; one thread reads, gives futures their results and opens a new stream when one breaks;
one thread, mostly asleep, gives up steps whose time has passed. A caller that waits for the only step in flight reads
for itself, which saves it a switch of threads, and says so to the server, which saves one too. Callbacks of futures run
in any of these, so they must not wait for other steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import grpc

from octavo_client._call import DecodeCall
from octavo_client._config import Retry
from octavo_client._encoding import Result, parse_response
from octavo_client._errors import ClientClosed, MessageTooLarge, OctavoError
from octavo_client._exchange import Exchange, Job, Outcome, deliver, unexpected
from octavo_client._retry import Backoff, is_passing
from octavo_client._shared_memory import SharedMemory
from octavo_client._signals import Interrupts
from octavo_client._status import error_from_rpc
from octavo_client._steps import Draft


class DecodeStream:
    """One Decode stream, opened by the first step and again whenever it breaks while steps are pending.

    Args:
        open_call: Starts a Decode call.
        retry: How often to open again.
        on_too_large: Called when the server ended a stream because a message was over its limit.
        memory: What the client may share with the server.
    """

    def __init__(
        self,
        open_call: Callable[[], DecodeCall],
        retry: Retry,
        on_too_large: Callable[[], None],
        memory: SharedMemory | None = None,
    ) -> None:
        self._open_call = open_call
        self._on_too_large = on_too_large
        self._backoff = Backoff(retry)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._to_read = threading.Condition(self._lock)
        self._exchange = Exchange(memory)
        self._call: DecodeCall | None = None
        self._is_reading = False
        self._own_reader: Future[Any] | None = None
        self._own_thread: threading.Thread | None = None
        self._failure: OctavoError | None = None
        self._is_cut = False
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
        with Interrupts():
            future, _ = self._place(draft, is_single=is_single, may_read=False)
        return future

    def run(self, draft: Draft, *, is_single: bool) -> Any:
        """Place a step, send it, and wait for its answer.

        Raises:
            ClientClosed, ValueError: It cannot be placed.
            OctavoError: What became of it.
        """
        with Interrupts() as interrupts:
            future, call = self._place(draft, is_single=is_single, may_read=True)
            if call is not None:
                interrupts.waits_for(call.cancel)
                self._read_own(call, future)
        return future.result()

    def _place(
        self, draft: Draft, *, is_single: bool, may_read: bool
    ) -> tuple[Future[Any], DecodeCall | None]:
        """Place a step; returns its future, and the call whose next answer this thread is to read, if it may."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self.check_open()
            is_read = self._is_reading or self._own_thread is not None
            is_lone = may_read and not (is_read or len(self._exchange) or self._failure)
            call = self._call if is_lone else None
            draft.header.waits_for_answer = call is not None
            now = time.monotonic()
            _, to_send = self._exchange.submit(Job(draft, future, is_single), now)
            self._send(to_send)
            if call is not None:
                self._own_reader, self._own_thread = future, threading.current_thread()
            elif not self._is_reading:
                self._to_read.notify()
            self._ensure_threads(now + draft.timeout_s)
        return future, call

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
            self._to_read.notify()
        deliver(outcomes)
        if call is not None:
            with Interrupts():
                call.cancel()
        self._wait_for_readers(threads)
        if call is not None:
            with Interrupts():
                call.drain()
        with self._lock:
            self._exchange.on_broken()

    def _wait_for_readers(self, threads: Iterable[threading.Thread | None]) -> None:
        """Wait until nobody reads but this thread, which may be in a callback of a future."""
        this = threading.current_thread()
        for thread in threads:
            if thread is not None and thread is not this:
                thread.join()
        with self._lock:
            self._changed.wait_for(lambda: self._own_thread in (None, this))

    def _send(self, messages: list[bytes]) -> None:
        for message in messages:
            assert self._call is not None, "nothing is to be sent before a stream is open"
            self._call.send(message)

    def _ensure_threads(self, deadline: float) -> None:
        if self._reader is None:
            self._reader = _start(self._read_streams, "octavo-decode")
        if self._watcher is None:
            self._watcher = _start(self._watch_deadlines, "octavo-deadlines")
        elif deadline < self._watch_until:
            self._changed.notify_all()

    def _read_own(self, call: DecodeCall, future: Future[Any]) -> None:
        """Read until this thread's step has its answer; what goes wrong is left to the thread that else reads."""
        failure: OctavoError | None = None
        try:
            failure = self._read(call, future.done)
        except Exception as error:
            failure = unexpected(error)
        except BaseException:
            failure = unexpected(RuntimeError("the caller was interrupted"))
            raise
        finally:
            with self._lock:
                self._own_reader = self._own_thread = None
                self._failure = failure
                if self._is_closed:
                    self._changed.notify_all()
                if failure is not None or len(self._exchange):
                    self._to_read.notify()

    def _read_streams(self) -> None:
        while self._await_steps():
            error = self._read_to_end()
            if error is None:
                continue
            was_cut, self._is_cut = self._is_cut, False
            if was_cut or (isinstance(error, MessageTooLarge) and self._fail_too_large(error)):
                delay: float | None = 0.0
            else:
                delay = self._backoff.next_delay(error) if is_passing(error) else None
            self._leave_stream(error, delay)

    def _await_steps(self) -> bool:
        """Wait until there is something to read that no caller reads; False when there will be nothing more."""
        with self._lock:
            self._is_reading = False
            self._to_read.wait_for(lambda: self._is_closed or self._has_to_read())
            self._is_reading = True
            return not self._is_closed

    def _has_to_read(self) -> bool:
        if self._own_reader is not None:
            return False
        return self._failure is not None or len(self._exchange) > 0

    def _read_to_end(self) -> OctavoError | None:
        """Read while steps are pending; return why the stream ended, if it did.

        Whatever happens, this thread goes on to tell those who wait.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            return failure
        try:
            return self._read(self._call or self._open(), lambda: not len(self._exchange))
        except Exception as error:
            return unexpected(error)

    def _fail_too_large(self, error: MessageTooLarge) -> bool:
        """Fail the steps that are over the server's limit; False when there are none."""
        self._on_too_large()
        with self._lock:
            outcomes = self._exchange.fail_too_large(error)
        deliver(outcomes)
        return bool(outcomes)

    def _leave_stream(self, error: OctavoError, delay: float | None) -> None:
        """Give the stream up, and wait before the next; without a delay the steps that are pending fail."""
        outcomes: list[Outcome] = []
        if self._call is not None:
            self._call.cancel()
            self._call.drain()
        with self._lock:
            self._call = None
            self._exchange.on_broken(error)
            if delay is None:
                outcomes = self._exchange.fail_all(error)
            elif len(self._exchange):
                self._changed.wait_for(lambda: self._is_closed, delay)
            if not len(self._exchange):
                self._backoff.reset()
        deliver(outcomes)

    def _read(self, call: DecodeCall, is_done: Callable[[], bool]) -> OctavoError | None:
        """Read a stream until it need not be read any more; return why it ended, if it did."""
        try:
            while not is_done():
                if self._on_result(parse_response(next(call))):
                    break
            else:
                return None
        except StopIteration:
            pass
        except grpc.RpcError as error:
            return error_from_rpc(error)
        with self._lock:
            return self._exchange.ended()

    def _open(self) -> DecodeCall:
        call = self._open_call()
        with self._lock:
            self._call = call
            self._send(self._exchange.on_open(time.monotonic()))
            is_closed = self._is_closed
        if is_closed:
            call.cancel()
        return call

    def _on_result(self, result: Result) -> bool:
        """Take a result; return whether it is time for another stream."""
        with self._lock:
            outcomes, to_send, is_drained = self._exchange.on_result(result, time.monotonic())
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
                own, call = self._own_reader, self._call
                is_cut = call is not None and any(o.future is own for o in outcomes)
                self._is_cut |= is_cut
            if call is not None and is_cut:
                call.cancel()  # The caller waits in a read, which has no timeout.
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
