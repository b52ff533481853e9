"""Other people's decode kernels, over the same tokens in BF16 or FP8."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.bench.checks import context_of, exact_attention, relative_error
from tests.bench.contest import Contestant
from tests.bench.pool import HostStep, Pool
from tests.bench.shapes import LLAMA, Case

MAX_ERROR = {"bf16": 0.02, "fp8": 0.1}
"""Relative error over which a peer does not compute what it should."""

_FLASHINFER_WORKSPACE_BYTES = 256 << 20

Attend = Callable[[int], torch.Tensor]
"""Answers one of the rotating copies: [num_entries, num_q_heads, head_dim] or with a token axis."""


@dataclass(frozen=True, slots=True, eq=False)
class ContiguousCache:
    """Contexts of one length as torch's attention takes them, BF16.

    Attributes:
        q: [num_copies, num_entries, num_q_heads, 1, head_dim].
        k: [num_copies, num_entries, num_kv_heads, length, head_dim].
        v: Like k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def num_copies(self) -> int:
        """Return the caches to rotate among."""
        return self.q.shape[0]


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to answer from a contiguous cache.

    Attributes:
        name: Its name in the results.
        dtype: What its cache holds.
        prepare: Returns what answers; raises where it cannot.
    """

    name: str
    dtype: str
    prepare: Callable[[Case, ContiguousCache], Attend]


def gather(pool: Pool, steps: list[HostStep]) -> ContiguousCache:
    """Copy steps' contexts out of the pool, dequantised."""
    heads, where = pool.heads, pool.device.torch_device
    num_entries, length = len(steps[0].kv_lens), int(steps[0].kv_lens[0])
    rows = (len(steps), num_entries, heads.num_kv_heads, length, heads.head_dim)
    k, v = (torch.empty(rows, dtype=torch.bfloat16, device=where) for _ in "kv")
    for copy_idx, step in enumerate(steps):
        for entry in range(num_entries):
            block_table, _ = context_of(pool, step, entry)
            for name, target in (("k", k), ("v", v)):
                exact = pool.dequantized(name, block_table, length, torch.float32)
                target[copy_idx, entry].copy_(exact)
    q = torch.stack([torch.from_numpy(step.q).to(where).bfloat16() for step in steps])
    return ContiguousCache(q.unsqueeze(3), k, v)


def contestants(
    case: Case, pool: Pool, steps: list[HostStep], cache: ContiguousCache, peers: list[Peer]
) -> Iterator[tuple[Peer, Contestant | None, str]]:
    """Prepare and check peers; yields each with what is timed, or None and the reason."""
    for peer in peers:
        try:
            attend = peer.prepare(case, cache)
            error = _worst_error(pool, steps[0], attend(0))
        except Exception as raised:  # whatever it is, the others go on
            yield peer, None, f"{type(raised).__name__}: {_first_line(raised)}"
            continue
        if error > MAX_ERROR[peer.dtype]:
            yield peer, None, f"answers with a relative error of {error:.3g}"
            continue
        yield peer, _contestant(case, peer, cache.num_copies, attend), f"relative error {error:.2g}"


def _contestant(case: Case, peer: Peer, num_copies: int, attend: Attend) -> Contestant:
    def launch(first: int, count: int) -> None:
        for idx in range(first, first + count):
            attend(idx % num_copies)

    launch_bytes = case.bf16_bytes if peer.dtype == "bf16" else case.bf16_bytes // 2
    return Contestant(peer.name, peer.dtype, launch_bytes, launch, in_graph=True)


def _worst_error(pool: Pool, step: HostStep, answer: torch.Tensor) -> float:
    heads = pool.heads
    answer = answer.reshape(len(step.kv_lens), heads.num_q_heads, heads.head_dim)
    entries = {0, len(step.kv_lens) - 1}
    return max(relative_error(exact_attention(pool, step, e)[0], answer[e]) for e in entries)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


# ---- torch --------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend | None) -> Callable[[Case, ContiguousCache], Attend]:
    """Return scaled_dot_product_attention by one of its kernels, or by torch's own choice."""

    def prepare(case: Case, cache: ContiguousCache) -> Attend:
        def attend(idx: int) -> torch.Tensor:
            with _choice(backend):
                return scaled_dot_product_attention(
                    cache.q[idx], cache.k[idx], cache.v[idx], enable_gqa=case.heads.group_size > 1
                )

        return attend

    return prepare


