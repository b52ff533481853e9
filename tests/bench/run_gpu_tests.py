"""Runs the kernel tests on the GPU that is here, with the Python and the packages that are here.

    PYTHONPATH=.:proto:server:client python3 -m tests.bench.run_gpu_tests

First the grid of tests/kernels with the cuda backend, through pytest; without pytest, the few tests of kernel_smoke.
Then those under compute-sanitizer, where that is and works. What cannot run is named with its reason.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.bench_library import ROOT
from tests.bench.oracle_only import import_oracle

KERNEL_TESTS = ROOT / "tests" / "kernels"

SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZER_LIMIT_S = 240
_SANITIZER_EXIT = 86
"""Of a run in which it found something."""

_PROBE = "import torch; torch.ones(1, device='cuda').add_(1).item()"
_SMOKE = "tests.bench.kernel_smoke"


def main() -> int:
    """Run everything; returns the exit status."""
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use; nothing was tested")
        return 2
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    )
    failed = [] if run_grid() else ["the kernel tests"]
    failed += [tool for tool in SANITIZER_TOOLS if not run_sanitizer(tool)]
    print(f"failed: {', '.join(failed)}" if failed else "the GPU tests passed")
    return 1 if failed else 0


def run_grid() -> bool:
    """Run the tests of tests/kernels on the cuda backend; returns whether they passed."""
    import_oracle()
    if importlib.util.find_spec("pytest") is None:
        skip("the grid of tests/kernels", "there is no pytest; a few tests run without it")
        return _run_smoke([]) == 0
    import pytest  # noqa: PLC0415

    return int(pytest.main(pytest_arguments(KERNEL_TESTS))) == 0


def pytest_arguments(folder: Path) -> list[str]:
    """Return pytest's arguments: the project's own settings assume plugins and versions that may not be here."""
    arguments = [str(folder), "--rootdir", str(ROOT), "-k", "cuda and not emulated"]
    arguments += [
        "-o",
        "addopts=-ra",
        "-o",
        "filterwarnings=default",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    for path in sorted(folder.glob("test_*.py")):
        if missing := missing_imports(path):
            skip(path.name, f"there is no {', '.join(missing)}")
            arguments += ["--ignore", str(path)]
    return arguments


def missing_imports(path: Path) -> list[str]:
    """Return the packages that a module imports and that are not here."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            packages.add(node.module.partition(".")[0])
    return sorted(name for name in packages if not _is_here(name))


def run_sanitizer(tool: str) -> bool:
    """Run a few tests under a tool of compute-sanitizer; returns False when it found something."""
    sanitizer = shutil.which(SANITIZER)
    if sanitizer is None:
        skip(f"{SANITIZER} {tool}", "it is not on PATH")
        return True
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_SANITIZER_EXIT), sys.executable]
    probe = _run([*command, "-c", _PROBE], is_quiet=True)
    if probe.returncode != 0:
        skip(f"{SANITIZER} {tool}", f"it does not work here: {_last_line(probe.stdout)}")
        return True
    return _run_smoke(command[:-1], "--few") == 0


def skip(what: str, reason: str) -> None:
    """Say what does not run."""
    print(f"skipped {what}: {reason}", flush=True)


def _run_smoke(under: Sequence[str], *options: str) -> int:
    print(
        f"{' '.join([Path(under[0]).name, *under[1:3]]) if under else 'plain'}: {_SMOKE}",
        flush=True,
    )
    return _run([*under, sys.executable, "-m", _SMOKE, *options]).returncode


def _run(command: Sequence[str], *, is_quiet: bool = False) -> subprocess.CompletedProcess[Any]:
    """Run a command; one that takes too long has failed."""
    # Allocations of their own, without a neighbour that an access past the end would land in.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    stdout = subprocess.PIPE if is_quiet else None
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            stdout=stdout,
            stderr=subprocess.STDOUT if is_quiet else None,
            text=True,
            timeout=SANITIZER_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"it took more than {SANITIZER_LIMIT_S} s"
        print(text, flush=True)
        return subprocess.CompletedProcess(command, 1, text)


def _last_line(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    return lines[-1] if lines else "it says nothing"


def _is_here(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main())
