"""What the sanitizers see of a library that Python loads, and what is said where they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.native_build import build_once, compiler, content_key
from tests.sanitizers import thread_drills, toolchain
from tests.sanitizers.toolchain import (
    ADDRESS_FLAGS,
    NoSanitizerError,
    address_environment,
    at_fixed_addresses,
    find_runtime,
)

PLANTED = Path(__file__).parent / "planted" / "memory.cpp"
CALL = "import ctypes, sys; getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(int(sys.argv[3]))"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Return the environment of a process with the sanitizers."""
    try:
        return address_environment()
    except NoSanitizerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def planted() -> Path:
    """Return the library with the faults."""
    command = [compiler(), *ADDRESS_FLAGS, "-shared", "-fPIC", str(PLANTED)]
    name = f"{content_key([*command, PLANTED.read_text()])}.so"
    return build_once("sanitizers", name, lambda target: [*command, "-o", str(target)])


def call(
    planted: Path, environment: dict[str, str], function: str, size: int
) -> subprocess.CompletedProcess[str]:
    """Call a function of the library in a Python of its own."""
    command = [sys.executable, "-c", CALL, str(planted), function, str(size)]
    return subprocess.run(
        at_fixed_addresses(command),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("function", "report"),
    [
        ("planted_read", "AddressSanitizer: heap-buffer-overflow"),
        ("planted_shift", "shift exponent 32 is too large"),
    ],
)
def test_planted_faults_end_the_process(
    planted: Path, environment: dict[str, str], function: str, report: str
) -> None:
    assert call(planted, environment, function, 7).returncode == 0
    done = call(planted, environment, function, 8)
    assert done.returncode != 0
    assert report in done.stderr
    assert PLANTED.name in done.stderr, "the report has lines"


def write_program(path: Path, text: str) -> str:
    """Write a shell script and return its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_without_sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GCC answers with the bare name of a file that it does not have."""
    text = 'echo "${1#-print-file-name=}"'
    monkeypatch.setenv("CXX", write_program(tmp_path / "cxx", text))
    with pytest.raises(NoSanitizerError, match=r"cxx has no libtsan\.so; install GCC"):
        find_runtime("tsan")


@pytest.mark.parametrize(
    ("setarch", "prefix"), [("shift; exec $@", ["setarch", "-R"]), ("exit 1", []), (None, [])]
)
def test_addresses_are_fixed_where_the_system_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setarch: str | None, prefix: list[str]
) -> None:
    if setarch is not None:
        write_program(tmp_path / "setarch", setarch)
    write_program(tmp_path / "true", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    toolchain._fixing_prefix.cache_clear()
    names = [Path(part).name for part in at_fixed_addresses(["program"])]
    toolchain._fixing_prefix.cache_clear()
    assert names == [*prefix, "program"]


def test_addresses_that_are_too_random_are_told(tmp_path: Path) -> None:
    text = "echo 'FATAL: ThreadSanitizer: unexpected memory mapping 0x1-0x2' >&2; exit 66"
    program = write_program(tmp_path / "program", text)
    with pytest.raises(NoSanitizerError, match=r"mmap_rnd_bits=28.*setarch -R does not work"):
        thread_drills.run(Path(program))
