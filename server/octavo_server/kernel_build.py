"""Builds the kernels on first use, and finds them again by the content that they were built from.

A build lives in `<cache>/kernels/<hash of sources and flags>-<hash of the compiler>`, where
`<cache>` is $OCTAVO_CACHE_DIR, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo. A library is
compiled elsewhere and renamed into place, under a lock, with its digest beside it; one that does not
have that digest (any more) is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo_server.backends.base import UnsupportedError

log = logging.getLogger(__name__)

CPU_LIBRARY = "octavo_cpu"
"""Name of the cpu library and of its torch.ops namespace."""

CFLAGS = ("-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra")
"""No fast-math, and no contraction: both would change stored codes."""

_LOG_NAME = "build.log"
_SCRATCH_PREFIX = "build-"
_NUM_TAIL_LINES = 20
_COMPILED_SUFFIXES = (".cpp", ".cu")
_SOURCE_SUFFIXES = (".h", *_COMPILED_SUFFIXES)

Compile = Callable[[Sequence[Path], Path, bool], Path]
"""Compiles sources in a directory and returns the library; the last argument: whether to show it all.

Raises RuntimeError with the compiler's output.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one backend's library is made.

    Attributes:
        backend: Whose kernels they are.
        name: Name of the library, without its suffix.
        folders: Folders of csrc that it is made of.
        flags: What a build depends on besides the sources and the compiler.
        compiler: Name and version of the compiler; None where there is none.
        no_compiler: What to say then.
        compile: Compiles.
    """

    backend: str
    name: str
    folders: tuple[str, ...]
    flags: tuple[str, ...]
    compiler: str | None
    no_compiler: str
    compile: Compile


def find_csrc() -> Path:
    """Return the directory of the C++ sources: in the installed package, or in the checkout.

    Raises:
        UnsupportedError: There is neither.
    """
    package = Path(__file__).resolve().parent
    for csrc in (package / "csrc", package.parents[1] / "csrc"):
        if (csrc / "cpu").is_dir():
            return csrc
    raise UnsupportedError(f"the kernels' sources are missing beside {package}; reinstall octavo")


def build_cpu_kernels(verbose: bool = False) -> Path:
    """Return the cpu library, loaded, and built now unless it was before.

    Args:
        verbose: Show the compiler's commands and output.

    Raises:
        UnsupportedError: There is no compiler that will do or no ninja, the compiler failed, or the
            library cannot be kept or loaded.
    """
    recipe = cpu_recipe(compile_with_torch)
    library = build_library(recipe, find_csrc(), cache_directory(), verbose=verbose)
    load_library(library)
    return library


def cpu_recipe(compile_: Compile) -> Recipe:
    """Return how the cpu library is made here, by `compile_`.

    Raises:
        UnsupportedError: The compiler cannot be one of ours.
    """
    return Recipe(
        backend="cpu",
        name=CPU_LIBRARY,
        folders=("bindings", "common", "cpu", "include"),
        flags=(*CFLAGS, torch.__version__, platform.machine()),
        compiler=compiler_version(),
        no_compiler=(
            f"no C++ compiler {_compiler()!r}: install one (Debian and Ubuntu: apt-get install g++), "
            "or name yours in CXX"
        ),
        compile=compile_,
    )


def load_library(library: Path) -> None:
    """Load a library of operations into torch; once more does nothing.

    Raises:
        UnsupportedError: The system does not take it; the text says why.
    """
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UnsupportedError(load_error_text("cpu", library, error)) from error


def load_error_text(backend: str, library: Path, error: OSError) -> str:
    """Return why a library cannot be loaded, and what to do."""
    return (
        f"the {backend} backend cannot load its kernels from {library.parent}: "
        f"{error.__cause__ or error}; delete that directory, or set OCTAVO_CACHE_DIR to one that "
        "programs can be run from"
    )


def cache_directory() -> Path:
    """Return where builds are kept."""
    if explicit := os.environ.get("OCTAVO_CACHE_DIR"):
        return Path(explicit) / "kernels"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "octavo" / "kernels"


def build_library(recipe: Recipe, csrc: Path, cache: Path, *, verbose: bool) -> Path:
    """Return a recipe's library of the sources under `csrc`, built now unless it is cached.

    Args:
        recipe: How it is made.
        csrc: Sources; those in the recipe's folders count.
        cache: Where builds are kept.
        verbose: Passed on to the compiler.

    Raises:
        UnsupportedError: It is not cached, and there is no compiler, the compiler failed, or the
            library cannot be kept.
    """
    content = content_hash(recipe, csrc)
    if recipe.compiler is None:
        return _any_build(recipe, cache, content)
    library = cache / f"{content}-{_short_hash([recipe.compiler])}" / f"{recipe.name}.so"
    if is_intact(library):
        return library
    with _locked(recipe, library.parent):
        if not is_intact(library):  # another process may have built it meanwhile
            _build(recipe, csrc, library, verbose=verbose)
    return library


def is_intact(library: Path) -> bool:
    """Return whether a library is there, and is what was compiled."""
    try:
        return _digest_path(library).read_text() == _digest(library)
    except OSError:
        return False


def content_hash(recipe: Recipe, csrc: Path) -> str:
    """Return a short hash of everything but the compiler that a build depends on."""
    parts = [*recipe.flags]
    for path in _sources(recipe, csrc):
        parts += [str(path.relative_to(csrc)), path.read_text()]
    return _short_hash(parts)


def compiler_version() -> str | None:
    """Return the C++ compiler's name and version, None when there is none.

    Raises:
        UnsupportedError: It cannot be one of ours.
    """
    compiler = _compiler()
    if len(compiler.split()) != 1:
        raise UnsupportedError(
            f"CXX must be one program, got {compiler!r}; name a compiler, or a script that runs yours"
        )
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version = answer.stdout.partition("\n")[0]
    if "clang" in version and platform.machine() == "x86_64":  # it ignores GCC's target pragmas
        raise UnsupportedError(
            f"on x86-64 the kernels need GCC, {compiler!r} is {version!r}; install it (Debian and "
            "Ubuntu: apt-get install g++) and set CXX=g++"
        )
    return f"{compiler} {version}"


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _sources(recipe: Recipe, csrc: Path) -> list[Path]:
    paths = (path for folder in recipe.folders for path in (csrc / folder).rglob("*"))
    return sorted(path for path in paths if path.suffix in _SOURCE_SUFFIXES)


def _short_hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _any_build(recipe: Recipe, cache: Path, content: str) -> Path:
    """Return a build of this content by any compiler: an image may carry it and no compiler."""
    for library in sorted(cache.glob(f"{content}-*/{recipe.name}.so")):
        if is_intact(library):
            return library
    raise UnsupportedError(
        f"the {recipe.backend} backend compiles its kernels on first use and found {recipe.no_compiler}"
    )


@contextmanager
def _locked(recipe: Recipe, directory: Path) -> Iterator[None]:
    """Make a directory and hold its lock, which the kernel drops when this process dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise UnsupportedError(_cache_text(recipe, directory, error)) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(recipe: Recipe, csrc: Path, library: Path, *, verbose: bool) -> None:
    """Compile in a scratch directory and move the library into its place; the lock is held."""
    log.info("compiling the %s kernels for this machine: about a minute, once", recipe.backend)
    start_s = time.monotonic()
    sources = [path for path in _sources(recipe, csrc) if path.suffix in _COMPILED_SUFFIXES]
    try:
        for stale in library.parent.glob(f"{_SCRATCH_PREFIX}*"):  # of a process that was killed
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=library.parent) as scratch:
            _keep(recipe.compile(sources, Path(scratch), verbose), library)
    except RuntimeError as error:
        log_path = library.parent / _LOG_NAME
        raise UnsupportedError(_failure_text(recipe, str(error), log_path)) from error
    except ImportError as error:
        text = f"compiling the {recipe.backend} kernels failed: {error}; install it"
        raise UnsupportedError(text) from error
    except OSError as error:
        raise UnsupportedError(_cache_text(recipe, library.parent, error)) from error
    duration_s = time.monotonic() - start_s
    log.info("compiled the %s kernels in %.0f s: %s", recipe.backend, duration_s, library)


