"""The asyncio client's sessions; the sync ones, method by method the same, document in full."""

from __future__ import annotations

import asyncio
import contextlib
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
    from octavo_client._async import AsyncClient


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

    async def export_to(self, sink: Place, *, progress: TransferProgress | None = None) -> int:
        """Write this session to a safetensors file; as Session.export_to."""
        await self._wait_for_steps()
        return await self._client.export_session(self.session_id, sink, progress=progress)

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
