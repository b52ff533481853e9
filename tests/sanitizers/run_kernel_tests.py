"""Runs the kernel tests of the cpu backend, every instruction set of this machine, under ASan and UBSan.

    python -m tests.sanitizers.run_kernel_tests [PYTEST_ARGS]

The kernels are compiled for it into build/sanitizers; the server's own are left alone. Python itself is not compiled
so, hence the runtimes are preloaded. The first finding ends the run with its report.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.sanitizers.toolchain import (
    ROOT,
    NoSanitizerError,
    address_environment,
    at_fixed_addresses,
)

PLUGIN = "tests.sanitizers.instrumented_kernels"

TESTS = ("tests/kernels", "tests/unit/test_cpu_backend.py", "--ignore=tests/kernels/test_fork.py")
"""All that run kernels in this very process."""

SELECTION = "cpu and not cuda"
"""Of tests/kernels, those of the cpu backend; all of the other file, whose name has the word."""

CAPTURE = "--capture=sys"
"""Reports go past pytest, which would take them along into its grave."""


def main(arguments: Sequence[str]) -> int:
    """Build the kernels and run the tests; returns the exit status."""
    options = ("-q", "-p", PLUGIN, "-p", "no:cacheprovider", CAPTURE, "-k", SELECTION)
    try:
        # Apart, for a report finds its lines only in a library that lies where it was loaded from.
        return _run(PLUGIN) or _run("pytest", *options, *TESTS, *arguments)
    except NoSanitizerError as error:
        print(f"the kernel tests cannot run under the sanitizers: {error}", file=sys.stderr)
        return 1


def _run(module: str, *arguments: str) -> int:
    command = at_fixed_addresses([sys.executable, "-m", module, *arguments])
    return subprocess.run(command, cwd=ROOT, env=address_environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