def _folded(case: Case, cache: ContiguousCache) -> Attend:
    """Fold a group's q heads into query tokens, so that any kernel reads K and V once."""
    heads = case.heads
    shape = (len(case.workload.lengths), heads.num_kv_heads, heads.group_size, heads.head_dim)
    queries = [q.view(shape) for q in cache.q]
    return lambda idx: scaled_dot_product_attention(queries[idx], cache.k[idx], cache.v[idx])


def _choice(backend: SDPBackend | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else sdpa_kernel(backend)


def _flex(case: Case, cache: ContiguousCache) -> Attend:
    """Compile FlexAttention for this shape; it takes its decode kernel by itself."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    compiler: Any = torch.compiler
    compiler.reset()
    compiled: Any = torch.compile(flex.flex_attention, dynamic=False)
    enable_gqa = case.heads.group_size > 1

    def attend(idx: int) -> torch.Tensor:
        answer: torch.Tensor = compiled(
            cache.q[idx], cache.k[idx], cache.v[idx], enable_gqa=enable_gqa
        )
        return answer

    return attend


# ---- FlashInfer ---------------------------------------------------------------------------------


def _flashinfer(dtype: torch.dtype) -> Callable[[Case, ContiguousCache], Attend]:
    """Return FlashInfer's paged decode over pages of the case's block_size, in order."""

    def prepare(case: Case, cache: ContiguousCache) -> Attend:
        flashinfer: Any = importlib.import_module("flashinfer")
        heads, where = case.heads, cache.q.device
        num_entries, pages = len(case.workload.lengths), case.workload.lengths[0] // case.block_size
        workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=where)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=heads.group_size > 1
        )
        wrapper.plan(
            torch.arange(num_entries + 1, dtype=torch.int32, device=where) * pages,
            torch.arange(num_entries * pages, dtype=torch.int32, device=where),
            torch.full((num_entries,), case.block_size, dtype=torch.int32, device=where),
            heads.num_q_heads,
            heads.num_kv_heads,
            heads.head_dim,
            case.block_size,
            q_data_type=torch.bfloat16,
            kv_data_type=dtype,
        )
        copies = [
            (_paged(k, case.block_size, dtype), _paged(v, case.block_size, dtype))
            for k, v in zip(cache.k, cache.v, strict=True)
        ]

        def attend(idx: int) -> torch.Tensor:
            answer: torch.Tensor = wrapper.run(cache.q[idx].squeeze(2), copies[idx])
            return answer

        return attend

    return prepare


def _paged(x: torch.Tensor, page_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [num_entries, num_kv_heads, length, head_dim] as pages [num_pages, num_kv_heads, page_size, head_dim]."""
    num_entries, num_kv_heads, length, head_dim = x.shape
    pages = x.view(num_entries, num_kv_heads, length // page_size, page_size, head_dim)
    by_page = pages.transpose(1, 2).reshape(-1, num_kv_heads, page_size, head_dim)
    return by_page.to(dtype).contiguous()


SDPA = (
    Peer("torch SDPA", "bf16", _sdpa(None)),
    Peer("torch SDPA, flash", "bf16", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("torch SDPA, cuDNN", "bf16", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("torch SDPA, group folded", "bf16", _folded),
)
FLEX = Peer("torch FlexAttention", "bf16", _flex)
FLASHINFER = (
    Peer("FlashInfer BF16", "bf16", _flashinfer(torch.bfloat16)),
    Peer("FlashInfer FP8", "fp8", _flashinfer(torch.float8_e4m3fn)),
)


def peers_for(case: Case, *, quick: bool) -> list[Peer]:
    """Return the peers that are worth their time in a case."""
    if not case.workload.is_uniform or case.block_size != 32:
        return []
    name = case.workload.name
    if quick:
        return [*SDPA] if name in ("8x32k", "64x8k") else []
    if case.heads != LLAMA:
        return [*SDPA, *FLASHINFER] if name in ("8x32k", "32x4k") else []
    return [*SDPA, *([FLEX] if name in ("8x32k", "64x8k", "32x4k") else []), *FLASHINFER]
