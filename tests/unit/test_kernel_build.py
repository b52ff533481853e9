"""Kernels are built once per content and compiler, and a build that cannot be made says why."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from octavo_server import kernel_build
from octavo_server.backends.base import UnsupportedError
from octavo_server.kernel_build import build_library, cpu_recipe, find_csrc

NO_COMPILER = "no-such-compiler"


class FakeCompiler:
    """Writes a library without compiling, and remembers what it was given."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.calls: list[list[str]] = []
        self._failure = failure

    def __call__(self, sources: Sequence[Path], directory: Path, verbose: bool) -> Path:
        self.calls.append([source.name for source in sources])
        if self._failure is not None:
            raise self._failure
        library = directory / "compiled.so"
        library.write_text("library")
        return library


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())


def write_compiler(directory: Path, version: str) -> str:
    """Write a program that answers --version, and return its path."""
    path = directory / "cxx"
    path.write_text(f"#!/bin/sh\nprintf '%s' '{version}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """Return a small source tree."""
    directory = tmp_path / "csrc"
    (directory / "cpu").mkdir(parents=True)
    (directory / "include").mkdir()
    (directory / "cpu" / "decode.cpp").write_text("int decode;")
    (directory / "include" / "decode.h").write_text("extern int decode;")
    (directory / "notes.txt").write_text("not a source")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return where builds are kept; it does not exist yet."""
    return tmp_path / "cache" / "kernels"


def test_a_cached_build_is_not_compiled_again(csrc: Path, cache: Path) -> None:
    compiler = FakeCompiler()
    first = build_library(cpu_recipe(compiler), csrc, cache, verbose=False)
    assert build_library(cpu_recipe(compiler), csrc, cache, verbose=False) == first
    assert compiler.calls == [["decode.cpp"]]
    assert first.read_text() == "library"
    assert names_in(first.parent) == ["lock", "octavo_cpu.sha256", "octavo_cpu.so"]


@pytest.mark.parametrize("part", ["library", "octavo_cpu.sha256"])
@pytest.mark.parametrize("left", [None, "", "lib", "librarY"])
def test_a_damaged_build_is_made_again(
    csrc: Path, cache: Path, part: str, left: str | None
) -> None:
    library = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    damaged = library if part == "library" else library.with_name(part)
    damaged.unlink()
    if left is not None:
        damaged.write_text(left)
    compiler = FakeCompiler()
    assert build_library(cpu_recipe(compiler), csrc, cache, verbose=False) == library
    assert len(compiler.calls) == 1
    assert library.read_text() == "library"
    assert kernel_build.is_intact(library)


def test_what_is_kept_is_on_disk_before_it_has_its_name(
    csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr("os.fsync", fsync)
    build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    assert [path.name for path in flushed] == ["compiled.sha256", "compiled.so"]


def test_what_a_killed_build_left_is_removed(csrc: Path, cache: Path) -> None:
    library = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    (library.parent / "build-killed").mkdir()
    (library.parent / "build-killed" / "decode.o").write_text("")
    library.unlink()
    build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    assert names_in(library.parent) == ["lock", "octavo_cpu.sha256", "octavo_cpu.so"]


@pytest.mark.parametrize("changed", ["cpu/decode.cpp", "include/decode.h"])
def test_changed_content_is_another_build(csrc: Path, cache: Path, changed: str) -> None:
    compiler = FakeCompiler()
    first = build_library(cpu_recipe(compiler), csrc, cache, verbose=False)
    (csrc / changed).write_text("// changed")
    second = build_library(cpu_recipe(compiler), csrc, cache, verbose=False)
    assert second != first
    assert first.exists()
    assert len(compiler.calls) == 2


def test_files_that_are_no_sources_do_not_count(csrc: Path, cache: Path) -> None:
    first = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    (csrc / "notes.txt").write_text("changed")
    assert build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False) == first


@pytest.mark.parametrize("part", ["flags", "torch", "compiler"])
def test_what_else_makes_another_build(
    csrc: Path, cache: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    if part == "flags":
        monkeypatch.setattr(kernel_build, "CFLAGS", ("-O0",))
    elif part == "torch":
        monkeypatch.setattr("torch.__version__", "0.0")
    else:
        monkeypatch.setattr(kernel_build, "compiler_version", lambda: "g++ 99")
    assert build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False) != first


def test_builds_at_once_compile_once(csrc: Path, cache: Path) -> None:
    compiler = FakeCompiler()
    barrier = threading.Barrier(4)

    def build() -> None:
        barrier.wait()
        build_library(cpu_recipe(compiler), csrc, cache, verbose=False)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.calls) == 1


def test_no_compiler_names_the_package(
    csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", NO_COMPILER)
    with pytest.raises(UnsupportedError, match=rf"'{NO_COMPILER}'.*apt-get install g\+\+.*CXX"):
        build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)


