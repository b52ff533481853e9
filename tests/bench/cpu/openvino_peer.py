"""OpenVINO's PagedAttention with a u8 cache: a model of that one operation, over shuffled blocks of 32 tokens.

The operation appends one token of each session before it attends; it is always the last one here, over itself. The
cache is filled by the operation too, a block being a prompt of its own, so that filling costs no long attention.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo_server.model import default_sm_scale
from tests.bench.cpu.draws import Draw, HalfArray
from tests.bench.cpu.racers import PeerError, Racer, copies_of, racer
from tests.bench.shapes import Heads

OPENVINO = "OpenVINO PagedAttention u8"

_BLOCK_SIZE = 32
_FILL_TOKENS = 4096
_CACHES = ("key_cache", "value_cache")
_INPUTS = (
    *("q", "k", "v", *_CACHES, "past_lens", "subsequence_begins"),
    *("block_indices", "block_indices_begins", "max_context_len"),
)


def openvino_racer(draw: Draw, num_threads: int, llc_bytes: int) -> Racer:
    """Return PagedAttention over a case's tokens.

    Raises:
        PeerError: OpenVINO is not installed, or lacks the operation.
    """
    openvino, model = _load(), _compile(draw.case.heads, num_threads)
    num_blocks = draw.case.workload.num_tokens // _BLOCK_SIZE
    blocks = np.random.default_rng(5).permutation(num_blocks).astype(np.int32)
    first = _Cache.allocate(openvino, model, num_blocks)
    _fill(openvino, model, first, draw, blocks)
    launch_bytes = first.num_bytes
    num_caches = copies_of(launch_bytes, llc_bytes)
    caches = [first, *(first.clone(openvino) for _ in range(num_caches - 1))]
    requests = [_decode_request(openvino, model, cache, draw, blocks) for cache in caches]

    def answer(copy: int) -> NDArray[Any]:
        requests[copy].infer()
        out: NDArray[Any] = requests[copy].get_output_tensor(0).data
        return out.reshape(draw.q.shape)

    return racer(OPENVINO, "u8", launch_bytes, num_caches, answer)


@dataclass(frozen=True, slots=True, eq=False)
class _Cache:
    """K and V as OpenVINO's tensors, in the layout that the compiled model asks for."""

    key: Any
    value: Any

    @classmethod
    def allocate(cls, openvino: Any, model: Any, num_blocks: int) -> _Cache:
        """Allocate a cache for a compiled model."""
        return cls(*(_empty(openvino, model.input(name), num_blocks) for name in _CACHES))

    @property
    def num_bytes(self) -> int:
        """Return what attention reads."""
        return int(self.key.byte_size + self.value.byte_size)

    def clone(self, openvino: Any) -> _Cache:
        """Return a copy."""
        return _Cache(*(openvino.Tensor(np.array(x.data)) for x in (self.key, self.value)))


@functools.cache
def _load() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise PeerError(f"openvino is not installed ({error})") from error


