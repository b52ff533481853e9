"""Builds the CUDA library with nvcc, which ninja drives: for the GPU that is here, or ahead for several.

A build is found again by what it was made of, and by its GPUs, which its name tells: `octavo_cuda_80_90.so` has machine
code for compute capabilities 8.0 and 9.0, and intermediate code of the last, which drivers compile for newer ones.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from octavo_server.backends.base import UnsupportedError
from octavo_server.kernel_build import (
    Recipe,
    build_library,
    cache_directory,
    content_hash,
    find_csrc,
    is_intact,
    path_with_ninja,
)

CUDA_LIBRARY = "octavo_cuda"

CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that a build ahead of time is made for."""

NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)

_NVCC_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")

_FIND = "install the CUDA toolkit, or name its folder in CUDA_HOME"


def find_cuda_kernels(arch: int, verbose: bool = False) -> Path:
    """Return a library that runs on a GPU: built for it before, or now; where there is no nvcc, any that runs.

    Args:
        arch: Compute capability of the GPU, times ten.
        verbose: Show the compiler's commands and output.

    Raises:
        UnsupportedError: There is none, and no nvcc or ninja to make it, or they failed.
    """
    libraries = _builds()
    for library, archs in libraries.items():
        if arch in archs:
            return library
    if find_nvcc() is None:
        for library, archs in libraries.items():
            if any(_runs_on(built, arch, is_last=built == archs[-1]) for built in archs):
                return library
    return build_cuda_kernels([arch], verbose)


def build_cuda_kernels(archs: Sequence[int], verbose: bool = False) -> Path:
    """Return the library for GPUs of `archs`, built now unless it was before.

    Args:
        archs: Compute capabilities, times ten.
        verbose: Show the compiler's commands and output.

    Raises:
        UnsupportedError: There is no nvcc or ninja, or they failed.
    """
    return build_library(_recipe(archs), find_csrc(), cache_directory(), verbose=verbose)


def parse_archs(text: str) -> tuple[int, ...]:
    """Return the compute capabilities, times ten, that `--cuda-arch` names.

    Args:
        text: "80,90", or "all".

    Raises:
        UnsupportedError: It is neither, or names one that the kernels do not support.
    """
    if text == "all":
        return CUDA_ARCHS
    names = text.split(",")
    if not all(name.isdecimal() and int(name) >= min(CUDA_ARCHS) for name in names):
        raise UnsupportedError(
            f"--cuda-arch must be compute capabilities times ten, {min(CUDA_ARCHS)} or more, such as "
            f'80,90, or "all"; got {text!r}'
        )
    return tuple(map(int, names))


def find_nvcc() -> str | None:
    """Return CUDA's compiler: of CUDA_HOME, of PATH, or of where it is usually installed."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    places = os.pathsep.join([os.environ.get("PATH", ""), *_NVCC_PLACES])
    return shutil.which("nvcc", path=places)


def ninja_file(sources: Sequence[Path], include_dirs: Sequence[Path], archs: Sequence[int]) -> str:
    """Return a build.ninja that compiles sources for `archs` and links them into `library.so`."""
    includes = " ".join(f"-I {shlex.quote(str(folder))}" for folder in include_dirs)
    lines = [
        f"nvcc = {shlex.quote(find_nvcc() or 'nvcc')}",
        "rule compile",
        f"  command = $nvcc {' '.join(NVCC_FLAGS)} $targets {includes} -c $in -o $out",
        "rule link",
        "  command = $nvcc -shared -cudart static $in -o $out",
    ]
    objects = [f"{index}_{source.stem}.o" for index, source in enumerate(sources)]
    for source, target in zip(sources, objects, strict=True):
        lines += [f"build {target}: compile {str(source).replace(' ', '$ ')}"]
        if source.suffix == ".cu":
            lines += [f"  targets = {' '.join(_target_flags(archs))}"]
    return "\n".join([*lines, f"build library.so: link {' '.join(objects)}", ""])


def _target_flags(archs: Sequence[int]) -> list[str]:
    """Return machine code for every arch, and for GPUs to come the last one's intermediate code."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def _recipe(archs: Sequence[int]) -> Recipe:
    ordered = sorted(set(archs))

    def compile_(sources: Sequence[Path], directory: Path, verbose: bool) -> Path:
        return _compile(sources, directory, ordered, verbose)

    return Recipe(
        backend="cuda",
        name="_".join([CUDA_LIBRARY, *map(str, ordered)]),
        folders=("common", "cuda", "include"),
        flags=(*NVCC_FLAGS, platform.machine()),
        compiler=_nvcc_version(),
        no_compiler=f"no nvcc: {_FIND}",
        compile=compile_,
    )


def _builds() -> dict[Path, list[int]]:
    """Return the intact libraries of these sources, by any nvcc, with the archs of each, ascending."""
    content = content_hash(_recipe([min(CUDA_ARCHS)]), find_csrc())
    libraries = sorted(cache_directory().glob(f"{content}-*/{CUDA_LIBRARY}_*.so"))
    archs = {path: path.stem.removeprefix(f"{CUDA_LIBRARY}_").split("_") for path in libraries}
    return {path: [*map(int, names)] for path, names in archs.items() if is_intact(path)}


def _runs_on(built: int, arch: int, *, is_last: bool) -> bool:
    """Whether code built for one arch runs on another: machine code within a generation, else the last one's PTX."""
    return built <= arch and (is_last or built // 10 == arch // 10)


def _nvcc_version() -> str | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    lines = answer.stdout.split("\n")
    return next((line for line in lines if "release" in line), None)


def _compile(sources: Sequence[Path], directory: Path, archs: Sequence[int], verbose: bool) -> Path:
    """Compile by ninja, in `directory`."""
    path = path_with_ninja("cuda")
    csrc = find_csrc()
    text = ninja_file(sources, (csrc / "include", csrc), archs)
    (directory / "build.ninja").write_text(text)
    ninja = shutil.which("ninja", path=path)
    command = [str(ninja), "-C", str(directory), *(["-v"] if verbose else [])]
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path},
        stdout=None if verbose else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout or "ninja's output is above")
    return directory / "library.so"
