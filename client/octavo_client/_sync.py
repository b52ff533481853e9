"""The sync client: `Client` and `Session`. All logic is in modules that the asyncio client shares."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _retry
from octavo_client._append import AppendPlan, Progress, plan_append
from octavo_client._channel import APPEND_RPC, DECODE_RPC, channel_options, unary_rpc
from octavo_client._config import Retry, Timeout
from octavo_client._errors import OctavoError
from octavo_client._mirror import Mirror
from octavo_client._retry import Attempts, CallRule
from octavo_client._status import error_from_rpc
from octavo_client._steps import Placement, draft_step
from octavo_client._stream import DecodeStream
from octavo_client._tensors import num_rows
from octavo_client._types import (
    BatchResult,
    DecodeResult,
    Entry,
    Model,
    ServerInfo,
    SessionState,
    StepOptions,
)
from octavo_client._wire import (
    PAGE_SIZE,
    open_request,
    read_server_info,
    read_session,
    truncate_request,
)


class Client:
    """A connection to an Octavo server, and the Decode stream of everything that it decodes.

    Safe to use from several threads. Nothing is sent before the first call. A context manager: leaving it closes.

    Args:
        target: The server, such as "localhost:50051".
        timeout: How long to wait for what.
        retry: How often to try again, where that is safe.
    """

    def __init__(
        self, target: str, *, timeout: Timeout | None = None, retry: Retry | None = None
    ) -> None:
        self._timeout = timeout or Timeout()
        self._retry = retry or Retry()
        options = channel_options(self._timeout, self._retry)
        self._channel = grpc.insecure_channel(target, options)
        self._append_rpc = self._channel.stream_unary(*APPEND_RPC)
        self._decode_rpc = self._channel.stream_stream(*DECODE_RPC)
        self._stream = DecodeStream(self._decode_rpc, self._retry)
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

    def open_session(self, model: str) -> Session:
        """Open an empty session of a model.

        Raises:
            ModelNotFound: The server has no such model.
            SessionLimit: The server keeps as many sessions as it may.
        """
        response = self._call(_retry.OPEN_SESSION, open_request(model))
        return self._session(read_session(response.session))

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

    def decode_batch(
        self,
        entries: Sequence[Entry],
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        **options: Unpack[StepOptions],
    ) -> BatchResult:
        """Run one step for several sessions or layers and wait for its answer; see submit_batch."""
        return self.submit_batch(entries, q, k, v, **options).result()

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
        """
        return self._submit(entries, (q, k, v), options, is_single=False)

    def _submit(
        self,
        entries: Sequence[Entry],
        tensors: tuple[Any, Any | None, Any | None],
        options: StepOptions,
        *,
        is_single: bool,
    ) -> Future[Any]:
        draft = draft_step(
            [self._placement(entry) for entry in entries],
            tensors,
            options,
            default_timeout_s=self._timeout.step_s,
            max_message_bytes=self._known_info().max_message_bytes,
        )
        for mirror in draft.stale:
            self._refresh(mirror)
        return self._stream.submit(draft, is_single=is_single)

    def _placement(self, entry: Entry) -> Placement:
        if entry.session._client is not self:
            raise ValueError(f"session {entry.session.session_id} is another client's")
        return Placement(entry.session._mirror, entry.layer, entry.num_tokens, entry.start_pos)

    def _append(self, plan: AppendPlan, mirror: Mirror, progress: Progress | None) -> None:
        attempts = Attempts(self._retry, time.monotonic() + self._timeout.append_s)
        while not plan.is_done:
            self._stream.check_open()
            try:
                remaining = attempts.remaining(time.monotonic())
                self._append_rpc(plan.next_wave(), timeout=remaining)
            except grpc.RpcError as exc:
                error = plan.resumable(error_from_rpc(exc))
                time.sleep(attempts.delay_after(error, time.monotonic()))
                plan.resume(self.get_session(mirror.session_id).lengths, error)
                continue
            attempts.succeeded()
            plan.on_stored()
            if progress is not None:
                progress(*plan.progress)

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

    def _call(self, rule: CallRule, request: Any) -> Any:
        """Call an rpc, again where its rule allows; None when an attempt without an answer had done it."""
        method = self._channel.unary_unary(*unary_rpc(rule))
        attempts = Attempts(self._retry, time.monotonic() + self._timeout.call_s)
        while True:
            self._stream.check_open()
            try:
                return method(request, timeout=attempts.remaining(time.monotonic()))
            except grpc.RpcError as exc:
                error = error_from_rpc(exc, changes=rule.changes)
            delay = attempts.delay_by_rule(rule, error, time.monotonic())
            if delay is None:
                return None
            time.sleep(delay)


