"""What is the cpu backend's own: how it is made, what it refuses, what it does with host arrays."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from octavo_client.oracle import AttentionOptions, OracleCache, check, quantize
from octavo_server.backends import cpu
from octavo_server.backends.base import (
    NO_OFFENCE,
    PagedInt8Cache,
    RaggedBatch,
    UnsupportedError,
    alloc_paged_int8_cache,
)
from octavo_server.backends.cpu import CpuBackend, available_isas
from octavo_server.kernel_build import find_csrc
from octavo_server.model import ModelSpec

SPEC = ModelSpec("small", 2, 2, 1, 8, 16, 64, (0.5, 0.5), (0, 0), (0.0, 0.0))
NUM_BLOCKS = 4
FE_UPWARD_X86 = 0x800
FE_TONEAREST = 0


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    """Return a backend with two threads."""
    return CpuBackend(num_threads=2)


@pytest.fixture
def cache(backend: CpuBackend) -> PagedInt8Cache:
    """Return an empty cache."""
    return alloc_paged_int8_cache(backend, SPEC, NUM_BLOCKS)


@pytest.fixture
def rounding_upward() -> Iterator[None]:
    """Let this thread round upward."""
    if platform.machine() != "x86_64":
        pytest.skip("the number of the rounding mode is known for x86-64 alone")
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(FE_UPWARD_X86) == 0
    yield
    libm.fesetround(FE_TONEAREST)


def one_token() -> RaggedBatch:
    """Return a batch of one entry: its first token, into block 2 of layer 1."""
    return RaggedBatch(
        layers=np.array([1], np.int32),
        start_pos=np.array([0], np.int32),
        token_starts=np.array([0, 1], np.int32),
        kv_lens=np.array([1], np.int32),
        is_causal=np.array([True]),
        block_tables=np.array([[2, -1]], np.int32),
        slot_mapping=np.array([2 * SPEC.block_size], np.int64),
    )


def rows(num_heads: int) -> NDArray[np.float32]:
    """Return rows [1, num_heads, head_dim] float32 with ties: 0.5 and 1.5 steps of 1 / 127."""
    row = np.array([127, 0.5, 1.5, -0.5, -2.5, 3, 0, -127], np.float32)
    return np.tile(row, (1, num_heads, 1))


def test_description_names_isa_and_threads(backend: CpuBackend) -> None:
    assert backend.description == f"cpu: {available_isas()[0]}, 2 threads"


def test_portable_is_always_there() -> None:
    assert available_isas()[-1] == "portable"
    assert CpuBackend(num_threads=1, isa="portable").isa == "portable"


def test_unknown_isa_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(UnsupportedError, match=r"one of .*portable on this cpu, got 'sve9'"):
        CpuBackend(isa="sve9")


@pytest.mark.parametrize("change", [{"head_dim": 12}, {"head_dim": 264}, {"block_size": 8}])
def test_unsupported_models_are_refused(backend: CpuBackend, change: dict[str, int]) -> None:
    with pytest.raises(UnsupportedError, match=f"got {next(iter(change.values()))}"):
        backend.check_model(replace(SPEC, **change))  # type: ignore[arg-type]


def test_a_pool_over_the_free_memory_is_refused_with_the_numbers(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "free_host_bytes", lambda: 1000)
    layer_bytes = NUM_BLOCKS * SPEC.block_size * 2 * (SPEC.head_dim + 2)
    with pytest.raises(UnsupportedError, match=f"takes {layer_bytes} bytes, and 1000 are free"):
        backend.alloc_paged_int8_layer(SPEC, NUM_BLOCKS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layers": np.array([2], np.int32)}, "layer"),
        ({"kv_lens": np.array([33], np.int32)}, "kv_lens must fit"),
        ({"start_pos": np.array([-1], np.int32)}, "start_pos must not be negative"),
        ({"kv_lens": np.array([17], np.int32)}, "block id"),
        ({"block_tables": np.array([[NUM_BLOCKS]], np.int32)}, "block id"),
        ({"token_starts": np.array([1, 1], np.int32)}, "token_starts"),
        ({"token_starts": np.array([0, 2], np.int32)}, "token_starts must end with 1, got 2"),
        ({"kv_lens": np.array([1, 1], np.int32)}, r"kv_lens must be \[1\] Int, got \[2\] Int"),
        ({"start_pos": np.array([0], np.int64)}, r"start_pos must be \[1\] Int, got \[1\] Long"),
    ],
)
def test_bad_decode_batches_end_in_words(
    backend: CpuBackend,
    cache: PagedInt8Cache,
    change: dict[str, NDArray[Any]],
    text: str,
) -> None:
    batch = one_token()._replace(**change)
    with pytest.raises(ValueError, match=text):
        backend.int8_paged_decode_attention(cache, batch, rows(2), return_lse=False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"slot_mapping": np.array([NUM_BLOCKS * SPEC.block_size])}, "slot"),
        ({"slot_mapping": np.array([-2])}, "slot"),
        ({"layers": np.array([-1], np.int32)}, "layer"),
    ],
)
def test_bad_append_batches_end_in_words(
    backend: CpuBackend,
    cache: PagedInt8Cache,
    change: dict[str, NDArray[Any]],
    text: str,
) -> None:
    with pytest.raises(ValueError, match=text):
        backend.int8_kv_append_paged(cache, one_token()._replace(**change), rows(1), rows(1))


def test_a_wrong_tensor_is_named_with_what_was_expected(
    backend: CpuBackend, cache: PagedInt8Cache
) -> None:
    expected = r"v must be \[1, 1, 8\] Half, got \[1, 1, 8\] Float"
    with pytest.raises(ValueError, match=expected):
        backend.int8_kv_append_paged(cache, one_token(), rows(1).astype(np.float16), rows(1))
    with pytest.raises(ValueError, match="q must be float32, float16 or bfloat16, got Double"):
        backend.int8_paged_decode_attention(
            cache, one_token(), rows(2).astype(np.float64), return_lse=False
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_read_only_and_strided_arrays_are_taken(
    backend: CpuBackend, cache: PagedInt8Cache, dtype: type
) -> None:
    k: NDArray[Any] = rows(1).astype(dtype)
    read_only: NDArray[Any] = np.frombuffer(k.tobytes(), dtype).reshape(k.shape)
    strided = np.repeat(k, 2, axis=-1)[..., ::2]
    assert not read_only.flags.writeable
    assert not strided.flags.c_contiguous
    offences = backend.int8_kv_append_paged(cache, one_token(), read_only, strided)
    assert offences.tolist() == [NO_OFFENCE]
    stored = backend.read_tokens(cache, 1, one_token().slot_mapping)
    assert stored.k_codes.tolist() == [[[127, 0, 2, 0, -2, 3, 0, -127]]]
    assert stored.v_codes.tolist() == stored.k_codes.tolist()
    assert stored.k_scales.tolist() == [[1.0]]


@pytest.mark.usefixtures("rounding_upward")
def test_the_callers_rounding_mode_does_not_matter(
    backend: CpuBackend, cache: PagedInt8Cache
) -> None:
    backend.int8_kv_append_paged(cache, one_token(), rows(1), rows(1))
    stored = backend.read_tokens(cache, 1, one_token().slot_mapping)
    assert stored.k_codes.tolist() == [[[127, 0, 2, 0, -2, 3, 0, -127]]]


@pytest.fixture
def flushing_subnormals() -> Iterator[None]:
    """Let this thread take subnormal numbers for zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormal numbers on this machine")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing_subnormals")
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_callers_flushing_does_not_matter(isa: str, dtype: type) -> None:
    """K, V and the answer have subnormal values; two tokens, weighted 1 and exp(-80)."""
    backend = CpuBackend(num_threads=2, isa=isa)
    cache = alloc_paged_int8_cache(backend, SPEC, NUM_BLOCKS)
    batch = one_token()._replace(
        token_starts=np.array([0, 2], np.int32),
        kv_lens=np.array([2], np.int32),
        slot_mapping=np.array([32, 33]),
    )
    q: NDArray[Any] = np.full((2, 2, 8), 10, dtype)
    k: NDArray[Any] = np.broadcast_to(np.array([1, -1], dtype)[:, None, None], (2, 1, 8))
    tiny: NDArray[Any] = np.array(
        [2.0**-24, 1e-39, 2.0**-133, 0, -(2.0**-24), 1e-42, -1e-40, 3e-5], dtype
    )
    v = np.stack([np.zeros_like(tiny), tiny])[:, None]
    assert backend.int8_kv_append_paged(cache, batch, k, v).tolist() == [NO_OFFENCE]
    output = backend.int8_paged_decode_attention(cache, batch, q, return_lse=False)
    torch.set_flush_denormal(False)
    stored = backend.read_tokens(cache, 1, batch.slot_mapping)
    codes, scales = quantize(v)
    np.testing.assert_array_equal(stored.v_codes, codes)
    np.testing.assert_array_equal(stored.v_scales, scales)
    oracle = OracleCache(AttentionOptions(sm_scale=SPEC.sm_scale[1]))
    oracle.append(k, v)
    check(output.out, oracle.attend(q, start_pos=0))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_extension_that_is_compiled_for_is_checked(isa: str) -> None:
    source = (find_csrc() / "cpu" / f"isa_{isa}.cpp").read_text()
    (targets,) = re.findall(r'#pragma GCC target\("(.*)"\)', source)
    checked = re.findall(r'__builtin_cpu_supports\("(.*?)"\)', source)
    assert sorted(checked) == sorted(targets.split(","))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("head_dim", [128, 72])
