"""The sync client. All logic is in modules that the asyncio client shares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Self, TypeVar, Unpack

import grpc

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _pipeline, _retry
from octavo_client._append import AppendPlan, Progress
from octavo_client._call import open_call
from octavo_client._calls import run_call, run_export, run_import
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
from octavo_client._pipeline import Action, Receive, Steps, Submit
from octavo_client._retry import Attempts, CallRule
from octavo_client._session import Session
from octavo_client._shared_memory import SharedMemory
from octavo_client._status import error_from_rpc
from octavo_client._steps import Draft, Placement, draft_step
from octavo_client._stream import DecodeStream
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


class Client:
    """A connection to an Octavo server, and the Decode stream of everything that it decodes.

    Safe to use from several threads. Nothing is sent before the first call. A context manager: leaving it closes.

    Args:
        target: The server, such as "localhost:50051" or "unix:/run/octavo.sock"; reached directly, whatever http_proxy
            says.
        timeout: How long to wait for what.
        retry: How often to try again, where that is safe.
        shared_memory: Whether steps of 128 KiB and more leave their tensors in memory shared with the server: on the
            server's machine, as its user, and with `shared_memory: true` in its config. Where that cannot be, a warning
            is logged (logger octavo_client) and tensors go over gRPC.
        tls: Encrypts, and checks who the server is; None = plain text.
        token: The tenant's token, or a function that returns it, asked for every call and every stream, so that a token
            that changed is picked up. In plain text it goes to this machine alone, unless
            Token(..., allow_plaintext=True) says otherwise.
        route: What a proxy in front of several servers hashes, so that all calls of a client reach one of them; None =
            drawn at random.

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
        self._channel: grpc.Channel = open_channel(grpc, target, options, tls, token)
        self._append_rpc = calling(self._channel.stream_unary(*APPEND_RPC), self._metadata)
        self._export_rpc = calling(self._channel.unary_stream(*EXPORT_RPC), self._metadata)
        self._import_rpc = calling(self._channel.stream_unary(*IMPORT_RPC), self._metadata)
        self._stream = DecodeStream(
            lambda: open_call(self._channel, DECODE_RPC[0], self._metadata()),
            self._retry,
            self._forget_info,
            self._memory,
        )
        self._info: ServerInfo | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; steps in flight fail with ClientClosed, sessions stay open on the server."""
        self._stream.close()
        self._channel.close()

    def server_info(self) -> ServerInfo:
        """Return what the server is, what it serves, and its limits."""
        response = self._call(_retry.SERVER_INFO, pb.ServerInfoRequest())
        self._info = read_server_info(response)
        return self._info

    def server_stats(self) -> ServerStats:
        """Return what the server has done since its start, and what it holds now."""
        return read_server_stats(self._call(_retry.SERVER_STATS, pb.ServerStatsRequest()))

    def open_session(self, model: str, **options: Unpack[SessionOptions]) -> Session:
        """Open an empty session of a model.

        Args:
            model: Name of a model of the server.
            **options: See SessionOptions.

        Raises:
            ModelNotFound: The server has no such model.
            SessionLimit, TenantLimit: The server, or this tenant, keeps as many sessions as it may.
            OutOfBlocks, ContextTooLong: There are not so many blocks to reserve.
        """
        response = self._call(_retry.OPEN_SESSION, open_request(model, options))
        return self._session(read_session(response.session))

    def keep_alive(self, sessions: Iterable[Session]) -> dict[str, RefusedError]:
        """Renew the leases of sessions that are not in use.

        Returns:
            Why sessions were not renewed, by session id: they have ended. Empty when all were.
        """
        ended: dict[str, RefusedError] = {}
        for request in renewals(sessions):
            ended |= read_leases(self._call(_retry.KEEP_ALIVE, request))
        return ended

    def attach(self, session_id: str) -> Session:
        """Return an open session, to go on with what another client began.

        Raises:
            SessionNotFound: It is not open.
        """
        return self._session(self.get_session(session_id))

    def get_session(self, session_id: str) -> SessionState:
        """Return a session as it is on the server.

        Raises:
            SessionNotFound: It is not open.
        """
        request = pb.GetSessionRequest(session_id=session_id)
        return read_session(self._call(_retry.GET_SESSION, request).session)

    def list_sessions(self) -> list[SessionState]:
        """Return all open sessions, in the order in which they were opened."""
        sessions: list[SessionState] = []
        request = pb.ListSessionsRequest(page_size=PAGE_SIZE)
        while True:
            response = self._call(_retry.LIST_SESSIONS, request)
            sessions.extend(map(read_session, response.sessions))
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

    def export_session(
        self, session_id: str, sink: Place, *, progress: TransferProgress | None = None
    ) -> int:
        """Write a session, as it is now, to a safetensors file; it stays open.

        Args:
            session_id: The session's.
            sink: A path, at which the file appears once it is whole, or an open file of bytes.
            progress: Called now and then with the bytes written and the bytes of the whole file.

        Returns:
            The file's bytes.

        Raises:
            SessionNotFound: It is not open, or was closed meanwhile.
            PositionMismatch: It was truncated meanwhile.
            CallTimeout, ConnectionLost: It took longer than Timeout.append_s, or trying again did not help.
        """
        attempts, target = self._append_attempts(), Sink(sink, progress)
        return run_export(self._export_rpc, session_id, target, attempts, self._stream.check_open)

    def import_session(
        self,
        source: Place,
        *,
        model: str = "",
        progress: TransferProgress | None = None,
        **options: Unpack[SessionOptions],
    ) -> Session:
        """Open a session, under a new id, with the cache of an exported one.

        Args:
            source: A path, or an open file of bytes.
            model: Name of a model of the server; empty = the one in the file.
            progress: Called now and then, in another thread, with the bytes sent and the bytes of the whole file.
            **options: See SessionOptions; those that are left out are as in the file.

        Raises:
            SnapshotInvalid: The file is no exported session, is damaged, or is of another model.
            ModelNotFound, SessionLimit, TenantLimit, OutOfBlocks, ContextTooLong: The server cannot hold it.
            CallTimeout, ConnectionLost: It took longer than Timeout.append_s, or trying again did not help.
        """
        request = import_request(model, options)
        origin = Origin(source, request, progress, self._known_info().max_message_bytes)
        attempts = self._append_attempts()
        session = run_import(self._import_rpc, origin, attempts, self._stream.check_open)
        return self._session(read_session(session))

    def decode_batch(
        self,
        entries: Sequence[Entry],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        **options: Unpack[StepOptions],
    ) -> BatchResult:
        """Run one step for several sessions or layers and wait for its answer; see submit_batch."""
        result: BatchResult = self._run(entries, (q, k, v), options, is_single=False)
        return result

    def submit_batch(
        self,
        entries: Sequence[Entry],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        **options: Unpack[StepOptions],
    ) -> Future[BatchResult]:
        """Send one step for several sessions or layers of one model; several steps may be in flight.

        Args:
            entries: What the rows of q, k and v belong to, one after the other.
            q: [total_tokens, num_q_heads, head_dim] float16, bfloat16 or float32, numpy or torch.
            k: [total_tokens, num_kv_heads, head_dim] of q's dtype, to be appended; None = only read.
            v: As k.
            **options: See StepOptions.

        Returns:
            A future of the answer. Entries that the server refused are in its `errors`. It raises RefusedError when the
            whole step was refused, StepTimeout or ConnectionLost when there was no answer.

        Raises:
            ValueError, TypeError, MessageTooLarge: The step cannot be sent.
            ClientClosed: The client or a session was closed.
            CallTimeout, ConnectionLost, SessionNotFound: The server was to be asked first, and this came of it.
        """
        return self._submit(entries, (q, k, v), options, is_single=False)

    def pipeline(self, tasks: Iterable[Steps[T]]) -> list[T]:
        """Run micro-batches so that one computes here while the attention of the others is on its way.

        A task is a generator: model code that yields a Step wherever it would call decode_batch, and receives its
        BatchResult:

            def decode(rows):
                x = embed(tokens[rows])
                for layer in range(num_layers):
                    entries = [Entry(session, layer) for session in sessions[rows]]
                    result = yield Step(entries, *project_qkv(layer, x))
                    x = finish_layer(layer, x, result.raise_for_errors().out)
                return logits(x)

            parts = client.pipeline(decode(rows) for rows in micro_batches(len(sessions)))

        It pays while the steps and the computing of half a batch each take about half the time of a whole one: each
        part then hides behind the other. Every micro-batch costs a message a layer. A task may go on over many tokens;
        the pipeline then never runs empty in between. All of it runs in the calling thread, one task at a time; a task
        whose answer is there goes on first, else the one that has waited longest.

        Args:
            tasks: The generators, begun in this order; each has one step in flight. micro_batches cuts a batch.

        Returns:
            What the tasks returned, in their order.

        Raises:
            Exception: What a task raised first, with a note which task it was. What decode_batch would have raised is
                raised at the task's yield, where it can be caught. No step stays behind: those of the other tasks that
                are in flight are waited for, then the tasks are closed. Layers may have come unequally far by then:
                truncate the sessions to a common length before going on.
        """
        return _pipeline.run(_pipeline.schedule(tasks), self._perform)

    def _perform(self, action: Action) -> Any:
        if isinstance(action, Submit):
            step = action.step
            return self.submit_batch(step.entries, step.q, step.k, step.v, **step.options)
        if isinstance(action, Receive):
            return action.future.result()
        return wait(action.futures)

    def _submit(
        self,
        entries: Sequence[Entry],
        tensors: tuple[Any, Any | None, Any | None],
        options: StepOptions,
        *,
        is_single: bool,
    ) -> Future[Any]:
        return self._stream.submit(self._draft(entries, tensors, options), is_single=is_single)

    def _run(
        self,
        entries: Sequence[Entry],
        tensors: tuple[Any, Any | None, Any | None],
        options: StepOptions,
        *,
        is_single: bool,
    ) -> Any:
        return self._stream.run(self._draft(entries, tensors, options), is_single=is_single)

    def _draft(
        self,
        entries: Sequence[Entry],
        tensors: tuple[Any, Any | None, Any | None],
        options: StepOptions,
    ) -> Draft:
        draft = draft_step(
            [self._placement(entry) for entry in entries],
            tensors,
            options,
            default_timeout_s=self._timeout.step_s,
            max_message_bytes=self._known_info().max_message_bytes,
            memory=self._memory,
        )
        for mirror in draft.stale:
            self._refresh(mirror)
        return draft

    def _placement(self, entry: Entry) -> Placement:
        if entry.session._client is not self:
            raise ValueError(f"session {entry.session.session_id} is another client's")
        return Placement(entry.session._mirror, entry.layer, entry.num_tokens, entry.start_pos)

    def _append(self, plan: AppendPlan, mirror: Mirror, progress: Progress | None) -> None:
        attempts = self._append_attempts()
        while not plan.is_done:
            self._stream.check_open()
            try:
                remaining = attempts.remaining(time.monotonic())
                self._append_rpc(plan.next_wave(), timeout=remaining)
            except grpc.RpcError as exc:
                error = error_from_rpc(exc)
                if isinstance(error, MessageTooLarge):
                    self._forget_info()
                error = plan.resumable(error)
                time.sleep(attempts.delay_after(error, time.monotonic()))
                if plan.resume(self.get_session(mirror.session_id).lengths, error):
                    attempts.succeeded()
                continue
            attempts.succeeded()
            plan.on_stored()
            if progress is not None:
                progress(*plan.progress)

    def _append_attempts(self) -> Attempts:
        return Attempts(self._retry, time.monotonic() + self._timeout.append_s)

    def _refresh(self, mirror: Mirror) -> SessionState:
        state = self.get_session(mirror.session_id)
        with self._stream.lock:
            mirror.refresh(state.lengths)
        return state

    def _session(self, state: SessionState) -> Session:
        info = self._known_info()
        if not state.session_id.startswith(info.incarnation) or state.model not in info.models:
            info = self.server_info()
        return Session(self, Mirror(state, info.models[state.model]))

    def _known_info(self) -> ServerInfo:
        return self._info or self.server_info()

    def _forget_info(self) -> None:
        """Ask the server again before the next step: its limits are not those that it told."""
        self._info = None

    def _call(self, rule: CallRule, request: Any) -> Any:
        """Call an rpc, again where its rule allows; None when an attempt without an answer had done it."""
        rpc = calling(self._channel.unary_unary(*unary_rpc(rule)), self._metadata)
        attempts = Attempts(self._retry, time.monotonic() + self._timeout.call_s)
        return run_call(rpc, rule, request, attempts, self._stream.check_open)
