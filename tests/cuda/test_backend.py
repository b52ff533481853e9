"""The cuda backend on an emulated device: what it refuses, how it fails, that its buffers are used again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo_server.backends.base import (
    NO_OFFENCE,
    RaggedBatch,
    UnsupportedError,
    alloc_paged_int8_cache,
)
from octavo_server.backends.cuda import CudaBackend
from octavo_server.backends.cuda_library import DeviceError
from tests.cuda.build import KERNEL_SOURCES, build_emulated
from tests.cuda.emulated import EmulatedCudaBackend, Emulator
from tests.kernels.rig import Entry, Rig, make_spec

SMALL = make_spec(1, 2, 64)


@pytest.fixture(scope="module")
def library() -> Path:
    """Return the emulated library."""
    return build_emulated(KERNEL_SOURCES)


@pytest.fixture
def emulator(library: Path) -> Iterator[Emulator]:
    """Return the emulated device; afterwards it is as it was."""
    emulator = Emulator(library)
    yield emulator
    emulator.take_fault()
    for name, value in {"num_devices": 1, "major": 9, "minor": 0, "driver_version": 13000}.items():
        emulator.set_device(name, value)


@pytest.fixture
def backend(library: Path, emulator: Emulator) -> EmulatedCudaBackend:
    """Return a backend on the emulated device."""
    del emulator
    return EmulatedCudaBackend(library, num_multiprocessors=4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_devices": 0}, "this machine has no NVIDIA GPU"),
        ({"driver_version": 0}, "this machine has no NVIDIA driver"),
        (
            {"driver_version": 12040},
            r"the NVIDIA driver runs CUDA 12\.4, these kernels need 13\.0; install a newer driver",
        ),
        ({"major": 7, "minor": 5}, r"compute capability 7\.5, the kernels need 8\.0 or more"),
    ],
)
def test_a_device_that_will_not_do_is_a_sentence(
    library: Path, emulator: Emulator, changes: dict[str, int], text: str
) -> None:
    for name, value in changes.items():
        emulator.set_device(name, value)
    with pytest.raises(UnsupportedError, match=text):
        EmulatedCudaBackend(library, num_multiprocessors=4)


def test_it_says_what_it_runs_on(backend: CudaBackend) -> None:
    assert backend.description.startswith("cuda: ")
    assert "compute capability 9.0" in backend.description


def test_more_kv_heads_than_a_launch_has_room_for_are_refused(backend: CudaBackend) -> None:
    with pytest.raises(UnsupportedError, match="num_kv_heads of test must be at most 65535"):
        backend.check_model(make_spec(65536, 1, 8))


def one_token(block_id: int = 0) -> RaggedBatch:
    """Return a batch of one entry: the first token of a session, into slot 0 of a block."""
    return RaggedBatch(
        layers=np.array([0], np.int32),
        start_pos=np.array([0], np.int32),
        token_starts=np.array([0, 1], np.int32),
        kv_lens=np.array([1], np.int32),
        is_causal=np.array([True]),
        block_tables=np.array([[block_id]], np.int32),
        slot_mapping=np.array([block_id * SMALL.block_size], np.int64),
    )


@pytest.mark.parametrize("block_id", [4, -1])
def test_a_bad_batch_is_refused_before_anything_runs(backend: CudaBackend, block_id: int) -> None:
    cache = alloc_paged_int8_cache(backend, SMALL, num_blocks=4)
    q = np.ones((1, 2, 64), np.float32)
    k = np.ones((1, 1, 64), np.float32)
    with pytest.raises(ValueError, match="a block id within kv_lens is not one of the cache's"):
        backend.step(cache, one_token(block_id), q, None, return_lse=False)
    batch = one_token(abs(block_id))
    batch.slot_mapping[0] = 64 if block_id == 4 else -2
    with pytest.raises(ValueError, match="a slot is neither -1 nor one of the cache's"):
        backend.step(cache, batch, None, (k, k), return_lse=False)
    with pytest.raises(ValueError, match="a block id within kv_lens"):
        backend.copy_blocks(cache, [(0, block_id)])
    assert backend.step(cache, one_token(), q, (k, k), return_lse=False).offences[0] == NO_OFFENCE


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "k_dtype", "text"),
    [
        (
            (2, 2, 64),
            (1, 1, 64),
            np.float32,
            r"q must be \[1, 2, 64\] float32, got \[2, 2, 64\] float32",
        ),
        ((1, 2, 64), (1, 1, 56), np.float32, r"k must be \[1, 1, 64\] float32, got \[1, 1, 56\]"),
        ((1, 2, 64), (1, 1, 64), np.float16, r"k must be \[1, 1, 64\] float32, got .* float16"),
    ],
)
def test_tensors_that_do_not_fit_the_batch_are_refused(
    backend: CudaBackend,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    k_dtype: type[np.floating[Any]],
    text: str,
) -> None:
    cache = alloc_paged_int8_cache(backend, SMALL, num_blocks=4)
    k = np.ones(k_shape, k_dtype)
    with pytest.raises(ValueError, match=text):
        backend.step(cache, one_token(), np.ones(q_shape, np.float32), (k, k), return_lse=False)
    wide = np.ones((1, 2, 64), np.float64)
    with pytest.raises(
        ValueError, match=r"q must be .* float16, bfloat16 or float32, got .* float64"
    ):
        backend.step(cache, one_token(), wide, None, return_lse=False)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_more_splits_than_a_warp_has_lanes_merge(
    library: Path, emulator: Emulator, head_dim: int
) -> None:
    """132 multiprocessors cut 8,500 tokens of one head into more than 32 spans."""
    wide = EmulatedCudaBackend(library, num_multiprocessors=132)
    rig = Rig(wide, make_spec(1, 4, head_dim, block_size=32, num_layers=1), num_blocks=280)
    session = rig.open(8600)
    rig.fill(session, 0, 8501)
    entries = [Entry(session, 0, 3)]
    rig.step(entries, rig.draw(entries))
    del emulator


def test_a_fault_is_a_device_error_and_stays_one(
    backend: EmulatedCudaBackend, library: Path
) -> None:
    """A pool that the device does not know stands for a fault; later calls on the device fail as well."""
    plain = CudaBackend(backend._library, backend._torch_device)
    cache = alloc_paged_int8_cache(plain, SMALL, num_blocks=4)  # which nobody registers
    k = np.ones((1, 1, 64), np.float32)
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        plain.step(cache, one_token(), None, (k, k), return_lse=False)
    with pytest.raises(DeviceError):
        plain.free_bytes()
    assert "out of bounds" in Emulator(library).take_fault()


def test_a_device_without_memory_left_says_how_much_it_wanted(
    backend: EmulatedCudaBackend, emulator: Emulator
) -> None:
    cache = alloc_paged_int8_cache(backend, SMALL, num_blocks=4)
    free_bytes = backend._unused_bytes()
    assert 0 < backend.free_bytes() < free_bytes
    with pytest.raises(UnsupportedError, match=rf"and {free_bytes} are free"):
        backend.alloc_paged_int8_layer(SMALL, num_blocks=free_bytes)
    del cache, emulator


def test_steps_of_any_size_follow_each_other(backend: EmulatedCudaBackend) -> None:
    """Buffers grow and are used again, also for less, with and without splits and lse."""
    rig = Rig(backend, make_spec(2, 4, 64, block_size=16), num_blocks=400)
    first, second = rig.open(3000), rig.open(3000)
    rig.fill(first, 0, 20)
    for num_tokens in (1, 30, 2, 900, 1, 5, 600, 1):
        entries = [Entry(first, 0, num_tokens), Entry(second, 0, 1)]
        rig.step(entries, rig.draw(entries))
    for session in (first, second):
        rig.verify_stored(session, 0)
