"""Compiles C++ of the tests, and keeps what it compiled by its content.

Files live in a folder beside the kernels that the server builds; each is compiled elsewhere and renamed into place, so
that processes may build the same at once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from octavo_server.kernel_build import cache_directory


def build_once(folder: str, name: str, command_for: Callable[[Path], list[str]]) -> Path:
    """Return a file of a folder of the cache, made by a command unless it is there.

    Args:
        folder: Of the cache.
        name: Names the file's content: has a `content_key`.
        command_for: Returns the command that makes the file at a path.

    Raises:
        RuntimeError: The command failed; the text is its output.
    """
    directory = cache_directory().parent / folder
    built = directory / name
    if not built.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=directory) as scratch:
            target = Path(scratch) / name
            _run(command_for(target))
            target.rename(built)
    return built


def content_key(parts: Iterable[str]) -> str:
    """Return a hash of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def headers_key(folders: Iterable[Path]) -> str:
    """Return a hash of all headers in some folders."""
    headers = [path for folder in folders for path in sorted(folder.rglob("*.h"))]
    return content_key(text for path in headers for text in (str(path), path.read_text()))


def compiler() -> str:
    """Return the C++ compiler, the one of the kernels."""
    return os.environ.get("CXX") or "c++"


@cache
def compiler_version() -> str:
    """Return what the compiler says of itself."""
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
