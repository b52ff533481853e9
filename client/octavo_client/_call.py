"""An open Decode call: messages out, messages in, on the threads of those who call it.

grpcio's own object for a bidirectional call has a thread that sends, and one for the whole channel that receives and
wakes whoever waits. Each of these switches costs as much as the rest of a client's step. Underneath, grpcio has calls
whose events any thread may fetch for itself (it uses them for calls of one request), and `DirectCall` is made of those.
They are not its public interface: where they are not as expected, `QueuedCall` does the same by the public one.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from typing import Any, Protocol

import grpc

from octavo_client._credentials import Metadata
from octavo_client._signals import others_may_raise

try:
    from grpc._cython import cygrpc  # type: ignore[attr-defined]
except ImportError:
    cygrpc = None


class DecodeCall(Protocol):
    """An open call. `send` and `cancel` are for any thread, reading is for one at a time."""

    def send(self, message: bytes) -> None:
        """Send a message behind those before it, without waiting; to a call that is over it is lost."""

    def __next__(self) -> bytes:
        """Wait for the next message.

        Raises:
            StopIteration: The server ended the call.
            grpc.RpcError: It ended otherwise.
        """

    def cancel(self) -> None:
        """End the call; who reads it is told."""

    def drain(self) -> None:
        """Give back what the call holds; after `cancel`, and when nobody reads."""


def open_call(channel: grpc.Channel, method: str, metadata: Metadata = ()) -> DecodeCall:
    """Open a call whose messages are bytes both ways, in the fastest way that this grpcio and this program allow.

    A program whose signal handlers may raise gets the public kind, which stands that at any moment.
    """
    if others_may_raise():
        return QueuedCall(channel, method, metadata)
    try:
        return DirectCall(channel, method, metadata)
    except (AttributeError, TypeError):
        return QueuedCall(channel, method, metadata)


class QueuedCall:
    """A call by grpcio's public interface."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: Metadata = ()) -> None:
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        rpc = channel.stream_stream(method, None, None)
        self._call: Any = rpc(iter(self._outbox.get, None), metadata=metadata)

    def send(self, message: bytes) -> None:
        """Send a message."""
        self._outbox.put(message)

    def __next__(self) -> bytes:
        """Wait for the next message."""
        message: bytes = next(self._call)
        return message

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel()
        self._outbox.put(None)

    def drain(self) -> None:
        """Do nothing: grpcio's own threads see to it."""


_EMPTY_FLAGS = 0
_STARTED, _ENDED, _SENT, _RECEIVED = range(4)
"""What an event is about."""

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallEnded(grpc.RpcError):
    """The status with which a call ended, as grpcio's own errors tell it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        super().__init__(f"{code.name}: {details}")
        self._code = code
        self._details = details
        self._trailing_metadata = trailing_metadata

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._code

    def details(self) -> str:
        """Return the status message."""
        return self._details

    def trailing_metadata(self) -> Any:
        """Return the metadata that came with the status."""
        return self._trailing_metadata


class DirectCall:
    """A call without a thread of its own: who reads fetches its events, those of sending too.

    One message is on its way to gRPC at a time. Its event tells that the next may go, so messages sent while nobody
    reads wait for the next read; a client that sends always reads.
    """

    def __init__(self, channel: Any, method: str, metadata: Metadata = ()) -> None:
        self._lock = threading.Lock()
        self._is_draining = threading.Lock()
        self._unsent: deque[bytes] = deque()
        self._due = {_STARTED, _ENDED}
        self._end: CallEnded | None = None
        start = (
            cygrpc.SendInitialMetadataOperation(metadata, _EMPTY_FLAGS),
            cygrpc.ReceiveStatusOnClientOperation(_EMPTY_FLAGS),
        )
        receive_metadata = (cygrpc.ReceiveInitialMetadataOperation(_EMPTY_FLAGS),)
        self._call = channel._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            method.encode(),
            None,
            None,
            None,
            None,
            ((start, _ENDED), (receive_metadata, _STARTED)),
            None,
        )

    def send(self, message: bytes) -> None:
        """Send a message."""
        with self._lock:
            if _SENT in self._due:
                self._unsent.append(message)
            else:
                self._operate(cygrpc.SendMessageOperation(message, _EMPTY_FLAGS), _SENT)

    def __next__(self) -> bytes:
        """Wait for the next message."""
        with self._lock:
            if _RECEIVED not in self._due:  # it is after a read that was interrupted
                self._operate(cygrpc.ReceiveMessageOperation(_EMPTY_FLAGS), _RECEIVED)
        while self._due:
            message = self._take_event()
            if message is not None:
                return message
        if self._end is None or self._end.code() is grpc.StatusCode.OK:
            raise StopIteration
        raise self._end

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel(grpc.StatusCode.CANCELLED.value[0], "the client cancelled the call")

    def drain(self) -> None:
        """Fetch every event that is due."""
        with self._is_draining:
            while self._due:
                self._take_event()

    def _operate(self, operation: Any, event: int) -> None:
        if self._call.operate((operation,), event):
            self._due.add(event)

    def _take_event(self) -> bytes | None:
        """Wait for an event; return the message that came with it."""
        event = self._call.next_event()
        with self._lock:
            self._due.discard(event.tag)
            if event.tag == _SENT and self._unsent:
                message = self._unsent.popleft()
                self._operate(cygrpc.SendMessageOperation(message, _EMPTY_FLAGS), _SENT)
        for operation in event.batch_operations:
            if event.tag == _RECEIVED:
                received: bytes | None = operation.message()
                return received
            if isinstance(operation, cygrpc.ReceiveStatusOnClientOperation):
                self._end = _ended(operation)
        return None


def _ended(operation: Any) -> CallEnded:
    code = _STATUS_CODES.get(operation.code(), grpc.StatusCode.UNKNOWN)
    details = operation.details()
    text = details.decode(errors="replace") if isinstance(details, bytes) else str(details)
    return CallEnded(code, text, operation.trailing_metadata())
