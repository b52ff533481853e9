"""A bidirectional call as the server sees it: messages come in as events, and go out without waiting.

grpcio gives a call of this kind a thread, and wakes it for each message that has come and for each that has gone; each
time costs as much as the rest of a step. But what grpcio does with an event is up to whoever began the operation, and
is done on the one thread that fetches all events. `DirectCall` begins its operations itself, so that a step is taken
in, and where its launch is short, run and answered, on that thread. This is not grpcio's public interface: where it is
not as expected, `ThreadedCall` does the same by the public one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import grpc

from octavo_server import status
from octavo_server.errors import OctavoError

grpc_server: Any
try:
    from grpc import _server as grpc_server
    from grpc._cython import cygrpc  # type: ignore[attr-defined]
except ImportError:
    grpc_server = cygrpc = None

log = logging.getLogger(__name__)

Respond = Callable[[bytes | None], None]
"""Sends a response and waits until it has gone; None ends the call with the status that its context was given."""


class Receiver(Protocol):
    """What happens on a call. Nothing here may block: all calls may share one thread."""

    def on_message(self, data: bytes) -> bool:
        """Take a message; return whether to read on, else `read_on` says when."""

    def on_sent(self) -> None:
        """Note that a message has gone out."""

    def on_end(self) -> None:
        """Note that the client has sent its last message."""

    def on_over(self) -> None:
        """Note that the call is over, whoever ended it."""


class StreamCall(Protocol):
    """A call; all but `run` is for any thread, and waits for nothing."""

    def run(self, receiver: Receiver) -> None:
        """Read messages until the call is over; waits for that."""

    def read_on(self) -> None:
        """Read again, after a message upon which it was left off."""

    def send(self, message: bytes) -> None:
        """Send a message behind those before it."""

    def finish(self, error: OctavoError | None) -> None:
        """End the call, well or with an error; once, and when all that was sent has gone out."""

    def cancel(self) -> None:
        """Cut the call off."""


def stream_call(
    requests: Iterator[bytes], context: grpc.ServicerContext, respond: Respond
) -> StreamCall:
    """Return a call by the fastest way that this grpcio has."""
    try:
        return DirectCall(context, respond)
    except AttributeError:
        return ThreadedCall(requests, context, respond)


class _Call:
    """What both kinds share."""

    def __init__(self, context: grpc.ServicerContext, respond: Respond) -> None:
        self._context = context
        self._respond = respond

    def finish(self, error: OctavoError | None) -> None:
        """End the call."""
        if error is not None:
            status.set_status(self._context, error)
        self._respond(None)

    def cancel(self) -> None:
        """Cut the call off."""
        self._context.cancel()  # type: ignore[no-untyped-call]


class ThreadedCall(_Call):
    """A call by grpcio's public interface: the handler's thread reads, another one sends."""

    def __init__(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, respond: Respond
    ) -> None:
        super().__init__(context, respond)
        self._requests = requests
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._may_read = threading.Semaphore(0)

    def run(self, receiver: Receiver) -> None:
        """Read messages until the call is over."""
        if not self._context.add_callback(lambda: self._on_over(receiver)):
            return
        sender = threading.Thread(
            target=self._send_all, args=(receiver,), name="octavo-stream-sender", daemon=True
        )
        sender.start()
        try:
            for data in self._requests:
                if not receiver.on_message(data):
                    self._may_read.acquire()
            receiver.on_end()
        except grpc.RpcError:
            pass  # The client is gone; `_on_over` is told.
        sender.join()

    def read_on(self) -> None:
        """Read again."""
        self._may_read.release()

    def send(self, message: bytes) -> None:
        """Send a message."""
        self._outbox.put(message)

    def _on_over(self, receiver: Receiver) -> None:
        receiver.on_over()
        self._may_read.release()
        self._outbox.put(None)

    def _send_all(self, receiver: Receiver) -> None:
        while (message := self._outbox.get()) is not None:
            self._respond(message)
            receiver.on_sent()


_RECEIVE, _SEND = "octavo receive", "octavo send"
"""What is due of a call, beside what grpcio itself has begun; a call is over when nothing is."""

_NO_FLAGS = 0


class DirectCall(_Call):
    """A call without threads: events are handled on grpcio's own, which fetches them."""

    def __init__(self, context: Any, respond: Respond) -> None:
        super().__init__(context, respond)
        self._state = context._state
        self._call = context._rpc_event.call
        self._is_active = grpc_server._is_rpc_state_active
        self._possibly_finish = grpc_server._possibly_finish_call
        self._initial_metadata = grpc_server._get_initial_metadata_operation
        self._receive_operation = cygrpc.ReceiveMessageOperation
        self._lock = threading.Lock()
        self._unsent: deque[bytes] = deque()
        self._is_sending = False
        self._receiver: Receiver

    def run(self, receiver: Receiver) -> None:
        """Read messages until the call is over."""
        self._receiver = receiver
        is_over = threading.Event()

        def end() -> None:
            receiver.on_over()
            is_over.set()

        if self._context.add_callback(end):
            self.read_on()
            is_over.wait()

    def read_on(self) -> None:
        """Read again."""
        self._begin(_RECEIVE, (self._receive_operation(_NO_FLAGS),), self._on_received)

    def send(self, message: bytes) -> None:
        """Send a message."""
        with self._lock:
            if self._is_sending:
                self._unsent.append(message)
                return
            self._is_sending = True
        self._begin_send(message)

    def _begin_send(self, message: bytes) -> None:
        operations: tuple[Any, ...] = (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        with self._state.condition:
            if self._state.initial_metadata_allowed:
                self._state.initial_metadata_allowed = False
                operations = (self._initial_metadata(self._state, None), *operations)
            self._begin(_SEND, operations, self._on_sent)

    def _begin(self, due: str, operations: Any, on_event: Callable[[Any], Any]) -> None:
        with self._state.condition:
            if self._is_active(self._state):
                self._call.start_server_batch(operations, on_event)
                self._state.due.add(due)

    def _on_received(self, event: Any) -> Any:
        (operation,) = event.batch_operations
        message = operation.message()
        if message is None:
            return self._after(_RECEIVE, self._on_end)
        return self._after(_RECEIVE, lambda: self._on_message(message))

    def _on_message(self, message: bytes) -> None:
        if self._receiver.on_message(message):
            self.read_on()

    def _on_end(self) -> None:
        with self._state.condition:
            if self._state.client is grpc_server._OPEN:
                self._state.client = grpc_server._CLOSED
        self._receiver.on_end()

    def _on_sent(self, _event: Any) -> Any:
        return self._after(_SEND, self._send_next)

    def _send_next(self) -> None:
        with self._lock:
            message = self._unsent.popleft() if self._unsent else None
            self._is_sending = message is not None
        if message is not None:
            self._begin_send(message)
        self._receiver.on_sent()

    def _after(self, due: str, act: Callable[[], None]) -> Any:
        """Act upon an event; return what grpcio wants of who handles one: the call and its callbacks, if it is over."""
        with self._state.condition:
            result = self._possibly_finish(self._state, due)
        try:
            act()
        except Exception:
            # A defect of ours; grpcio's thread must not end for it, and the client must not wait for ever.
            log.exception("a message could not be handled")
            self.cancel()
        return result
