"""Random q, k and v: the draws that the bound on the error is stated for."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from octavo_server.backends.base import HostArray
from octavo_server.model import ModelSpec

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)

DRAWS = ("normal", "normal_times_4", "three_channels", "one_token", "near_uniform")


class Inputs(NamedTuple):
    """What a step brings, one dtype for all three.

    Attributes:
        q: [num_tokens, num_q_heads, head_dim].
        k: [num_tokens, num_kv_heads, head_dim].
        v: Like k.
    """

    q: HostArray
    k: HostArray
    v: HostArray


def draw(
    name: str, rng: np.random.Generator, num_tokens: int, spec: ModelSpec, dtype: np.dtype[Any]
) -> Inputs:
    """Draw the inputs of `num_tokens` tokens.

    Args:
        name: One of DRAWS. "three_channels" has three channels of q and K at 10x, "one_token" has K
            and V of its middle token at 20x, "near_uniform" has scores close to 0.
        rng: Source of randomness.
        num_tokens: Tokens to draw.
        spec: The model, for its heads and head_dim.
        dtype: Element type of all three.
    """
    q = _normal(rng, num_tokens, spec.num_q_heads, spec.head_dim)
    k = _normal(rng, num_tokens, spec.num_kv_heads, spec.head_dim)
    v = _normal(rng, num_tokens, spec.num_kv_heads, spec.head_dim)
    channels = [1, spec.head_dim // 2, spec.head_dim - 2]
    match name:
        case "normal":
            pass
        case "normal_times_4":
            q, k, v = q * 4, k * 4, v * 4
        case "three_channels":
            q[..., channels] *= 10
            k[..., channels] *= 10
        case "one_token":
            k[num_tokens // 2] *= 20
            v[num_tokens // 2] *= 20
        case "near_uniform":
            q *= 0.01
        case _:
            raise ValueError(f"draw must be one of {DRAWS}, got {name!r}")
    return Inputs(q.astype(dtype), k.astype(dtype), v.astype(dtype))


def _normal(
    rng: np.random.Generator, num_tokens: int, num_heads: int, head_dim: int
) -> NDArray[np.float32]:
    return rng.standard_normal((num_tokens, num_heads, head_dim), dtype=np.float32)
