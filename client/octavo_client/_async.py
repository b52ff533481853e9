"""The asyncio client; the sync one, method by method the same, documents in full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeVar, Unpack

import grpc

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _pipeline, _retry
from octavo_client._append import AppendPlan, Progress
from octavo_client._async_session import AsyncSession
from octavo_client._async_stream import AsyncDecodeStream
from octavo_client._calls import run_call_async, run_export_async, run_import_async
from octavo_client._channel import (
    APPEND_RPC,
    DECODE_RPC,
    EXPORT_RPC,
    IMPORT_RPC,
    calling,
    channel_options,
    open_channel,
    unary_rpc,
)
from octavo_client._config import Retry, Timeout
from octavo_client._credentials import CallMetadata, Tls, TokenSource
from octavo_client._errors import MessageTooLarge, RefusedError
from octavo_client._mirror import Mirror
from octavo_client._order import Turns
from octavo_client._pipeline import Action, Receive, Steps, Submit
from octavo_client._retry import Attempts, CallRule
from octavo_client._shared_memory import SharedMemory
from octavo_client._status import error_from_rpc
from octavo_client._steps import Placement, draft_step
from octavo_client._transfer import Origin, Place, Sink, TransferProgress
from octavo_client._types import (
    BatchResult,
    Entry,
    ServerInfo,
    ServerStats,
    SessionOptions,
    SessionState,
    StepOptions,
)
from octavo_client._wire import (
    PAGE_SIZE,
    import_request,
    open_request,
    read_leases,
    read_server_info,
    read_server_stats,
    read_session,
    renewals,
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
        tls: Encrypts, and checks who the server is; None = plain text.
        token: As Client's; a function must not wait.
        route: As Client's.

    Raises:
        ValueError: A file of `tls` cannot be used, or the token or the route cannot be sent.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: Timeout | None = None,
        retry: Retry | None = None,
        shared_memory: bool = False,
        tls: Tls | None = None,
        token: TokenSource | None = None,
        route: str | None = None,
    ) -> None:
        self._timeout = timeout or Timeout()
        self._retry = retry or Retry()
        self._memory = SharedMemory() if shared_memory else None
        self._metadata = CallMetadata(token, route)
        options = channel_options(self._timeout, self._retry)
        self._channel: grpc.aio.Channel = open_channel(grpc.aio, target, options, tls, token)
        self._append_rpc = calling(self._channel.stream_unary(*APPEND_RPC), self._metadata)
        self._export_rpc = calling(self._channel.unary_stream(*EXPORT_RPC), self._metadata)
        self._import_rpc = calling(self._channel.stream_unary(*IMPORT_RPC), self._metadata)
        self._decode_rpc = self._channel.stream_stream(*DECODE_RPC)
        self._stream = AsyncDecodeStream(
            lambda messages: self._decode_rpc(messages, metadata=self._metadata()),
            self._retry,
            self._forget_info,
            self._memory,
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

    async def open_session(self, model: str, **options: Unpack[SessionOptions]) -> AsyncSession:
        """Open an empty session of a model; as Client.open_session."""
        response = await self._call(_retry.OPEN_SESSION, open_request(model, options))
        return await self._session(read_session(response.session))

    async def keep_alive(self, sessions: Iterable[AsyncSession]) -> dict[str, RefusedError]:
        """Renew the leases of sessions that are not in use; as Client.keep_alive."""
        ended: dict[str, RefusedError] = {}
        for request in renewals(sessions):
            ended |= read_leases(await self._call(_retry.KEEP_ALIVE, request))
        return ended

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

    async def export_session(
        self, session_id: str, sink: Place, *, progress: TransferProgress | None = None
    ) -> int:
        """Write a session to a safetensors file; as Client.export_session."""
        target = Sink(sink, progress)
        return await run_export_async(
            self._export_rpc, session_id, target, self._append_attempts(), self._stream.check_open
        )

    async def import_session(
        self,
        source: Place,
        *,
        model: str = "",
        progress: TransferProgress | None = None,
        **options: Unpack[SessionOptions],
    ) -> AsyncSession:
        """Open a session with the cache of an exported one; as Client.import_session."""
        max_message_bytes = (await self._known_info()).max_message_bytes
        request = import_request(model, options)
        origin = Origin(source, request, progress, max_message_bytes)
        session = await run_import_async(
            self._import_rpc, origin, self._append_attempts(), self._stream.check_open
        )
        return await self._session(read_session(session))

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
        attempts = self._append_attempts()
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

    def _append_attempts(self) -> Attempts:
        return Attempts(self._retry, time.monotonic() + self._timeout.append_s)

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
        rpc = calling(self._channel.unary_unary(*unary_rpc(rule)), self._metadata)
        attempts = Attempts(self._retry, time.monotonic() + self._timeout.call_s)
        return await run_call_async(rpc, rule, request, attempts, self._stream.check_open)
