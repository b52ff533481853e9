"""What calls have in common: a place among the limited ones, a caller who may leave, a refusal as the status."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from octavo_server import codec, status
from octavo_server.errors import OctavoError
from octavo_server.request_reader import RequestReader
from octavo_server.traffic import Traffic

Request = TypeVar("Request", bound=Message)
Result = TypeVar("Result")


class Gate:
    """Counts what is open of something limited, and refuses the next.

    Args:
        refusal: Of the next.
        limit: Most that may be open at once.
        traffic: Counts the refusals.
    """

    def __init__(self, refusal: OctavoError, limit: int, traffic: Traffic) -> None:
        self.limit = limit
        self._refusal = refusal
        self._traffic = traffic
        self._lock = threading.Lock()
        self.num_open = 0

    @contextmanager
    def open(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold a place while a call runs; end the call when none is left."""
        with self._lock:
            is_full = self.num_open == self.limit
            self.num_open += not is_full
        if is_full:
            self._traffic.count_refusal(self._refusal)
            status.abort(context, self._refusal)
        try:
            yield
        finally:
            with self._lock:
                self.num_open -= 1


class Caller:
    """The client of one call, who waits for the engine's futures one after the other; its leaving cancels them."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._future: Future[Any] | None = None
        self._has_left = not context.add_callback(self._leave)

    def wait(self, future: Future[Result]) -> Result:
        """Return a future's result; raises CancelledError when the client has gone before it was begun."""
        self._future = future
        if self._has_left:
            future.cancel()
        return future.result()

    @property
    def has_left(self) -> bool:
        """Whether the client has gone."""
        return self._has_left

    def _leave(self) -> None:
        self._has_left = True
        if self._future is not None:
            self._future.cancel()


@contextmanager
def refusing(context: grpc.ServicerContext, traffic: Traffic, *details: Message) -> Iterator[None]:
    """End the call with the status of a refusal raised inside, and `details` beside the ErrorInfo; count it."""
    try:
        yield
    except OctavoError as error:
        traffic.count_refusal(error)
        status.abort(context, error, *details)
    except CancelledError:
        context.abort(grpc.StatusCode.CANCELLED, "the client cancelled the call")


def unary_handler(
    request_type: type[Request],
    call: Callable[[Request, grpc.ServicerContext], Message],
    reader: RequestReader,
    traffic: Traffic,
    threads: ThreadPoolExecutor | None = None,
) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return the handler of a unary call.

    Args:
        request_type: What the call takes.
        call: Answers it.
        reader: Reads the request.
        traffic: Counts its messages and refusals.
        threads: Where the call runs, if not in the server's own pool.
    """

    def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        data = reader.read(requests, context)
        traffic.count_call(len(data), 0)
        with refusing(context, traffic):
            response = call(codec.parse(request_type, data), context).SerializeToString()
        traffic.count_call(0, len(response))
        return response

    return grpc.stream_unary_rpc_method_handler(run_in(threads, handle))


def responding(behaviour: Callable[[Any, grpc.ServicerContext, Any], None]) -> Any:
    """Return a behaviour to which gRPC hands the function that sends responses, rather than iterate over them."""

    def respond_to(requests: Any, context: grpc.ServicerContext, respond: Any) -> None:
        behaviour(requests, context, respond)

    respond_to.experimental_non_blocking = True  # type: ignore[attr-defined]
    return respond_to


def run_in(threads: ThreadPoolExecutor | None, behaviour: Any) -> Any:
    """Return a behaviour that gRPC runs in a pool of its own, where there is one."""
    behaviour.experimental_thread_pool = threads
    return behaviour