class Session:
    """An open session: the cached tokens of one sequence, and what the client knows of them.

    Made by Client.open_session and Client.attach. A context manager: leaving it closes the session on the server.
    """

    def __init__(self, client: Client, mirror: Mirror) -> None:
        self._client = client
        self._mirror = mirror

    def __repr__(self) -> str:
        return f"<Session {self.session_id} of {self.model.name!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What failed inside is what the caller should see; the server closes what we cannot.
        with contextlib.suppress(*(() if exc_type is None else (OctavoError,))):
            self.close()

    @property
    def session_id(self) -> str:
        """Name for people, and for Client.attach."""
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
        with self._client._stream.lock:
            return self._mirror.lengths

    def append(
        self,
        k: Any,
        v: Any,
        *,
        layer: int | None = None,
        start_pos: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Append K and V of many tokens, a prompt, without attention.

        Waits for the session's steps in flight, and goes on by itself where a broken connection stopped it.

        Args:
            k: [num_layers, num_tokens, num_kv_heads, head_dim] for all layers, or with `layer` [num_tokens,
                num_kv_heads, head_dim]; float16, bfloat16 or float32, numpy or torch.
            v: As k.
            layer: The only layer that it is for.
            start_pos: Position of the first token; None = each layer's length.
            progress: Called now and then with (tokens stored, tokens to store), both counted once per layer.

        Raises:
            RefusedError: The server refused a message; those before it stay stored (refresh() tells how many).
            CallTimeout, ConnectionLost: It took longer than Timeout.append_s, or trying again did not help.
            ValueError, TypeError: The arrays cannot be appended.
        """
        self._wait_for_steps()
        if self._mirror.is_stale and start_pos is None:
            self.refresh()
        max_message_bytes = self._client._known_info().max_message_bytes
        plan = plan_append(self._mirror, (k, v), layer, start_pos, max_message_bytes)
        with plan.in_flight(self._client._stream.lock):
            self._client._append(plan, self._mirror, progress)

    def decode(
        self,
        layer: int,
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        *,
        start_pos: int | None = None,
        **options: Unpack[StepOptions],
    ) -> DecodeResult:
        """Append K and V of new tokens to a layer, attend with Q, and wait for the answer; see submit."""
        return self.submit(layer, q, k, v, start_pos=start_pos, **options).result()

    def submit(
        self,
        layer: int,
        q: Any,
        k: Any | None = None,
        v: Any | None = None,
        *,
        start_pos: int | None = None,
        **options: Unpack[StepOptions],
    ) -> Future[DecodeResult]:
        """Append K and V of new tokens to a layer and attend with Q, without waiting for the answer.

        Steps of one layer take effect in the order submitted. Without k and v nothing changes.

        Args:
            layer: 0-based layer.
            q: [num_tokens, num_q_heads, head_dim] float16, bfloat16 or float32, numpy or torch.
            k: [num_tokens, num_kv_heads, head_dim] of q's dtype, to be appended; None = only read.
            v: As k.
            start_pos: Position of the first token; None = the layer's length, or without k and v the position that
                makes the last query the last cached token.
            **options: See StepOptions.

        Returns:
            A future of the answer. It raises RefusedError when the server refused the step, StepTimeout or
            ConnectionLost when there was no answer.

        Raises:
            ValueError, TypeError, MessageTooLarge: The step cannot be sent.
            ClientClosed: The client or the session was closed.
        """
        entry = Entry(self, layer, num_rows(q), start_pos)
        return self._client._submit([entry], (q, k, v), options, is_single=True)

    def truncate(self, length: int, *, guard: bool = False) -> None:
        """Forget the tokens from position `length` on, in every layer; waits for the session's steps in flight.

        Args:
            length: Tokens to keep; layers with fewer stay as they are.
            guard: Refuse when the server's lengths are not those that this client knows.

        Raises:
            PositionMismatch: The guard found another length; nothing changed.
        """
        self._wait_for_steps()
        expected = self._mirror.stored if guard else ()
        rule = _retry.TRUNCATE_GUARDED if guard else _retry.TRUNCATE
        response = self._client._call(rule, truncate_request(self.session_id, length, expected))
        with self._client._stream.lock:
            self._mirror.refresh(response.session.lengths)

    def refresh(self) -> SessionState:
        """Ask the server for the session, and go on from its lengths."""
        return self._client._refresh(self._mirror)

    def close(self) -> None:
        """Close the session and free its blocks; closing it again does nothing."""
        if not self._mirror.is_closed:
            self._mirror.is_closed = True
            request = pb.CloseSessionRequest(session_id=self.session_id)
            self._client._call(_retry.CLOSE_SESSION, request)

    def _wait_for_steps(self) -> None:
        wait(self._client._stream.futures(self.handle))