def test_appends_that_go_past_the_caches(isa: str, head_dim: int) -> None:
    """More codes than a core's own cache holds, by two threads."""
    num_tokens, block_size = (4 << 20) // (2 * 8 * head_dim) + 37, 64
    num_blocks = -(-num_tokens // block_size)
    spec = ModelSpec("large", 1, 8, 8, head_dim, block_size, num_tokens, (0.5,), (0,), (0.0,))
    backend = CpuBackend(num_threads=2, isa=isa)
    cache = alloc_paged_int8_cache(backend, spec, num_blocks)
    batch = RaggedBatch(
        layers=np.zeros(1, np.int32),
        start_pos=np.zeros(1, np.int32),
        token_starts=np.array([0, num_tokens], np.int32),
        kv_lens=np.array([num_tokens], np.int32),
        is_causal=np.ones(1, bool),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        slot_mapping=np.arange(num_tokens, dtype=np.int64),
    )
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, num_tokens, 8, head_dim), dtype=np.float32).astype(np.float16)
    offences = backend.int8_kv_append_paged(cache, batch, k, v)
    assert offences.tolist() == [NO_OFFENCE]
    stored = backend.read_tokens(cache, 0, batch.slot_mapping)
    for actual, wanted in zip(stored, (*quantize(k), *quantize(v)), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_a_freed_cache_leaves_the_others_alone(backend: CpuBackend, cache: PagedInt8Cache) -> None:
    other = alloc_paged_int8_cache(backend, SPEC, NUM_BLOCKS)
    handle = other.prepared.handle
    assert handle != cache.prepared.handle
    del other
    with pytest.raises(ValueError, match=f"no open cache has the handle {handle}"):
        cpu._load_ops().free_cache(handle)
    backend.int8_kv_append_paged(cache, one_token(), rows(1), rows(1))
