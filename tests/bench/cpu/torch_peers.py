"""torch over contiguous caches [num_sessions, num_kv_heads, length, head_dim], as fast as it can be called.

The q heads of one kv head are folded into rows of one query, so that no cache is read more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from octavo_client.oracle import quantize
from octavo_server.model import default_sm_scale
from tests.bench.cpu.draws import Draw, HalfArray
from tests.bench.cpu.racers import Racer, copies_of, racer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

INT8_WAY = "torch INT8, dequantise, SDPA"
INT8_IN_PLACE = "torch INT8, dequantise into kept buffers, bmm"
TORCH_FLOAT = tuple(f"torch {way} {dtype.upper()}" for dtype in DTYPES for way in ("SDPA", "bmm"))
"""Those whose fastest is torch's best."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attends from q [num_sessions, num_kv_heads, group_size, head_dim] over K and V."""


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """One of K and V in INT8: codes like the cache, scales [num_sessions, num_kv_heads, length, 1] bfloat16."""

    codes: torch.Tensor
    scales: torch.Tensor


def torch_racers(draw: Draw, llc_bytes: int) -> list[Racer]:
    """Return all of torch's ways over a case's tokens."""
    racers = [
        one for name, dtype in DTYPES.items() for one in _float_racers(draw, name, dtype, llc_bytes)
    ]
    return racers + _int8_racers(draw, llc_bytes)


def folded(draw: Draw, dtype: torch.dtype) -> torch.Tensor:
    """Return q as [num_sessions, num_kv_heads, group_size, head_dim]."""
    heads = draw.case.heads
    q = torch.from_numpy(draw.q).to(dtype)
    return q.view(draw.num_sessions, heads.num_kv_heads, heads.group_size, heads.head_dim)


def head_major(x: HalfArray, dtype: torch.dtype) -> torch.Tensor:
    """Return [num_sessions, length, num_kv_heads, head_dim] with heads before tokens."""
    return torch.from_numpy(x).transpose(1, 2).to(dtype).contiguous()


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend by torch's fused kernel."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend by two batched products with a softmax between them."""
    scaled = (q * default_sm_scale(q.shape[-1])).flatten(0, 1)
    scores = torch.bmm(scaled, k.flatten(0, 1).transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), v.flatten(0, 1)).view(q.shape)


def _float_racers(draw: Draw, name: str, dtype: torch.dtype, llc_bytes: int) -> list[Racer]:
    """Return SDPA and bmm over the same caches."""
    k, v = head_major(draw.k, dtype), head_major(draw.v, dtype)
    launch_bytes = k.nbytes + v.nbytes
    num_caches = copies_of(launch_bytes, llc_bytes)
    caches = [(k, v), *((k.clone(), v.clone()) for _ in range(num_caches - 1))]
    q = folded(draw, dtype)

    def racer_by(way: str, attend: Attend) -> Racer:
        return racer(
            f"torch {way} {name.upper()}",
            name,
            launch_bytes,
            num_caches,
            lambda copy: _rows(attend(q, *caches[copy]), draw),
        )

    return [racer_by("SDPA", sdpa), racer_by("bmm", bmm)]


def _int8_racers(draw: Draw, llc_bytes: int) -> list[Racer]:
    """Return the plain way, and the one that keeps its buffers."""
    pair = [_quantized(x) for x in (draw.k, draw.v)]
    launch_bytes = draw.case.cache_bytes
    num_caches = copies_of(launch_bytes, llc_bytes)
    caches = [pair, *([_clone(x) for x in pair] for _ in range(num_caches - 1))]
    buffers = [torch.zeros(x.codes.shape, dtype=torch.bfloat16) for x in pair]
    q = folded(draw, torch.bfloat16)

    def plain(copy: int) -> NDArray[Any]:
        k, v = (x.codes.to(torch.bfloat16) * x.scales for x in caches[copy])
        return _rows(sdpa(q, k, v), draw)

    def in_place(copy: int) -> NDArray[Any]:
        return _rows(bmm(q, *_dequantized(caches[copy], buffers)), draw)

    return [
        racer(name, "int8", launch_bytes, num_caches, answer)
        for name, answer in ((INT8_WAY, plain), (INT8_IN_PLACE, in_place))
    ]


def _dequantized(
    cache: Sequence[Codes], buffers: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (buffer.copy_(x.codes).mul_(x.scales) for x, buffer in zip(cache, buffers, strict=True))
    return k, v


def _quantized(x: HalfArray) -> Codes:
    codes, scales = quantize(x)
    return Codes(
        torch.from_numpy(codes).transpose(1, 2).contiguous(),
        torch.from_numpy(scales).transpose(1, 2).unsqueeze(-1).bfloat16().contiguous(),
    )


def _clone(x: Codes) -> Codes:
    return Codes(x.codes.clone(), x.scales.clone())


def _rows(out: torch.Tensor, draw: Draw) -> NDArray[Any]:
    """Return an answer as [num_sessions, num_q_heads, head_dim]."""
    wide: NDArray[Any] = out.reshape(draw.q.shape).float().numpy()
    return wide
