"""The cpu backend's kernels under ASan and UBSan, in a process of `toolchain.address_environment()`.

As a pytest plugin it gives them to the tests; `python -m tests.sanitizers.instrumented_kernels` only builds them.
"""

from __future__ import annotations

import os

import pytest

from octavo_server import kernel_build
from tests.sanitizers.toolchain import ADDRESS_FLAGS


def pytest_configure() -> None:
    """Add the flags to the recipe of the cpu library, which thereby is another one to the cache."""
    os.environ.pop("LD_PRELOAD", None)  # for this process alone: the compiler would get it too
    flags = (*kernel_build.CFLAGS, *ADDRESS_FLAGS)
    pytest.MonkeyPatch().setattr(kernel_build, "CFLAGS", flags)


if __name__ == "__main__":
    pytest_configure()
    kernel_build.build_cpu_kernels()
