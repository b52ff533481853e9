"""What a launch counts of the cache that it reads."""

from __future__ import annotations

import numpy as np
import pytest

from octavo_server.backends.base import RaggedBatch
from octavo_server.launch import num_read_tokens
from octavo_server.model import ModelSpec


def spec(*window: int) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        num_layers=len(window),
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=16,
        block_size=16,
        max_context=160,
        sm_scale=(0.25,) * len(window),
        window=window,
        soft_cap=(0.0,) * len(window),
    )


def batch(*entries: tuple[int, int, int]) -> RaggedBatch:
    """Return a batch of entries (layer, kv_len, num_tokens), without what storing takes."""
    layers, kv_lens, num_tokens = zip(*entries, strict=True)
    return RaggedBatch(
        layers=np.array(layers, np.int32),
        start_pos=np.zeros(len(entries), np.int32),
        token_starts=np.cumsum([0, *num_tokens], dtype=np.int32),
        kv_lens=np.array(kv_lens, np.int32),
        is_causal=np.ones(len(entries), np.bool_),
        block_tables=np.empty((len(entries), 0), np.int32),
        slot_mapping=np.empty(0, np.int64),
    )


@pytest.mark.parametrize(
    ("window", "entries", "num_tokens"),
    [
        ((0, 0), [(0, 100, 1), (1, 50, 3)], 150),
        ((0, 0), [(0, 0, 1), (1, 50, 3)], 50),  # a refused entry reads nothing
        ((8, 0), [(0, 100, 1), (1, 50, 3)], 8 + 50),
        ((8, 0), [(0, 100, 4)], 8 + 3),  # the first of four queries sees three tokens more
        ((8, 0), [(0, 5, 2), (0, 0, 9)], 5),
    ],
)
def test_what_attention_reads_ends_at_the_window(
    window: tuple[int, ...], entries: list[tuple[int, int, int]], num_tokens: int
) -> None:
    assert num_read_tokens(spec(*window), batch(*entries)) == num_tokens