def _keep(compiled: Path, library: Path) -> None:
    """Move what was compiled to `library`, its digest first; on disk before it has that name."""
    digest = compiled.with_suffix(".sha256")
    digest.write_text(_digest(compiled))
    for path, target in ((digest, _digest_path(library)), (compiled, library)):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.rename(target)


def _failure_text(recipe: Recipe, output: str, log_path: Path) -> str:
    """Return the end of the compiler's output, once all of it is in a file if there is room."""
    tail = "\n".join(output.splitlines()[-_NUM_TAIL_LINES:])
    failed = f"compiling the {recipe.backend} kernels failed"
    try:
        log_path.write_text(output)
    except OSError as error:
        return f"{failed} ({log_path}: {error}), the end is:\n{tail}"
    return f"{failed}; all of it is in {log_path}, the end is:\n{tail}"


def _cache_text(recipe: Recipe, directory: Path, error: OSError) -> str:
    return (
        f"the {recipe.backend} backend cannot keep its kernels in {directory}: "
        f"{error.__cause__ or error}; set OCTAVO_CACHE_DIR to a directory that can be written and "
        "that programs can be run from"
    )


def compile_with_torch(sources: Sequence[Path], directory: Path, verbose: bool) -> Path:
    """Compile through torch's own extension builder, which drives ninja, and loads the library."""
    # Costs most of a second, and is needed once: not at module level.
    from torch.utils import cpp_extension  # noqa: PLC0415

    with _build_environment():
        library = cpp_extension.load(
            CPU_LIBRARY,
            [str(path) for path in sources],
            extra_cflags=list(CFLAGS),
            extra_include_paths=[str(find_csrc() / part) for part in ("include", "cpu")],
            build_directory=str(directory),
            is_python_module=False,
            verbose=verbose,
        )
    return Path(library)


@contextmanager
def _build_environment() -> Iterator[None]:
    """Let torch find the compiler, and this environment's ninja where its bin is not on PATH."""
    path, compiler = os.environ.get("PATH", ""), os.environ.get("CXX")
    os.environ["PATH"] = path_with_ninja("cpu")
    os.environ["CXX"] = _compiler()  # torch would take an empty one as it is
    try:
        yield
    finally:
        os.environ["PATH"] = path
        del os.environ["CXX"]
        if compiler is not None:
            os.environ["CXX"] = compiler


def path_with_ninja(backend: str) -> str:
    """Return PATH, and this environment's bin behind it; ninja is on it.

    Raises:
        UnsupportedError: It is not.
    """
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([os.environ.get("PATH", ""), here])
    if shutil.which("ninja", path=path) is None:
        raise UnsupportedError(
            f"the {backend} backend compiles its kernels on first use and found no ninja: install it "
            "(pip install ninja, or on Debian and Ubuntu: apt-get install ninja-build)"
        )
    return path
