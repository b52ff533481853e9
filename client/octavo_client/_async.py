"""The asyncio client: `AsyncClient` and `AsyncSession`; the sync one, method by method the same, documents in full."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _pipeline, _retry
from octavo_client._append import AppendPlan, Progress, plan_append
from octavo_client._async_stream import AsyncDecodeStream
from octavo_client._channel import APPEND_RPC, DECODE_RPC, channel_options, unary_rpc
from octavo_client._config import Retry, Timeout
from octavo_client._errors import MessageTooLarge, OctavoError
from octavo_client._mirror import Mirror
from octavo_client._order import Turns
from octavo_client._pipeline import Action, Receive, Steps, Submit
from octavo_client._retry import Attempts, CallRule
from octavo_client._shared_memory import SharedMemory
from octavo_client._status import error_from_rpc
from octavo_client._steps import Placement, draft_step
from octavo_client._tensors import num_rows
from octavo_client._types import (
    BatchResult,
    DecodeResult,
    Entry,
    Model,
    ServerInfo,
    ServerStats,
    SessionState,
    StepOptions,
)
from octavo_client._wire import (
    PAGE_SIZE,
    open_request,
    read_server_info,
    read_server_stats,
    read_session,
    truncate_request,
)

T = TypeVar("T")


class AsyncClient:
    """A connection to an Octavo server, and the Decode stream of everything that it decodes; for asyncio.

    Made, used and closed on one running event loop. An async context manager: leaving it closes.

    Args:
        target: The server, such as "localhost:50051" or "unix:/run/octavo.sock"; reached directly, whatever http_proxy
            says.
        timeout: How long to wait for what.
        retry: How often to try again, where that is safe.
        shared_memory: Whether steps of 128 KiB and more leave their tensors in memory shared with the server: on the
            server's machine, as its user, and with `shared_memory: true` in its config. Where that cannot be, a warning
            is logged (logger octavo_client) and tensors go over gRPC.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: Timeout | None = None,
        retry: Retry | None = None,
        shared_memory: bool = False,
    ) -> None:
        self._timeout = timeout or Timeout()
        self._retry = retry or Retry()
        self._memory = SharedMemory() if shared_memory else None
        options = channel_options(self._timeout, self._retry)
        self._channel = grpc.aio.insecure_channel(target, options)
        self._append_rpc = self._channel.stream_unary(*APPEND_RPC)
        self._decode_rpc = self._channel.stream_stream(*DECODE_RPC)
        self._stream = AsyncDecodeStream(
            self._decode_rpc, self._retry, self._forget_info, self._memory
        )
        self._turns = Turns()
        self._info: ServerInfo | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; steps in flight fail with ClientClosed, sessions stay open on the server."""
        await self._stream.close()
        await self._channel.close(None)

    async def server_info(self) -> ServerInfo:
        """Return what the server is, what it serves, and its limits."""
        response = await self._call(_retry.SERVER_INFO, pb.ServerInfoRequest())
        self._info = read_server_info(response)
        return self._info

    async def server_stats(self) -> ServerStats:
        """Return what the server has done since its start, and what it holds now."""
        return read_server_stats(await self._call(_retry.SERVER_STATS, pb.ServerStatsRequest()))

    async def open_session(self, model: str) -> AsyncSession:
        """Open an empty session of a model; as Client.open_session."""
        response = await self._call(_retry.OPEN_SESSION, open_request(model))
        return await self._session(read_session(response.session))

    async def attach(self, session_id: str) -> AsyncSession:
        """Return an open session, to go on with what another client began; as Client.attach."""
        return await self._session(await self.get_session(session_id))

    async def get_session(self, session_id: str) -> SessionState:
        """Return a session as it is on the server; as Client.get_session."""
        request = pb.GetSessionRequest(session_id=session_id)
        return read_session((await self._call(_retry.GET_SESSION, request)).session)

    async def list_sessions(self) -> list[SessionState]:
        """Return all open sessions, in the order in which they were opened."""
        sessions: list[SessionState] = []
        request = pb.ListSessionsRequest(page_size=PAGE_SIZE)
        while True:
            response = await self._call(_retry.LIST_SESSIONS, request)
            sessions.extend(map(read_session, response.sessions))
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    async def decode_batch(
        self,
        entries: Sequence[Entry],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        **options: Unpack[StepOptions],
    ) -> BatchResult:
        """Run one step for several sessions or layers and wait for its answer; as Client.decode_batch."""
        return await (await self.submit_batch(entries, q, k, v, **options))

    async def submit_batch(
        self,
        entries: Sequence[Entry],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        **options: Unpack[StepOptions],
    ) -> asyncio.Future[BatchResult]:
        """Send one step for several sessions or layers of one model; as Client.submit_batch.

        Returns:
            A future of the answer, once the step has its place. Cancelling it gives the step up; one that was sent may
            still be applied.
        """
        return await self._submit(entries, (q, k, v), options, is_single=False)

    async def pipeline(self, tasks: Iterable[Steps[T]]) -> list[T]:
        """Run micro-batches so that one computes here while the attention of the others is on its way.

        As Client.pipeline, and for the same generators; they compute on the event loop. Cancelling it closes them and
        gives their steps in flight up; those that were sent may still be applied. Model code that awaits needs none of
        it: coroutines that call decode_batch overlap in an asyncio.TaskGroup.
        """
        return await _pipeline.run_async(_pipeline.schedule(tasks), self._perform)

    async def _perform(self, action: Action) -> Any:
        if isinstance(action, Submit):
            step = action.step
            return await self.submit_batch(step.entries, step.q, step.k, step.v, **step.options)
        if isinstance(action, Receive):
            return await action.future
        return await _pipeline.settle_async(action.futures, action.cause)

    async def _submit(
        self,
        entries: Sequence[Entry],
        tensors: tuple[Any, Any | None, Any | None],
        options: StepOptions,
        *,
        is_single: bool,
    ) -> asyncio.Future[Any]:
        placements = [self._placement(entry) for entry in entries]
        # A session's steps take their places in the order of the calls, although a call may ask the server first.
        async with self._turns.turn({placement.mirror for placement in placements}):
            draft = draft_step(
                placements,
                tensors,
                options,
                default_timeout_s=self._timeout.step_s,
                max_message_bytes=(await self._known_info()).max_message_bytes,
                memory=self._memory,
            )
            for mirror in draft.stale:
                await self._refresh(mirror)
            return self._stream.submit(draft, is_single=is_single)

    def _placement(self, entry: Entry) -> Placement:
        if entry.session._client is not self:
            raise ValueError(f"session {entry.session.session_id} is another client's")
        return Placement(entry.session._mirror, entry.layer, entry.num_tokens, entry.start_pos)

    async def _append(self, plan: AppendPlan, mirror: Mirror, progress: Progress | None) -> None:
        attempts = Attempts(self._retry, time.monotonic() + self._timeout.append_s)
        while not plan.is_done:
            self._stream.check_open()
            try:
                remaining = attempts.remaining(time.monotonic())
                await self._append_rpc(plan.next_wave(), timeout=remaining)
            except grpc.RpcError as exc:
                error = error_from_rpc(exc)
                if isinstance(error, MessageTooLarge):
                    self._forget_info()
                error = plan.resumable(error)
                await asyncio.sleep(attempts.delay_after(error, time.monotonic()))
                if plan.resume((await self.get_session(mirror.session_id)).lengths, error):
                    attempts.succeeded()
                continue
            attempts.succeeded()
            plan.on_stored()
            if progress is not None:
                progress(*plan.progress)

    async def _refresh(self, mirror: Mirror) -> SessionState:
        state = await self.get_session(mirror.session_id)
        mirror.refresh(state.lengths)
        return state

    async def _session(self, state: SessionState) -> AsyncSession:
        info = await self._known_info()
        if not state.session_id.startswith(info.incarnation) or state.model not in info.models:
            info = await self.server_info()
        return AsyncSession(self, Mirror(state, info.models[state.model]))

    async def _known_info(self) -> ServerInfo:
        return self._info or await self.server_info()

    def _forget_info(self) -> None:
        """Ask the server again before the next step: its limits are not those that it told."""
        self._info = None

    async def _call(self, rule: CallRule, request: Any) -> Any:
        """Call an rpc, again where its rule allows; None when an attempt without an answer had done it."""
        method = self._channel.unary_unary(*unary_rpc(rule))
        attempts = Attempts(self._retry, time.monotonic() + self._timeout.call_s)
        while True:
            self._stream.check_open()
            try:
                return await method(request, timeout=attempts.remaining(time.monotonic()))
            except grpc.RpcError as exc:
                error = error_from_rpc(exc, changes=rule.changes)
            delay = attempts.delay_by_rule(rule, error, time.monotonic())
            if delay is None:
                return None
            await asyncio.sleep(delay)


class AsyncSession:
    """An open session: the cached tokens of one sequence, and what the client knows of them; for asyncio.

    Made by AsyncClient.open_session and AsyncClient.attach. An async context manager: leaving it closes the session on
    the server.
    """

    def __init__(self, client: AsyncClient, mirror: Mirror) -> None:
        self._client = client
        self._mirror = mirror
        self._closing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<AsyncSession {self.session_id} of {self.model.name!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What failed inside is what the caller should see; the server closes what we cannot.
        with contextlib.suppress(*(() if exc_type is None else (OctavoError,))):
            await self.close()

    @property
    def session_id(self) -> str:
        """Name for people, and for AsyncClient.attach."""
        return self._mirror.session_id

    @property
    def handle(self) -> int:
        """Name on the wire's data calls."""
        return self._mirror.handle

    @property
    def model(self) -> Model:
        """The session's model."""
        return self._mirror.model

    @property
    def lengths(self) -> tuple[int, ...]:
        """[num_layers] cached tokens as far as known, everything in flight included; refresh() asks the server."""
        return self._mirror.lengths

    async def append(
        self,
        k: Any,
        v: Any,
        *,
        layer: int | None = None,
        start_pos: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Append K and V of many tokens, a prompt, without attention; as Session.append."""
        await self._wait_for_steps()
        if self._mirror.is_stale and start_pos is None:
            await self.refresh()
        max_message_bytes = (await self._client._known_info()).max_message_bytes
        plan = plan_append(self._mirror, (k, v), layer, start_pos, max_message_bytes)
        with plan.in_flight(contextlib.nullcontext()):
            await self._client._append(plan, self._mirror, progress)

    async def decode(
        self,
        layer: int,
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        *,
        start_pos: int | None = None,
        **options: Unpack[StepOptions],
    ) -> DecodeResult:
        """Append K and V of new tokens to a layer, attend with Q, and wait for the answer; as Session.decode."""
        return await (await self.submit(layer, q, k, v, start_pos=start_pos, **options))

    async def submit(
        self,
        layer: int,
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        *,
        start_pos: int | None = None,
        **options: Unpack[StepOptions],
    ) -> asyncio.Future[DecodeResult]:
        """Append K and V of new tokens to a layer and attend with Q, without waiting; as Session.submit.

        Returns:
            A future of the answer, once the step has its place. Cancelling it gives the step up; one that was sent may
            still be applied.
        """
        entry = Entry(self, layer, num_rows(q), start_pos)
        return await self._client._submit([entry], (q, k, v), options, is_single=True)

    async def truncate(self, length: int, *, guard: bool = False) -> None:
        """Forget the tokens from position `length` on, in every layer; as Session.truncate."""
        await self._wait_for_steps()
        expected = self._mirror.stored if guard else ()
        rule = _retry.TRUNCATE_GUARDED if guard else _retry.TRUNCATE
        request = truncate_request(self.session_id, length, expected)
        with self._mirror.truncating():
            response = await self._client._call(rule, request)
        self._mirror.refresh(response.session.lengths)

    async def refresh(self) -> SessionState:
        """Ask the server for the session, and go on from its lengths."""
        return await self._client._refresh(self._mirror)

    async def close(self) -> None:
        """Close the session and free its blocks, once its steps in flight are answered; as Session.close."""
        async with self._closing:
            if self._mirror.is_gone:
                return
            self._mirror.is_closed = True
            await self._wait_for_steps()
            request = pb.CloseSessionRequest(session_id=self.session_id)
            with self._mirror.closing():
                await self._client._call(_retry.CLOSE_SESSION, request)

    async def _wait_for_steps(self) -> None:
        futures = self._client._stream.futures(self.handle)
        if futures:
            await asyncio.wait(futures)
