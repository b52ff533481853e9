"""Every backend and instruction-set path, one after the other.

cuda runs where there is a GPU; cuda-emulated runs the same kernels' source on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from octavo_server.backends.base import Backend
from octavo_server.backends.cpu import CpuBackend, available_isas
from octavo_server.backends.cuda import create_cuda_backend
from octavo_server.backends.reference import ReferenceBackend
from tests.cuda.build import KERNEL_SOURCES, build_emulated
from tests.cuda.emulated import EmulatedCudaBackend
from tests.kernels.rig import HAS_GPU

GPU_BACKENDS = ("cuda",) if HAS_GPU else ()
BACKENDS = ("reference", "cpu-avx512", "cpu-avx2", "cpu-portable", "cuda-emulated", *GPU_BACKENDS)
NUM_THREADS = 2

# The reference's tensors are too small for torch's threads, which only get in the way of others.
torch.set_num_threads(1)

MakeBackend = Callable[[int], Backend]
"""Takes a number of threads; for the emulated GPU, of multiprocessors; the others have no use for it."""


@pytest.fixture(scope="session", params=BACKENDS)
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """Return what creates the backend under test; skips a path that this machine lacks."""
    name: str = request.param
    if name == "reference":
        return lambda num_threads: ReferenceBackend()
    if name == "cuda":
        backend = create_cuda_backend()
        return lambda num_threads: backend
    if name == "cuda-emulated":
        library = build_emulated(KERNEL_SOURCES)
        return lambda num_multiprocessors: EmulatedCudaBackend(library, num_multiprocessors)
    isa = name.removeprefix("cpu-")
    if isa not in available_isas():
        pytest.skip(f"this machine has no {isa}: the cpu backend's {isa} path is not tested")
    return lambda num_threads: CpuBackend(num_threads=num_threads, isa=isa)


@pytest.fixture(scope="session")
def backend(make_backend: MakeBackend) -> Backend:
    """Return the backend under test, with 2 threads."""
    return make_backend(NUM_THREADS)
