"""The CUDA library's build: what ninja is told, which nvcc is taken, which earlier build will do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo_server import cuda_build
from octavo_server.backends.base import UnsupportedError
from octavo_server.cuda_build import (
    CUDA_ARCHS,
    build_cuda_kernels,
    find_cuda_kernels,
    find_nvcc,
    ninja_file,
)
from octavo_server.kernel_build import find_csrc

VERSION = "Cuda compilation tools, release 13.0, V13.0.88"

FAKE_NVCC = f"""#!/bin/sh
case "$*" in
  --version) echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo '{VERSION}';;
  *) for last; do :; done; echo "$@" >> "$(dirname "$0")/calls"; echo library > "$last";;
esac
"""


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a CUDA_HOME whose nvcc writes down what it is called with, and an empty kernel cache."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    return home


@pytest.fixture
def calls(toolkit: Path) -> Callable[[], list[str]]:
    """Return what tells the fake nvcc's calls so far."""

    def read() -> list[str]:
        path = toolkit / "bin" / "calls"
        return path.read_text().splitlines() if path.exists() else []

    return read


def test_every_source_is_compiled_for_every_arch_and_linked_statically(
    calls: Callable[[], list[str]],
) -> None:
    library = build_cuda_kernels((90, 80, 90))
    assert library.name == "octavo_cuda_80_90.so"
    *compiles, link = calls()
    sources = {path.name for path in find_csrc().rglob("*") if "cuda" in path.parts}
    compiled = {word.rpartition("/")[2] for call in compiles for word in call.split()}
    assert {name for name in sources if name.endswith((".cu", ".cpp"))} <= compiled
    assert "batch_checks.cpp" in compiled
    assert not any("cpu/" in call for call in compiles)
    for call in compiles:
        is_device_code = ".cu -o" in call
        for arch in (80, 90):
            assert (f"-gencode=arch=compute_{arch},code=sm_{arch}" in call) == is_device_code
        assert ("code=compute_90" in call) == is_device_code
    assert link.startswith("-shared -cudart static ")


@pytest.mark.usefixtures("toolkit")
def test_a_build_is_found_again(calls: Callable[[], list[str]]) -> None:
    first = build_cuda_kernels([90])
    num_calls = len(calls())
    assert build_cuda_kernels([90]) == first
    assert len(calls()) == num_calls


@pytest.mark.parametrize("arch", [80, 90])
def test_a_build_ahead_serves_each_of_its_gpus(calls: Callable[[], list[str]], arch: int) -> None:
    ahead = build_cuda_kernels([80, 90])
    num_calls = len(calls())
    assert find_cuda_kernels(arch) == ahead
    assert len(calls()) == num_calls


def test_another_gpu_is_built_for(calls: Callable[[], list[str]]) -> None:
    ahead = build_cuda_kernels([80, 90])
    num_calls = len(calls())
    assert find_cuda_kernels(120).name == "octavo_cuda_120.so"
    assert len(calls()) > num_calls
    ahead.write_text("damaged")
    assert find_cuda_kernels(90).name == "octavo_cuda_90.so"


def test_without_nvcc_a_build_ahead_is_enough(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = build_cuda_kernels([80, 90])
    monkeypatch.setenv("CUDA_HOME", str(toolkit / "gone"))
    assert find_cuda_kernels(90) == ahead
    assert find_cuda_kernels(86) == ahead, "machine code of 8.0 runs on 8.6"
    assert find_cuda_kernels(120) == ahead, "the driver compiles what was built for 9.0"
    text = r"found no nvcc: install the CUDA toolkit, .*CUDA_HOME"
    with pytest.raises(UnsupportedError, match=text):
        find_cuda_kernels(75)


def test_what_nvcc_prints_is_told(toolkit: Path) -> None:
    broken = FAKE_NVCC.replace('echo library > "$last"', "echo 'no such arch' >&2; exit 1")
    (toolkit / "bin" / "nvcc").write_text(broken)
    with pytest.raises(
        UnsupportedError, match=r"compiling the cuda kernels failed(.|\n)*no such arch"
    ):
        build_cuda_kernels([90])


def test_nvcc_of_the_path_and_of_the_usual_places(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(cuda_build, "_NVCC_PLACES", (str(toolkit / "bin"),))
    monkeypatch.setenv("PATH", str(toolkit / "nothing"))
    assert find_nvcc() == str(toolkit / "bin" / "nvcc")
    monkeypatch.setattr(cuda_build, "_NVCC_PLACES", ())
    assert find_nvcc() is None
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert find_nvcc() == str(toolkit / "bin" / "nvcc")


@pytest.mark.usefixtures("toolkit")
def test_paths_with_blanks() -> None:
    text = ninja_file([Path("/a b/x.cu")], [Path("/a b/include")], CUDA_ARCHS)
    assert "build 0_x.o: compile /a$ b/x.cu" in text
    assert "-I '/a b/include'" in text