@functools.cache
def _compile(heads: Heads, num_threads: int) -> Any:
    """Return the model of one PagedAttention, compiled for the CPU."""
    openvino = _load()
    config = {
        "KV_CACHE_PRECISION": "u8",
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        return openvino.Core().compile_model(_model(openvino, heads), "CPU", config)
    except (RuntimeError, TypeError, AttributeError, ImportError) as error:
        raise PeerError(f"this OpenVINO takes no such PagedAttention: {error}") from error


def _model(openvino: Any, heads: Heads) -> Any:
    """Return the model; what the operation takes beyond _INPUTS stands at its neutral value."""
    ops = importlib.import_module("openvino.op")
    parameters = {name: _parameter(openvino, name, heads) for name in _INPUTS}
    no_ints, no_floats = (np.zeros(0, dtype) for dtype in (np.int32, np.float32))
    after_begins: list[Any] = [np.float32(default_sm_scale(heads.head_dim)), np.int32(0), no_floats]
    after_max_context = [
        *(no_ints, no_ints, no_ints, no_floats),  # scores that are kept, rotation of keys
        *(no_floats, np.int32(64), np.int32(8)),  # sparse attention: no threshold
        no_floats,  # sinks
        *(np.int32(0), no_ints, no_ints, no_ints),  # eviction
        *(no_ints, np.zeros(0, np.uint8), no_ints),  # token types, tree masks
    ]
    *mapped, max_context = parameters.values()
    constants = [
        [ops.Constant(np.asarray(x)) for x in xs] for xs in (after_begins, after_max_context)
    ]
    inputs = [*mapped, *constants[0], max_context, *constants[1]]
    attention = ops._PagedAttentionExtension([node.output(0) for node in inputs])
    for side in "kv":  # what the layout of the cache is derived from
        attention.get_rt_info()[f"num_{side}_heads"] = heads.num_kv_heads
        attention.get_rt_info()[f"{side}_head_size"] = heads.head_dim
    return openvino.Model([attention.output(0)], list(parameters.values()))


def _parameter(openvino: Any, name: str, heads: Heads) -> Any:
    types, kv_width = openvino.Type, heads.num_kv_heads * heads.head_dim
    cache = types.dynamic, [-1, heads.num_kv_heads, -1, -1]  # left to the plugin
    dtype, shape = {
        "q": (types.f32, [-1, heads.num_q_heads * heads.head_dim]),
        "k": (types.f32, [-1, kv_width]),
        "v": (types.f32, [-1, kv_width]),
        "key_cache": cache,
        "value_cache": cache,
        "max_context_len": (types.i32, []),
    }.get(name, (types.i32, [-1]))
    made = importlib.import_module("openvino.op").Parameter(dtype, openvino.PartialShape(shape))
    made.output(0).get_tensor().set_names({name})
    return made


def _empty(openvino: Any, port: Any, num_blocks: int) -> Any:
    _, *rest = list(port.partial_shape)
    shape = [num_blocks, *(dimension.get_length() for dimension in rest)]
    return openvino.Tensor(port.element_type, openvino.Shape(shape))


def _fill(openvino: Any, model: Any, cache: _Cache, draw: Draw, blocks: NDArray[np.int32]) -> None:
    """Store all tokens, some thousands at a time, each block as a prompt of its own."""
    k, v = (_token_rows(x) for x in (draw.k, draw.v))
    width = draw.case.heads.num_q_heads * draw.case.heads.head_dim
    for first in range(0, len(k), _FILL_TOKENS):
        rows = slice(first, first + _FILL_TOKENS)
        used = blocks[first // _BLOCK_SIZE :][: len(k[rows]) // _BLOCK_SIZE]
        begins = np.arange(len(used) + 1, dtype=np.int32)
        _request(
            openvino,
            model,
            cache,
            q=np.zeros((len(k[rows]), width), np.float32),
            k=k[rows].astype(np.float32),
            v=v[rows].astype(np.float32),
            past_lens=np.zeros(len(used), np.int32),
            subsequence_begins=begins * _BLOCK_SIZE,
            block_indices=used,
            block_indices_begins=begins,
            max_context_len=np.array(_BLOCK_SIZE, np.int32),
        ).infer()


def _decode_request(
    openvino: Any, model: Any, cache: _Cache, draw: Draw, blocks: NDArray[np.int32]
) -> Any:
    begins = np.arange(draw.num_sessions + 1, dtype=np.int32)
    return _request(
        openvino,
        model,
        cache,
        q=_token_rows(draw.q[:, None]).astype(np.float32),
        k=_token_rows(draw.k[:, -1:]).astype(np.float32),
        v=_token_rows(draw.v[:, -1:]).astype(np.float32),
        past_lens=np.full(draw.num_sessions, draw.length - 1, np.int32),
        subsequence_begins=begins,
        block_indices=blocks,
        block_indices_begins=begins * (draw.length // _BLOCK_SIZE),
        max_context_len=np.array(draw.length, np.int32),
    )


def _request(openvino: Any, model: Any, cache: _Cache, **inputs: NDArray[Any]) -> Any:
    """Return a request with its inputs set."""
    request = model.create_infer_request()
    for name, array in inputs.items():
        request.set_tensor(name, openvino.Tensor(array))
    for name, tensor in zip(_CACHES, (cache.key, cache.value), strict=True):
        request.set_tensor(name, tensor)
    return request


def _token_rows(x: HalfArray) -> HalfArray:
    """Return [num_sessions, num_tokens, num_heads, head_dim] as one row a token."""
    return x.reshape(x.shape[0] * x.shape[1], -1)
