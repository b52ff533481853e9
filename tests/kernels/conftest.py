"""Every backend and instruction-set path, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from octavo_server.backends.base import Backend
from octavo_server.backends.cpu import CpuBackend, available_isas
from octavo_server.backends.reference import ReferenceBackend

BACKENDS = ("reference", "cpu-avx512", "cpu-avx2", "cpu-portable")
NUM_THREADS = 2

# The reference's tensors are too small for torch's threads, which only get in the way of others.
torch.set_num_threads(1)

MakeBackend = Callable[[int], Backend]
"""Takes a number of threads; the reference has no use for it."""


@pytest.fixture(scope="session", params=BACKENDS)
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """Return what creates the backend under test; skips a path that this machine lacks."""
    name: str = request.param
    if name == "reference":
        return lambda num_threads: ReferenceBackend()
    isa = name.removeprefix("cpu-")
    if isa not in available_isas():
        pytest.skip(f"this machine has no {isa}: the cpu backend's {isa} path is not tested")
    return lambda num_threads: CpuBackend(num_threads=num_threads, isa=isa)


@pytest.fixture(scope="session")
def backend(make_backend: MakeBackend) -> Backend:
    """Return the backend under test, with 2 threads."""
    return make_backend(NUM_THREADS)
