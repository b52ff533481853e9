"""What tells a served model from the demo's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from octavo_client import Model
from octavo_client.demo.model import TinyLlama
from octavo_client.demo.served_model import differences

CONFIG = TinyLlama.load().config
SERVED = Model(
    name="tiny-kjv",
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=32,
    max_context=1024,
    num_blocks=200,
    num_free_blocks=128,
    sm_scale=(0.125,) * 4,
    window=(0,) * 4,
    soft_cap=(0.0,) * 4,
    sinks=None,
    deterministic=True,
)
PHASES = ([33, 32, 1], [1024] * 4)
"""4 blocks, then 128."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"sm_scale": (float(np.float32(0.1250001)),) * 4}, []),  # float32 has 1e-7
        ({"deterministic": False, "name": "other"}, []),
        ({"num_layers": 3}, ["num_layers 4, got 3"]),
        ({"num_q_heads": 8}, ["num_q_heads 4, got 8"]),
        ({"num_kv_heads": 4}, ["num_kv_heads 2, got 4"]),
        ({"head_dim": 128}, ["head_dim 64, got 128"]),
        ({"sm_scale": (0.125, 0.125, 0.12, 0.125)}, ["sm_scale 0.125 in every layer, got 0.12"]),
        ({"window": (0, 0, 0, 512)}, ["window 0 in every layer, got 512"]),
        ({"soft_cap": (30.0, 0.0, 0.0, 0.0)}, ["soft_cap 0 in every layer, got 30"]),
        ({"sinks": np.zeros((4, 4), np.float32)}, ["no sinks, got some"]),
        ({"max_context": 1023}, ["max_context 1024 or more, got 1023"]),
        ({"num_free_blocks": 127}, ["128 free blocks or more, got 127"]),
        ({"block_size": 16}, ["256 free blocks or more, got 128"]),
        (
            {"head_dim": 32, "window": (1,) * 4},
            ["head_dim 64, got 32", "window 0 in every layer, got 1"],
        ),
    ],
)
def test_differences(changes: dict[str, Any], expected: list[str]) -> None:
    assert list(differences(replace(SERVED, **changes), CONFIG, PHASES)) == expected


def test_room_is_that_of_the_largest_phase() -> None:
    served = replace(SERVED, max_context=33, num_free_blocks=4)
    assert list(differences(served, CONFIG, [[33, 32, 1], [0, 0]])) == []
    full = replace(served, num_free_blocks=3)
    assert list(differences(full, CONFIG, [[0, 0], [33, 32, 1]])) == [
        "4 free blocks or more, got 3"
    ]
