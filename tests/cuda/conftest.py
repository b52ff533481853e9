"""The test kernels, compiled once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda.build import load_emulated
from tests.cuda.rig import KERNELS, Rig


@pytest.fixture(scope="session")
def shared_rig() -> Rig:
    """Return the rig that all tests share."""
    return Rig(load_emulated(sorted(KERNELS.glob("*.cu"))))


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """Return the rig, in order and without a fault before and after."""
    library = shared_rig.library
    yield shared_rig
    library.octavo_emulator_clear_error()
    library.octavo_emulator_set_seed(0)
