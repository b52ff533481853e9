"""What the demo asks of the model that a server has under the demo's name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from octavo_client import Model
from octavo_client.demo.model import ModelConfig

__all__ = ["differences"]

_SHAPE = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim")

_SCALE_TOLERANCE = 1e-6
"""Relative: the scale travels as float32."""


def differences(
    served: Model, config: ModelConfig, phases: Sequence[Sequence[int]]
) -> Iterator[str]:
    """Yield what the served model must have and has not; nothing where the demo can use it.

    Args:
        served: The server's model.
        config: The model that runs here.
        phases: Of each phase, the lengths in tokens of the sequences that it holds at the same time.
    """
    yield from _shape_differences(served, config)
    yield from _option_differences(served, config)
    yield from _room_differences(served, phases)


def _shape_differences(served: Model, config: ModelConfig) -> Iterator[str]:
    for name in _SHAPE:
        expected, actual = getattr(config, name), getattr(served, name)
        if actual != expected:
            yield f"{name} {expected}, got {actual}"


def _option_differences(served: Model, config: ModelConfig) -> Iterator[str]:
    expected_options = {"sm_scale": config.head_dim**-0.5, "window": 0, "soft_cap": 0}
    for name, expected in expected_options.items():
        others = [
            actual
            for actual in getattr(served, name)
            if not math.isclose(actual, expected, rel_tol=_SCALE_TOLERANCE)
        ]
        if others:
            yield f"{name} {expected:g} in every layer, got {others[0]:g}"
    if served.sinks is not None:
        yield "no sinks, got some"


def _room_differences(served: Model, phases: Sequence[Sequence[int]]) -> Iterator[str]:
    longest = max(map(max, phases))
    if served.max_context < longest:
        yield f"max_context {longest} or more, got {served.max_context}"
    num_blocks = max(sum(-(-n // served.block_size) for n in lengths) for lengths in phases)
    if served.num_free_blocks < num_blocks:
        yield f"{num_blocks} free blocks or more, got {served.num_free_blocks}"
