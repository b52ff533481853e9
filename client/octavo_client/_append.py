"""A prompt's K and V cut into messages, and where to go on after the connection broke. Pure.

Messages go in waves, one Append call each: what a wave's response confirms is stored and is not sent again. When a call
breaks, the lengths that the server reports tell which messages are stored. The last of those is sent again with its
step_key: that the server takes it for a replay proves that the tokens there are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _tensors
from octavo_client._encoding import encode_append, encode_tensors
from octavo_client._errors import ClientClosed, OctavoError, PositionMismatch, message_too_large
from octavo_client._mirror import Mirror
from octavo_client._retry import is_passing
from octavo_client._steps import check_layer
from octavo_client._tensors import HostArray
from octavo_client._wire import check_span, random_key

Progress = Callable[[int, int], object]
"""Called with the tokens stored so far and the tokens to store, both counted once per layer."""

_MAX_MESSAGE_TOKENS = 1024
_MAX_MESSAGE_BYTES = 1 << 20
_WAVE_BYTES = 16 << 20
"""Large enough that the round trip between waves does not count, small enough to report progress and to repeat."""

_HEADER_BYTES = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """One message: rows [row, row + num_tokens) of one layer of k and v."""

    layer: int
    row: int
    num_tokens: int
    start_pos: int
    step_key: int

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start_pos + self.num_tokens


class AppendPlan:
    """An append's messages, in order, and how far they are stored; one caller at a time.

    Args:
        mirror: The session.
        arrays: k and v, [num_layers, num_tokens, num_kv_heads, head_dim], one row a layer of `layers`.
        layers: The layers that they are for.
        start_pos: Position of their first token; None = each layer's length.
        max_message_bytes: Largest message that the server receives.
    """

    def __init__(
        self,
        mirror: Mirror,
        arrays: tuple[HostArray, HostArray],
        layers: Sequence[int],
        start_pos: int | None,
        max_message_bytes: int,
    ) -> None:
        self._mirror = mirror
        self._arrays = arrays
        self._layers = layers
        self._num_tokens = arrays[0].shape[1]
        self._token_bytes: int = 2 * arrays[0][0, 0].nbytes
        starts = [mirror.length(layer) if start_pos is None else start_pos for layer in layers]
        self._pieces = self._cut(starts, self._piece_tokens(max_message_bytes))
        self._next = 0
        self._num_stored = 0
        self._wave_end = 0
        self._resumed_at: Sequence[int] | None = None
        self._failure: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether everything is stored."""
        return self._next == len(self._pieces)

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens stored and tokens to store, counted once per layer."""
        stored = sum(piece.num_tokens for piece in self._pieces[: self._next])
        return stored, self._num_tokens * len(self._layers)

    @contextmanager
    def in_flight(self, lock: AbstractContextManager[object]) -> Iterator[None]:
        """Keep the mirror right while the append is made; after an error, how far it got must be asked for."""
        with lock:
            for piece in self._last_pieces():
                self._mirror.begin(piece.layer, piece.end)
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            with lock:
                for piece in self._last_pieces():
                    self._mirror.settle(piece.layer, piece.end, error)
                self._mirror.is_stale |= error is not None

    def next_wave(self) -> Iterator[bytes]:
        """Return the messages of the next call."""
        num_tokens = 0
        self._wave_end = self._next
        while self._wave_end < len(self._pieces) and num_tokens * self._token_bytes < _WAVE_BYTES:
            num_tokens += self._pieces[self._wave_end].num_tokens
            self._wave_end += 1
        return self._messages(self._pieces[self._next : self._wave_end])

    def on_stored(self) -> None:
        """Note that the call's messages are stored."""
        self._next = self._num_stored = self._wave_end
        self._resumed_at = None

    def resumable(self, error: OctavoError) -> OctavoError:
        """Return a failed call's error when asking for the lengths and going on from there may help.

        A refused position may be our own doing: the server was still storing messages of the broken call when it was
        asked for its lengths. Then it has more by now.

        Raises:
            OctavoError: `error`, when it does not help.
            Exception: What encoding a message raised: gRPC asks for messages in a thread of its own, and only says
                that the call broke.
        """
        if self._failure is not None:
            raise self._failure
        is_ours = self._resumed_at is not None and isinstance(error, PositionMismatch)
        if not (is_ours or is_passing(error)):
            raise error
        return error

    def resume(self, lengths: Sequence[int], error: OctavoError) -> bool:
        """Go on from the last message that is stored.

        Args:
            lengths: [num_layers] what the server has.
            error: Why the call before failed.

        Returns:
            Whether more is stored than ever before: the call that failed got somewhere.

        Raises:
            PositionMismatch: `error`, when nothing was stored since the lengths were asked for before: the position is
                someone else's.
        """
        if isinstance(error, PositionMismatch) and self._resumed_at == lengths:
            raise error
        self._resumed_at = lengths
        num_stored = 0
        while num_stored < len(self._pieces) and self._is_within(num_stored, lengths):
            num_stored += 1
        self._next = max(num_stored - 1, 0)
        has_got_further = num_stored > self._num_stored
        self._num_stored = max(num_stored, self._num_stored)
        return has_got_further

    def _is_within(self, piece_idx: int, lengths: Sequence[int]) -> bool:
        piece = self._pieces[piece_idx]
        return piece.end <= lengths[piece.layer]

    def _piece_tokens(self, max_message_bytes: int) -> int:
        room = min(max_message_bytes, _MAX_MESSAGE_BYTES) - _HEADER_BYTES
        fitting = min(room // self._token_bytes, _MAX_MESSAGE_TOKENS)
        if fitting < 1:
            raise message_too_large(self._token_bytes + _HEADER_BYTES, max_message_bytes)
        return fitting

    def _cut(self, starts: Sequence[int], piece_tokens: int) -> list[Piece]:
        # All layers of the first tokens before the next tokens: the layers' lengths grow together.
        return [
            Piece(layer, row, min(piece_tokens, self._num_tokens - row), start + row, random_key())
            for row in range(0, self._num_tokens, piece_tokens)
            for layer, start in zip(self._layers, starts, strict=True)
        ]

    def _last_pieces(self) -> list[Piece]:
        return self._pieces[-len(self._layers) :]

    def _messages(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        try:
            yield from map(self._message, pieces)
        except Exception as error:
            self._failure = error
            raise

    def _message(self, piece: Piece) -> bytes:
        rows = slice(piece.row, piece.row + piece.num_tokens)
        k, v = (array[self._layers.index(piece.layer), rows] for array in self._arrays)
        header = pb.AppendRequest(
            session_handle=self._mirror.handle,
            layer=piece.layer,
            start_pos=piece.start_pos,
            num_tokens=piece.num_tokens,
            step_key=piece.step_key,
        )
        fields = {pb.AppendRequest.K_FIELD_NUMBER: k, pb.AppendRequest.V_FIELD_NUMBER: v}
        return encode_append(header, encode_tensors(fields))


def plan_append(
    mirror: Mirror,
    tensors: tuple[Any, Any],
    layer: int | None,
    start_pos: int | None,
    max_message_bytes: int,
) -> AppendPlan:
    """Check an append and cut it into messages.

    Args:
        mirror: The session.
        tensors: k and v, [num_layers, num_tokens, num_kv_heads, head_dim], or with a layer [num_tokens, num_kv_heads,
            head_dim].
        layer: The layer that they are for; None = all.
        start_pos: Position of their first token; None = each layer's length.
        max_message_bytes: Largest message that the server receives.

    Raises:
        ValueError: A shape, layer or position that cannot be.
        TypeError: A tensor of another kind or dtype.
        ClientClosed: The session was closed.
        MessageTooLarge: Not even one token fits a message.
    """
    if mirror.is_closed:
        raise ClientClosed(f"session {mirror.session_id} was closed; open a new one")
    k, v = (_tensors.to_host(name, x) for name, x in zip("kv", tensors, strict=True))
    _check(mirror, k, v, layer)
    if start_pos is not None:
        check_span("start_pos", start_pos, k.shape[-3])
    if layer is not None:
        return AppendPlan(mirror, (k[None], v[None]), [layer], start_pos, max_message_bytes)
    layers = range(mirror.model.num_layers)
    return AppendPlan(mirror, (k, v), layers, start_pos, max_message_bytes)


def _check(mirror: Mirror, k: HostArray, v: HostArray, layer: int | None) -> None:
    model = mirror.model
    shape: list[int | str] = ["num_tokens", model.num_kv_heads, model.head_dim]
    if layer is None:
        shape.insert(0, model.num_layers)
    else:
        check_layer(layer, model)
    _tensors.check_shape("k", k, shape)
    _tensors.check_shape("v", v, k.shape)
    _tensors.check_dtype("v", v, k.dtype)
