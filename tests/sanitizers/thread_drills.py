"""Drills the thread pool and the launchers under ThreadSanitizer: a program of threads/*.cpp and csrc.

python -m tests.sanitizers.thread_drills [NUM_ROUNDS]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from octavo_server.kernel_build import find_csrc
from tests.native_build import build_once, compiler, compiler_version, content_key, headers_key
from tests.sanitizers.toolchain import (
    THREAD_FLAGS,
    NoSanitizerError,
    at_fixed_addresses,
    thread_environment,
)

DRILLS = Path(__file__).parent / "threads"
NUM_ROUNDS = 300
RUN_LIMIT_S = 600

_FOLDER = "sanitizers"
_INCLUDES = (find_csrc() / "include", find_csrc() / "cpu", DRILLS)
_FLAGS = (
    *("-std=c++17", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror", *THREAD_FLAGS),
    *(f"-I{include}" for include in _INCLUDES),
)


def main(arguments: Sequence[str]) -> int:
    """Build and run; returns the exit status."""
    num_rounds = int(arguments[0]) if arguments else NUM_ROUNDS
    try:
        done = run(build(drill_sources()), str(num_rounds))
    except NoSanitizerError as error:
        print(error, file=sys.stderr)
        return 1
    print(done.stdout + done.stderr, end="")
    return done.returncode


def drill_sources() -> list[Path]:
    """Return the sources of the program: the drills, the cpu kernels and what those need."""
    folders = (DRILLS, find_csrc() / "cpu", find_csrc() / "common")
    return [path for folder in folders for path in sorted(folder.glob("*.cpp"))]


def build(sources: Sequence[Path]) -> Path:
    """Return a program of these sources with ThreadSanitizer in it, built now unless it is cached.

    Raises:
        NoSanitizerError: The compiler has none.
        RuntimeError: The compiler failed; the text is its output.
    """
    thread_environment()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(_build_object, sources)]
    command = [compiler(), *_FLAGS, *objects]
    name = content_key(command)
    return build_once(_FOLDER, name, lambda target: [*command, "-o", str(target)])


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that `build` made.

    Raises:
        NoSanitizerError: ThreadSanitizer does not start on this system.
    """
    done = subprocess.run(
        at_fixed_addresses([str(program), *arguments]),
        env=thread_environment(),
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    if "unexpected memory mapping" in done.stderr:
        raise NoSanitizerError(
            "ThreadSanitizer does not start: addresses are too random (sysctl vm.mmap_rnd_bits=28), "
            "and setarch -R does not work"
        )
    return done


def _build_object(source: Path) -> Path:
    key = content_key([compiler_version(), *_FLAGS, headers_key(_INCLUDES), source.read_text()])
    command = [compiler(), *_FLAGS, "-c", str(source)]
    return build_once(_FOLDER, f"{key}.o", lambda target: [*command, "-o", str(target)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
