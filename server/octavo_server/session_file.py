"""A session as the bytes of one safetensors file, written and read as a stream: memory does not grow with the session.

The file is the same whatever the backend, its layout or its block size. After the header, see session_header, come the
tensors, without gaps and in this order: `layers.<i>.k_codes` [num_tokens, num_kv_heads, head_dim] int8,
`layers.<i>.k_scales` [num_tokens, num_kv_heads] float16, the same for v, and last `checksum` uint8 [32]: the SHA-256 of
every byte before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from octavo_server.session_header import (
    CHECKSUM_BYTES,
    FIELDS,
    SavedSession,
    Tensor,
    decode_header,
    encode_header,
    refuse,
    row_shape,
    tensor_bytes,
)

PIECE_BYTES = 512 * 1024
"""Most bytes that are held and moved at a time, or one block where that is more."""

MAX_HEADER_BYTES = 2**20
"""More than the longest names and numbers of the largest model take."""

_INFINITE_BITS = 0x7C00
"""Float16 bits from here on are infinite, NaN or negative."""


class Piece(NamedTuple):
    """Tokens [start, stop) of one tensor of the file; it starts where a block does."""

    layer: int
    field: str
    start: int
    stop: int


class Source(Protocol):
    """Where a file comes from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill up to the whole of `buffer`; return the number of bytes, 0 at the end."""


def write_session(
    saved: SavedSession, values: Iterable[NDArray[Any]]
) -> Iterator[bytes | memoryview]:
    """Yield a file in parts.

    Args:
        saved: Its header.
        values: Of all `pieces`, in their order: [stop - start, num_kv_heads, ...] each.
    """
    header = encode_header(saved)
    digest = hashlib.sha256(header)
    yield header
    for part in values:
        data = _bytes_of(np.ascontiguousarray(part))
        digest.update(data)
        yield data
    yield digest.digest()


class SessionReader:
    """Reads one file; nothing that it returned is to be relied on before `pieces` came to its end.

    Args:
        source: The bytes.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._digest = hashlib.sha256()

    def header(self) -> SavedSession:
        """Read the header.

        Raises:
            InvalidSessionFileError: It is none.
        """
        prefix = self._read(8)
        num_bytes = int.from_bytes(prefix, "little")
        if not 2 <= num_bytes <= MAX_HEADER_BYTES:
            refuse("no safetensors header of at most 1 MiB", num_bytes)
        text = self._read(num_bytes)
        saved = decode_header(text)
        if encode_header(saved) != prefix + text:
            refuse("its header is not as this format writes it")
        return saved

    def pieces(self, saved: SavedSession, block_size: int) -> Iterator[tuple[Piece, NDArray[Any]]]:
        """Read the tensors piece by piece, then hold all of it against the checksum.

        Raises:
            InvalidSessionFileError: It ends too early or too late, is damaged, or holds what no append stores.
        """
        for piece in pieces(saved, block_size):
            values = _empty(saved, piece)
            self._fill(_bytes_of(values))
            _check_values(piece, values)
            yield piece, values
        actual = self._digest.digest()
        if self._read(CHECKSUM_BYTES) != actual:
            refuse("its checksum does not fit: it is damaged")
        if self._source.readinto(memoryview(bytearray(1))):
            refuse("it goes on after its end")

    def _read(self, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    def _fill(self, buffer: memoryview) -> None:
        num_read = 0
        while num_read < len(buffer):
            count = self._source.readinto(buffer[num_read:])
            if not count:
                refuse("it is cut off")
            num_read += count
        self._digest.update(buffer)


def pieces(saved: SavedSession, block_size: int) -> Iterator[Piece]:
    """Yield a file's pieces in its order, each of whole blocks but the last of a tensor."""
    for layer, length in enumerate(saved.lengths):
        for field in FIELDS:
            token_bytes = tensor_bytes(Tensor(layer, field, (1, *row_shape(saved.key, field))))
            step = max(PIECE_BYTES // (token_bytes * block_size), 1) * block_size
            for start in range(0, length, step):
                yield Piece(layer, field, start, min(start + step, length))


def _empty(saved: SavedSession, piece: Piece) -> NDArray[Any]:
    dtype = np.dtype("<f2") if piece.field.endswith("scales") else np.dtype(np.int8)
    return np.empty((piece.stop - piece.start, *row_shape(saved.key, piece.field)), dtype)


def _bytes_of(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _check_values(piece: Piece, values: NDArray[Any]) -> None:
    where = f"layers.{piece.layer}.{piece.field}"
    if piece.field.endswith("scales"):
        if (values.view(np.uint16) >= _INFINITE_BITS).any():
            refuse(f"{where} holds a scale that is negative, infinite or NaN")
    elif values.min() == np.iinfo(np.int8).min:
        refuse(f"{where} holds the code -128, which nothing is stored as")
