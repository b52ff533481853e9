"""The asyncio driver of a Decode stream.

One task reads, and opens a new stream when one breaks; one timer gives up steps whose time has passed. Everything runs
on the event loop that submitted the first step, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from octavo_client._config import Retry
from octavo_client._encoding import Result
from octavo_client._errors import ClientClosed, MessageTooLarge, OctavoError
from octavo_client._exchange import Exchange, Job, deliver, unexpected
from octavo_client._retry import Backoff, is_passing
from octavo_client._shared_memory import SharedMemory
from octavo_client._status import error_from_rpc
from octavo_client._steps import Draft

Outbox = asyncio.Queue[bytes | None]

AsyncDecodeCall = grpc.aio.StreamStreamCall[Any, Result]


class AsyncDecodeStream:
    """One Decode stream, opened by the first step and again whenever it breaks while steps are pending.

    Args:
        open_call: Starts a Decode call that sends the given messages.
        retry: How often to open again.
        on_too_large: Called when the server ended a stream because a message was over its limit.
        memory: What the client may share with the server.
    """

    def __init__(
        self,
        open_call: Callable[[AsyncIterator[bytes]], AsyncDecodeCall],
        retry: Retry,
        on_too_large: Callable[[], None],
        memory: SharedMemory | None = None,
    ) -> None:
        self._open_call = open_call
        self._on_too_large = on_too_large
        self._backoff = Backoff(retry)
        self._exchange = Exchange(memory)
        self._outbox: Outbox = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def check_open(self) -> None:
        """Check that the client was not closed.

        Raises:
            ClientClosed: It was.
        """
        if self._is_closed:
            raise ClientClosed("the client was closed; open a new one")

    def submit(self, draft: Draft, *, is_single: bool) -> asyncio.Future[Any]:
        """Place a step and send it as soon as the steps before it allow; cancelling the future gives it up.

        Raises:
            ClientClosed, ValueError: It cannot be placed.
        """
        self.check_open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        step_id, to_send = self._exchange.submit(Job(draft, future, is_single), loop.time())
        future.add_done_callback(lambda done: self._on_done(step_id, done))
        self._send(to_send)
        if self._reader is None:
            self._reader = loop.create_task(self._read_streams())
        self._watch(loop.time() + draft.timeout_s)
        return future

    def futures(self, session_handle: int) -> list[asyncio.Future[Any]]:
        """Return the futures of a session's steps."""
        return self._exchange.futures(session_handle)

    async def close(self) -> None:
        """End the stream; steps without an answer fail with ClientClosed."""
        self._is_closed = True
        deliver(self._exchange.fail_all(ClientClosed("the client was closed")))
        if self._timer is not None:
            self._timer.cancel()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._exchange.on_broken()

    def _send(self, messages: list[bytes]) -> None:
        for message in messages:
            self._outbox.put_nowait(message)

    def _on_done(self, step_id: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            self._send(self._exchange.give_up(step_id, asyncio.get_running_loop().time()))

    async def _read_streams(self) -> None:
        self._backoff.reset()
        delay: float | None = 0.0
        while delay is not None and len(self._exchange):
            await asyncio.sleep(delay)
            error = await self._read_to_end()
            if isinstance(error, MessageTooLarge) and self._fail_too_large(error):
                delay = 0.0
                continue
            self._exchange.on_broken(error)
            delay = self._backoff.next_delay(error) if is_passing(error) else None
            if delay is None:
                deliver(self._exchange.fail_all(error))
        self._reader = None

    async def _read_to_end(self) -> OctavoError:
        """Read a stream; whatever happens, this task goes on to tell those who wait."""
        try:
            return await self._read_stream()
        except Exception as error:
            return unexpected(error)

    def _fail_too_large(self, error: MessageTooLarge) -> bool:
        """Fail the steps that are over the server's limit; False when there are none."""
        self._on_too_large()
        outcomes = self._exchange.fail_too_large(error)
        deliver(outcomes)
        return bool(outcomes)

    async def _read_stream(self) -> OctavoError:
        """Open a stream and read it to its end; return why it ended."""
        outbox: Outbox = asyncio.Queue()
        self._outbox = outbox
        call = self._open_call(_messages(outbox))
        self._send(self._exchange.on_open(asyncio.get_running_loop().time()))
        try:
            async for response in call:
                if self._on_result(response):
                    break
        except grpc.RpcError as error:
            return error_from_rpc(error)
        finally:
            call.cancel()
            outbox.put_nowait(None)
        return self._exchange.ended()

    def _on_result(self, result: Result) -> bool:
        """Take a result; return whether it is time for another stream."""
        outcomes, to_send, is_drained = self._exchange.on_result(
            result, asyncio.get_running_loop().time()
        )
        self._send(to_send)
        if outcomes:
            self._backoff.reset()
        deliver(outcomes)
        return is_drained

    def _watch(self, deadline: float) -> None:
        if self._timer is None or deadline < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        try:
            outcomes, to_send, _ = self._exchange.expire(asyncio.get_running_loop().time())
        except Exception as error:
            outcomes, to_send = self._exchange.fail_all(unexpected(error)), []
        self._send(to_send)
        deliver(outcomes)
        if len(self._exchange):
            self._watch(self._exchange.next_deadline)


async def _messages(outbox: Outbox) -> AsyncIterator[bytes]:
    while (message := await outbox.get()) is not None:
        yield message
