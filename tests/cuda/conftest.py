"""The test kernels, compiled once for all tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda.build import CSRC, load_emulated
from tests.cuda.rig import KERNELS, Rig


@pytest.fixture(scope="session")
def shared_rig() -> Rig:
    """Return the rig that all tests share."""
    return Rig(load_emulated(sorted(KERNELS.glob("*.cu"))))


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """Return the rig, in order and without a fault before and after."""
    library = shared_rig.kernels
    yield shared_rig
    library.octavo_emulator_clear_error()
    library.octavo_emulator_set_seed(0)


@pytest.fixture(scope="session")
def probe() -> ctypes.CDLL:
    """Return the host code and its probe."""
    sources = [CSRC / "cuda" / "plan.cpp", CSRC / "cuda" / "staging.cpp"]
    return load_emulated([*sources, Path(__file__).with_name("host_probe.cpp")])
