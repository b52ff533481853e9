"""The CUDA sources by the real compiler: warnings are errors, and its report keeps what the planner assumes."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from octavo_server.backends.base import UnsupportedError
from octavo_server.backends.cuda_library import CudaLibrary
from octavo_server.cuda_build import build_cuda_kernels, find_nvcc
from octavo_server.kernel_build import find_csrc

CSRC = find_csrc()
DEVICE_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
BLOCK_THREADS = 128
REGISTERS = 65536
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
"""Of one multiprocessor."""

RESERVED_BYTES = 1024
"""Of shared memory, taken by the system from each block."""

RESIDENT_BLOCKS = {64: 4, 80: 4, 96: 4, 128: 3, 192: 2, 256: 2}
"""Blocks of the decode kernel that a multiprocessor of compute capability 9.0 has to hold, by head_dim."""

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kernel takes: registers of a thread, bytes of spills."""

    kernel: str
    num_registers: int
    num_spill_bytes: int


def compile_source(source: Path, arch: int, target: Path) -> str:
    """Compile a source alone; return the compiler's report of resources."""
    nvcc = find_nvcc()
    assert nvcc is not None
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    includes = ["-I", str(CSRC / "include"), "-I", str(CSRC)]
    command = [nvcc, "-std=c++17", f"-arch=sm_{arch}", "-O3", *strict, *includes]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def usages(report: str) -> list[Usage]:
    """Read ptxas's report."""
    pattern = re.compile(
        r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    return [
        Usage(kernel, int(registers), int(stores) + int(loads))
        for kernel, stores, loads, registers in pattern.findall(report)
    ]


def shared_bytes_of(report_dir: Path) -> dict[int, int]:
    """Return the shared memory of the decode kernel by head_dim, as its header computes it."""
    dims = "".join(
        f'  std::printf("{dim} %d\\n", SharedLayout<{dim}>::kBytes);\n' for dim in RESIDENT_BLOCKS
    )
    source = report_dir / "shared.cu"
    source.write_text(
        '#include <cstdio>\n#include "cuda/decode_kernel.h"\nusing namespace octavo::cuda;\n'
        f"int main() {{\n{dims}}}\n"
    )
    nvcc = find_nvcc()
    assert nvcc is not None
    program = report_dir / "shared"
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-I", str(CSRC / "include"), "-I", str(CSRC)]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {int(dim): int(size) for dim, size in (line.split() for line in lines.splitlines())}


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", DEVICE_SOURCES, ids=lambda path: path.name)
def test_every_source_compiles_alone_without_spills(
    source: Path, arch: int, tmp_path: Path
) -> None:
    found = usages(compile_source(source, arch, tmp_path / "object.o"))
    assert found, "no kernel in the report"
    assert [usage for usage in found if usage.num_spill_bytes] == []


@needs_nvcc
def test_a_multiprocessor_holds_the_blocks_that_hide_latency(tmp_path: Path) -> None:
    found = usages(compile_source(CSRC / "cuda" / "decode.cu", 90, tmp_path / "object.o"))
    shared_bytes = shared_bytes_of(tmp_path)
    for head_dim, num_blocks in RESIDENT_BLOCKS.items():
        block_bytes = shared_bytes[head_dim] + RESERVED_BYTES
        assert num_blocks * block_bytes <= SHARED_BYTES[90], head_dim
        kernels = [usage for usage in found if f"kernelILi{head_dim}E" in usage.kernel]
        assert len(kernels) == 2
        for usage in kernels:
            allocated = -(-usage.num_registers // 8) * 8
            assert num_blocks * BLOCK_THREADS * allocated <= REGISTERS, usage


@needs_nvcc
def test_the_library_builds_links_and_loads() -> None:
    library = CudaLibrary(build_cuda_kernels([90]))
    assert open_outcome(library) in ("opened", "no driver", "no GPU", "old driver")


def open_outcome(library: CudaLibrary) -> str:
    """Open the first GPU and close it; return what came of it."""
    device = ctypes.c_void_p()
    try:
        library.call("open", 0, ctypes.byref(device))
    except UnsupportedError as error:
        sentences = {
            "this machine has no NVIDIA driver": "no driver",
            "this machine has no NVIDIA GPU": "no GPU",
        }
        return sentences.get(
            str(error), "old driver" if "newer driver" in str(error) else str(error)
        )
    assert device.value is not None
    library.close(device.value)
    return "opened"