def test_no_compiler_but_a_build_of_the_same_content(
    csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    monkeypatch.setenv("CXX", NO_COMPILER)
    assert build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False) == built
    (csrc / "cpu" / "decode.cpp").write_text("// changed")
    with pytest.raises(UnsupportedError, match="no C\\+\\+ compiler"):
        build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)


def test_no_compiler_and_a_damaged_build(
    csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False).write_text("")
    monkeypatch.setenv("CXX", NO_COMPILER)
    with pytest.raises(UnsupportedError, match="no C\\+\\+ compiler"):
        build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)


@pytest.mark.parametrize("cxx", ["ccache g++", "g++ -m64", " "])
def test_a_compiler_with_arguments_is_refused(
    csrc: Path, cache: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(UnsupportedError, match=re.escape(f"must be one program, got {cxx!r}; ")):
        build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)


def test_an_empty_cxx_is_none(csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    default = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    monkeypatch.setenv("CXX", "")
    assert build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False) == default


@pytest.mark.parametrize("version", ["Debian clang version 14.0.6", "clang version 19.1.7"])
def test_clang_is_refused_on_x86(
    csrc: Path, cache: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", write_compiler(csrc, version))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(UnsupportedError, match=f"need GCC, .*cxx' is '{version}'.*set CXX=g\\+\\+"):
        build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)


def test_a_compiler_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = write_compiler(tmp_path, "")
    monkeypatch.setenv("CXX", compiler)
    assert kernel_build.compiler_version() == f"{compiler} "


def test_a_failed_compile_shows_its_end_and_keeps_it_all(csrc: Path, cache: Path) -> None:
    output = "\n".join(f"line {i}" for i in range(100))
    with pytest.raises(UnsupportedError) as caught:
        build_library(cpu_recipe(FakeCompiler(RuntimeError(output))), csrc, cache, verbose=False)
    text = str(caught.value)
    (log,) = cache.glob("*/build.log")
    assert str(log) in text
    assert "line 99" in text
    assert "line 50" not in text
    assert log.read_text() == output
    build_library(
        cpu_recipe(FakeCompiler()), csrc, cache, verbose=False
    )  # the next one starts afresh


def test_a_failed_compile_whose_log_cannot_be_kept(csrc: Path, cache: Path) -> None:
    library = build_library(cpu_recipe(FakeCompiler()), csrc, cache, verbose=False)
    library.unlink()
    (library.parent / "build.log").mkdir()
    with pytest.raises(UnsupportedError, match=r"build\.log: .*Is a directory.*\nline 99"):
        build_library(cpu_recipe(FakeCompiler(RuntimeError("line 99"))), csrc, cache, verbose=False)


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (OSError("No space left"), r"keep its kernels in .*: No space left; set OCTAVO_CACHE_DIR"),
        (ImportError("No module named 'setuptools'"), "No module named 'setuptools'; install it"),
    ],
)
def test_what_else_may_fail_is_told(csrc: Path, cache: Path, failure: Exception, text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        build_library(cpu_recipe(FakeCompiler(failure)), csrc, cache, verbose=False)


def test_a_library_that_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "octavo_cpu.so"
    library.write_text("library")
    monkeypatch.setattr(kernel_build, "build_library", lambda *_, **__: library)
    text = f"cannot load its kernels from {tmp_path}: .*too short; .* OCTAVO_CACHE_DIR"
    with pytest.raises(UnsupportedError, match=text):
        kernel_build.build_cpu_kernels()


def test_a_cache_that_cannot_be_written(csrc: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UnsupportedError, match="set OCTAVO_CACHE_DIR"):
        build_library(cpu_recipe(FakeCompiler()), csrc, blocker / "kernels", verbose=False)


def test_a_real_compiler_failure_is_told(
    csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (csrc / "cpu" / "decode.cpp").write_text("int decode = not_declared;")
    monkeypatch.setattr(kernel_build, "find_csrc", lambda: csrc)
    with pytest.raises(UnsupportedError, match="not_declared"):
        build_library(cpu_recipe(kernel_build.compile_with_torch), csrc, cache, verbose=False)


def test_no_ninja_names_the_package(
    csrc: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler is not None
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", str(bin_directory))
    monkeypatch.setattr("sys.executable", str(bin_directory / "python"))
    with pytest.raises(UnsupportedError, match="pip install ninja"):
        build_library(cpu_recipe(kernel_build.compile_with_torch), csrc, cache, verbose=False)
    assert os.environ["PATH"] == str(bin_directory)
    assert os.environ["CXX"] == compiler


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OCTAVO_CACHE_DIR": "/a"}, "/a/kernels"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/octavo/kernels"),
        ({"HOME": "/c"}, "/c/.cache/octavo/kernels"),
    ],
)
def test_where_builds_are_kept(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OCTAVO_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert kernel_build.cache_directory() == Path(expected)


def test_the_sources_are_found() -> None:
    assert (find_csrc() / "bindings" / "cpu_ops.cpp").is_file()
