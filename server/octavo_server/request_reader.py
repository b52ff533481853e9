"""The one request of a unary call, read so that calls which send none cannot use up the handler threads.

gRPC gives a call its thread before the call has sent anything, and there the call may stay silent for as long as its
client likes. Here such calls hold a limited number of places, and the one that has been silent longest makes way for
the next. A pool with more threads than places so always comes to those that speak.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import grpc

from octavo_server import status
from octavo_server.errors import Reason, mismatch

GRACE_S = 0.1
"""How long a call may stay silent before it has to make way; a request mostly comes along with its call."""

Request = TypeVar("Request")


class RequestReader:
    """Reads the requests of unary calls that are registered as streams: the same on the wire, but read by us.

    Args:
        num_places: Calls that may be silent at once.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._changed = threading.Condition()
        # Since when each call is silent, the longest first.
        self._silent: dict[grpc.ServicerContext, float] = {}

    def read(self, requests: Iterator[Request], context: grpc.ServicerContext) -> Request:
        """Return a call's first message, and leave what may follow unread, as gRPC does with unary calls.

        A call that ends without a message is refused with MALFORMED_MESSAGE, and one that must make way is cancelled.

        Raises:
            grpc.RpcError: The call was cancelled, by either side.
        """
        self._enter(context)
        try:
            request = next(requests, None)
        finally:
            is_heard = self._leave(context)
        if not is_heard:
            # The request came just as the call was cancelled: nothing of it may be applied.
            context.abort(grpc.StatusCode.CANCELLED, "the call was silent for too long")
        if request is None:
            error = mismatch(Reason.MALFORMED_MESSAGE, "request", "one message", "none")
            status.abort(context, error)
        return request

    def _enter(self, context: grpc.ServicerContext) -> None:
        with self._changed:
            while len(self._silent) >= self._num_places:
                longest_silent, since = next(iter(self._silent.items()))
                wait_s = since + GRACE_S - time.monotonic()
                if wait_s > 0:
                    self._changed.wait(wait_s)
                else:
                    del self._silent[longest_silent]
                    longest_silent.cancel()  # type: ignore[no-untyped-call]
            self._silent[context] = time.monotonic()

    def _leave(self, context: grpc.ServicerContext) -> bool:
        """Free a call's place; False when it had to make way."""
        with self._changed:
            self._changed.notify()
            return self._silent.pop(context, None) is not None
