"""The sync client's sessions. All logic is in modules that the asyncio client shares."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _retry
from octavo_client._append import Progress, plan_append
from octavo_client._errors import OctavoError
from octavo_client._mirror import Mirror
from octavo_client._tensors import num_rows
from octavo_client._transfer import Place, TransferProgress
from octavo_client._types import DecodeResult, Entry, Model, SessionState, StepOptions
from octavo_client._wire import truncate_request

if TYPE_CHECKING:
    from octavo_client._sync import Client


class Session:
    """An open session: the cached tokens of one sequence, and what the client knows of them.

    Made by Client.open_session and Client.attach. A context manager: leaving it closes the session on the server.
    """

    def __init__(self, client: Client, mirror: Mirror) -> None:
        self._client = client
        self._mirror = mirror
        self._closing = threading.Lock()

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
        entry = Entry(self, layer, num_rows(q), start_pos)
        result: DecodeResult = self._client._run([entry], (q, k, v), options, is_single=True)
        return result

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

        Steps of one layer take effect in the order submitted. Without k and v nothing changes. When a step before had
        no answer, and start_pos is None, the server is asked for the session's lengths first.

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
            CallTimeout, ConnectionLost, SessionNotFound: The server was to be asked first, and this came of it.
        """
        entry = Entry(self, layer, num_rows(q), start_pos)
        return self._client._submit([entry], (q, k, v), options, is_single=True)

    def truncate(self, length: int, *, guard: bool = False) -> None:
        """Forget the tokens from position `length` on, in every layer; waits for the session's steps in flight.

        A session has one writer at a time. Without the guard, a truncate whose answer was lost is sent again, and takes
        with it whatever another writer appended in between.

        Args:
            length: Tokens to keep; layers with fewer stay as they are.
            guard: Refuse when the server's lengths are not those that this client knows.

        Raises:
            PositionMismatch: The guard found another length; nothing changed.
            CallTimeout, ConnectionLost: There was no answer; the next step asks the server for the lengths.
            ValueError: No session is so long.
        """
        self._wait_for_steps()
        expected = self._mirror.stored if guard else ()
        rule = _retry.TRUNCATE_GUARDED if guard else _retry.TRUNCATE
        request = truncate_request(self.session_id, length, expected)
        with self._mirror.truncating():
            response = self._client._call(rule, request)
        with self._client._stream.lock:
            self._mirror.refresh(response.session.lengths)

    def export_to(self, sink: Place, *, progress: TransferProgress | None = None) -> int:
        """Write this session to a file, once its steps in flight are answered; see Client.export_session."""
        self._wait_for_steps()
        return self._client.export_session(self.session_id, sink, progress=progress)

    def refresh(self) -> SessionState:
        """Ask the server for the session, and go on from its lengths."""
        return self._client._refresh(self._mirror)

    def close(self) -> None:
        """Close the session and free its blocks, once its steps in flight are answered.

        It takes no more steps from then on. Closing it again does nothing, or tries again when it failed.
        """
        with self._closing:
            if self._mirror.is_gone:
                return
            with self._client._stream.lock:
                self._mirror.is_closed = True
            self._wait_for_steps()
            request = pb.CloseSessionRequest(session_id=self.session_id)
            with self._mirror.closing():
                self._client._call(_retry.CLOSE_SESSION, request)

    def _wait_for_steps(self) -> None:
        wait(self._client._stream.futures(self.handle))
