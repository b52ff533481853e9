"""Q, K and V of every session, made again from four numbers instead of being kept.

Rows are drawn once. Token `position` of a (session, layer) is the row (offset + position * stride) % num_rows, where
offset and stride are hashed from the session's key and the layer. The number of rows is prime, so a session walks
through all of them, and two sessions or layers walk alike with a chance of one in 67 million: mixed caches show.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from octavo_client._types import Model

NUM_KV_ROWS = 8191
NUM_Q_ROWS = 1021
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

Tensors = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""q, k and v."""


@dataclass(frozen=True, slots=True)
class Walk:
    """The way of one (session, layer) through the rows."""

    offset: int
    stride: int

    def kv_row(self, position: int) -> int:
        """Return the row of K and V of a token."""
        return (self.offset + position * self.stride) % NUM_KV_ROWS

    def kv_rows(self, start_pos: int, num_tokens: int) -> NDArray[np.int64]:
        """Return the rows of K and V of several tokens, [num_tokens]."""
        positions = np.arange(start_pos, start_pos + num_tokens, dtype=np.int64)
        return (self.offset + positions * self.stride) % NUM_KV_ROWS

    def q_row(self, position: int) -> int:
        """Return the row of Q of a token."""
        return (self.offset + position * self.stride) % NUM_Q_ROWS


def walk_of(session_key: int, layer: int) -> Walk:
    """Return the walk of a layer of the session with this 64-bit key."""
    digest = hashlib.blake2b(struct.pack("<QI", session_key, layer), digest_size=16).digest()
    offset, stride = struct.unpack("<QQ", digest)
    return Walk(offset % NUM_KV_ROWS, 1 + stride % (NUM_KV_ROWS - 1))


def session_key(*parts: int) -> int:
    """Return the key of the session that these numbers name."""
    packed = struct.pack(f"<{len(parts)}q", *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a model.

    Attributes:
        q: [NUM_Q_ROWS, num_q_heads, head_dim].
        k: [NUM_KV_ROWS, num_kv_heads, head_dim].
        v: Like k.
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]

    def step(self, walks: list[Walk], positions: list[int]) -> Tensors:
        """Return q, k and v of one token of each walk, each [num_walks, heads, head_dim]."""
        if len(walks) == 1:  # views
            q_row, row = walks[0].q_row(positions[0]), walks[0].kv_row(positions[0])
            return self.q[q_row : q_row + 1], self.k[row : row + 1], self.v[row : row + 1]
        pairs = list(zip(walks, positions, strict=True))
        q_rows = [walk.q_row(position) for walk, position in pairs]
        rows = [walk.kv_row(position) for walk, position in pairs]
        return self.q[q_rows], self.k[rows], self.v[rows]

    def prompt(self, walks: list[Walk], num_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return k and v of the first tokens of some layers, [num_layers, num_tokens, num_kv_heads, head_dim]."""
        rows = np.stack([walk.kv_rows(0, num_tokens) for walk in walks])
        return self.k[rows], self.v[rows]


def draw_rows(seed: int, model: Model, dtype: str) -> Rows:
    """Draw a model's rows from the standard normal distribution; the same on every machine."""
    rng = np.random.default_rng([seed, zlib.crc32(model.name.encode())])

    def draw(num_rows: int, num_heads: int) -> NDArray[Any]:
        shape = (num_rows, num_heads, model.head_dim)
        return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])

    q = draw(NUM_Q_ROWS, model.num_q_heads)
    k, v = (draw(NUM_KV_ROWS, model.num_kv_heads) for _ in "kv")
    return Rows(q, k, v)
