"""The compiler's sanitizers: their flags, their runtimes, and how programs run under them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.native_build import compiler

ROOT = Path(__file__).resolve().parents[2]

ADDRESS_FLAGS = (
    *("-O2", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
"""AddressSanitizer and UndefinedBehaviorSanitizer; the first finding ends the process."""

THREAD_FLAGS = ("-O1", "-g", "-fsanitize=thread")
"""ThreadSanitizer."""


class NoSanitizerError(RuntimeError):
    """A sanitizer cannot be used on this machine; the text says which and why."""


def address_environment() -> dict[str, str]:
    """Return the environment of a Python that loads libraries with ADDRESS_FLAGS.

    Raises:
        NoSanitizerError: The compiler has no runtimes for them.
    """
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(str(find_runtime(name)) for name in ("asan", "ubsan")),
        # Python frees little of what it has at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # An allocation of its own for every array, so that the byte behind it is nobody's.
        "PYTHONMALLOC": "malloc",
        "OCTAVO_CACHE_DIR": str(ROOT / "build" / "sanitizers"),
    }


def thread_environment() -> dict[str, str]:
    """Return the environment of a program with THREAD_FLAGS: the first race ends it, a fork does not.

    Raises:
        NoSanitizerError: The compiler has no runtime for them.
    """
    find_runtime("tsan")
    return {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 die_after_fork=0"}


def find_runtime(name: str) -> Path:
    """Return the shared library of a sanitizer such as "asan".

    Raises:
        NoSanitizerError: The compiler has none.
    """
    command = [compiler(), f"-print-file-name=lib{name}.so"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(answer.stdout.strip())
    if not path.is_absolute():  # the compiler repeats the name of what it does not have
        raise NoSanitizerError(f"{compiler()} has no lib{name}.so; install GCC with its sanitizers")
    return path.resolve()


def at_fixed_addresses(command: Sequence[str]) -> list[str]:
    """Return a command that runs another without randomized addresses, where this system lets it.

    With much of that randomness a sanitizer may find its own range of addresses taken.
    """
    return [*_fixing_prefix(), *command]


@cache
def _fixing_prefix() -> tuple[str, ...]:
    setarch = shutil.which("setarch")
    if setarch is None:
        return ()
    prefix = (setarch, "-R")
    done = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if done.returncode == 0 else ()
