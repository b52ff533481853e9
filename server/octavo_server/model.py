"""A model as the server knows it: the shape of its cache and the options of its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
SCALE_BYTES = 2


@dataclass(frozen=True, slots=True, eq=False)
class ModelSpec:
    """One model's cache shape and attention options; the per-layer options have one value a layer.

    Attributes:
        name: Unique name of the model.
        num_layers: Layers of the cache.
        num_q_heads: Query heads, a multiple of num_kv_heads.
        num_kv_heads: Key/value heads.
        head_dim: Elements of one head, a multiple of 8 up to 256.
        block_size: Tokens of one block: 16, 32, 64 or 128.
        max_context: Most tokens of one session.
        sm_scale: [num_layers] softmax scale.
        window: [num_layers] tokens of the sliding window, 0 = none.
        soft_cap: [num_layers] soft cap of the scores, 0 = none.
        sinks: [num_layers, num_q_heads] float32 sink logits, or None.
        deterministic: An entry's answer is the same bits whatever else is in the batch and however many threads
            there are; the same tokens cut into other entries may differ in the last bits.
    """

    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_context: int
    sm_scale: tuple[float, ...]
    window: tuple[int, ...]
    soft_cap: tuple[float, ...]
    sinks: NDArray[np.float32] | None = None
    deterministic: bool = False

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one cached token in one layer: INT8 codes and FP16 scales of K and V."""
        return 2 * self.num_kv_heads * (self.head_dim + SCALE_BYTES)

    @property
    def int8_token_bytes(self) -> int:
        """Bytes of one cached token in all layers."""
        return self.num_layers * self.layer_token_bytes

    @property
    def fp16_token_bytes(self) -> int:
        """Bytes that the same token would take in an FP16 cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.block_size * self.int8_token_bytes


def default_sm_scale(head_dim: int) -> float:
    """Return 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim)
