"""ggml's flash_attn_ext over contiguous head-major caches, from prebuilt libraries that a package brings.

Its tensors are [head_dim, length, num_kv_heads, num_sessions] with head_dim innermost, K and V alike. A cache lives in
a ggml context of its own, with the graph of one attention.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo_server.model import default_sm_scale
from tests.bench.cpu.draws import Draw, HalfArray
from tests.bench.cpu.racers import PeerError, Racer, copies_of, racer

F32, F16, Q8_0 = 0, 1, 8
"""enum ggml_type."""

GGML_F16, GGML_Q8_0 = "ggml flash_attn_ext F16", "ggml flash_attn_ext Q8_0"

FloatArray = NDArray[np.float32]


class _Kind(NamedTuple):
    """What a cache holds."""

    name: str
    dtype: str
    ggml_type: int


_KINDS = (_Kind(GGML_F16, "f16", F16), _Kind(GGML_Q8_0, "q8_0", Q8_0))
_OVERHEAD_BYTES = 16 << 20
"""Beside the cache: q, out, the graph."""

_P, _I64, _F32, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_size_t


class _InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


class _ThreadpoolParams(ctypes.Structure):
    """ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class _Plan(ctypes.Structure):
    """ggml_cplan."""

    _fields_ = (
        ("work_size", _SIZE),
        ("work_data", _P),
        ("n_threads", ctypes.c_int),
        ("threadpool", _P),
        ("abort_callback", _P),
        ("abort_callback_data", _P),
        ("use_ref", ctypes.c_bool),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Ggml:
    """The libraries with their functions declared, and a pool of threads."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL
    num_threads: int
    threadpool: int


def ggml_racers(draw: Draw, num_threads: int, llc_bytes: int) -> list[Racer]:
    """Return both caches over a case's tokens.

    Raises:
        PeerError: No package with the libraries is installed, or they do not load.
    """
    ggml = load_ggml(num_threads)
    k, v = (_head_major(x) for x in (draw.k, draw.v))
    return [_racer(ggml, draw, kind, (k, v), llc_bytes) for kind in _KINDS]


@functools.cache
def load_ggml(num_threads: int) -> Ggml:
    """Load the libraries and start their threads."""
    folder = _library_folder()
    try:
        base, cpu = (
            ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL)
            for part in ("base", "cpu")
        )
        _declare(base, cpu)
    except (OSError, AttributeError) as error:
        raise PeerError(f"ggml's libraries do not load: {error}") from error
    cpu.ggml_cpu_init()
    params = _ThreadpoolParams()
    base.ggml_threadpool_params_init(ctypes.byref(params), num_threads)
    params.poll = 0  # its threads would else spin on for 100 ms, into whoever is timed next
    return Ggml(base, cpu, num_threads, cpu.ggml_threadpool_new(ctypes.byref(params)))


def instruction_sets(ggml: Ggml) -> list[str]:
    """Return what the libraries were compiled for."""
    names = ("avx2", "fma", "f16c", "avx512", "avx512_vnni", "avx512_bf16")
    return [name for name in names if getattr(ggml.cpu, f"ggml_cpu_has_{name}")()]


def _racer(
    ggml: Ggml, draw: Draw, kind: _Kind, kv: tuple[FloatArray, FloatArray], llc_bytes: int
) -> Racer:
    first = _Cache(ggml, draw, kind.ggml_type)
    first.fill(*kv)
    num_caches = copies_of(first.num_bytes, llc_bytes)
    caches = [first, *(first.clone() for _ in range(num_caches - 1))]
    return racer(
        kind.name, kind.dtype, first.num_bytes, num_caches, lambda copy: caches[copy].attend()
    )


class _Cache:
    """One cache with the graph that attends over it."""

    def __init__(self, ggml: Ggml, draw: Draw, kind: int) -> None:
        self._ggml, self._draw, self._kind = ggml, draw, kind
        heads, base = draw.case.heads, ggml.base
        elements = 2 * draw.case.workload.num_tokens * heads.num_kv_heads * heads.head_dim
        cache_bytes = base.ggml_row_size(kind, elements)
        self._context = base.ggml_init(_InitParams(cache_bytes + _OVERHEAD_BYTES, None, False))
        weakref.finalize(self, base.ggml_free, self._context).atexit = False
        q = self._tensor(F32, 1, heads.num_q_heads)
        self._k, self._v = (self._tensor(kind, draw.length, heads.num_kv_heads) for _ in range(2))
        self.num_bytes: int = sum(base.ggml_nbytes(x) for x in (self._k, self._v))
        rows = np.ascontiguousarray(draw.q, np.float32)
        ctypes.memmove(base.ggml_get_data(q), rows.ctypes.data, rows.nbytes)
        sm_scale = default_sm_scale(heads.head_dim)
        self._graph = base.ggml_new_graph(self._context)
        out = base.ggml_flash_attn_ext(self._context, q, self._k, self._v, None, sm_scale, 0, 0)
        base.ggml_build_forward_expand(self._graph, out)
        self._plan = ggml.cpu.ggml_graph_plan(self._graph, ggml.num_threads, ggml.threadpool)
        self._work = ctypes.create_string_buffer(self._plan.work_size + 64)
        self._plan.work_data = ctypes.addressof(self._work)
        data = ctypes.cast(base.ggml_get_data(out), ctypes.POINTER(_F32))
        self._out = np.ctypeslib.as_array(data, shape=draw.q.shape)

    def fill(self, *kv: FloatArray) -> None:
        """Convert K and V, each [num_sessions, num_kv_heads, length, head_dim]."""
        base, row = self._ggml.base, self._draw.case.heads.head_dim
        for tensor, x in zip((self._k, self._v), kv, strict=True):
            data = base.ggml_get_data(tensor)
            base.ggml_quantize_chunk(self._kind, x.ctypes.data, data, 0, x.size // row, row, None)

    def clone(self) -> _Cache:
        """Return a copy."""
        made, base = _Cache(self._ggml, self._draw, self._kind), self._ggml.base
        for target, source in ((made._k, self._k), (made._v, self._v)):
            pointers = base.ggml_get_data(target), base.ggml_get_data(source)
            ctypes.memmove(*pointers, base.ggml_nbytes(source))
        return made

    def attend(self) -> NDArray[Any]:
        """Attend; returns what the next call overwrites."""
        status = self._ggml.cpu.ggml_graph_compute(self._graph, ctypes.byref(self._plan))
        assert status == 0, f"ggml_graph_compute returned {status}"
        return self._out

    def _tensor(self, kind: int, num_rows: int, num_heads: int) -> int:
        shape = self._draw.case.heads.head_dim, num_rows, num_heads, self._draw.num_sessions
        made: int = self._ggml.base.ggml_new_tensor_4d(self._context, kind, *shape)
        return made


def _library_folder() -> Path:
    """Return where the package keeps its libraries."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise PeerError("libggml-python is not installed")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("lib*/libggml-cpu.so"))
    if not found:
        raise PeerError("libggml-python has no libggml-cpu.so")
    return found[0].parent


def _declare(base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
    """Give each function the types of its result and arguments."""
    functions: tuple[tuple[Any, Any, list[Any]], ...] = (
        (base.ggml_init, _P, [_InitParams]),
        (base.ggml_free, None, [_P]),
        (base.ggml_row_size, _SIZE, [ctypes.c_int, _I64]),
        (base.ggml_nbytes, _SIZE, [_P]),
        (base.ggml_new_tensor_4d, _P, [_P, ctypes.c_int, *[_I64] * 4]),
        (base.ggml_get_data, _P, [_P]),
        (base.ggml_new_graph, _P, [_P]),
        (base.ggml_flash_attn_ext, _P, [*[_P] * 5, *[_F32] * 3]),
        (base.ggml_build_forward_expand, None, [_P, _P]),
        (base.ggml_quantize_chunk, _SIZE, [ctypes.c_int, _P, _P, *[_I64] * 3, _P]),
        (base.ggml_threadpool_params_init, None, [_P, ctypes.c_int]),
        (cpu.ggml_cpu_init, None, []),
        (cpu.ggml_threadpool_new, _P, [_P]),
        (cpu.ggml_graph_plan, _Plan, [_P, ctypes.c_int, _P]),
        (cpu.ggml_graph_compute, ctypes.c_int, [_P, ctypes.POINTER(_Plan)]),
    )
    for function, result, arguments in functions:
        function.restype, function.argtypes = result, arguments


def _head_major(x: HalfArray) -> FloatArray:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3), np.float32)
