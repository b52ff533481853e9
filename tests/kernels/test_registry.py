"""Backends by name, and the memory that they find."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_server.backends.base import UnsupportedError
from octavo_server.backends.cpu import CpuBackend
from octavo_server.backends.host_memory import free_host_bytes
from octavo_server.backends.registry import create_backend


@pytest.mark.parametrize(
    ("name", "created"), [("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu")]
)
def test_create_backend(name: str, created: str) -> None:
    backend = create_backend(name, num_threads=1)
    assert backend.name == created
    assert backend.description.startswith(created)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_reach_the_cpu_backend(num_threads: int) -> None:
    backend = create_backend("cpu", num_threads)
    assert isinstance(backend, CpuBackend)
    assert backend.num_threads == num_threads


@pytest.mark.parametrize("name", ["cuda", "CPU", ""])
def test_unknown_backends_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"one of auto, cpu, reference, got '{name}'"):
        create_backend(name, num_threads=1)


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       2000 kB\nMemFree:         10 kB\nMemAvailable:   1000 kB\n")
    return path


def write_cgroup(path: Path, limit: str) -> None:
    """Write a cgroup that uses 300 KiB, 100 KiB of them clean page cache."""
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{300 * 1024}\n")
    (path / "memory.stat").write_text(f"anon {200 * 1024}\ninactive_file {100 * 1024}\n")


@pytest.mark.parametrize(
    ("limit", "free_kib"),
    [("max", 1000), (str(5000 * 1024), 1000), (str(700 * 1024), 500), (str(100 * 1024), 0)],
)
def test_free_host_bytes(tmp_path: Path, meminfo: Path, limit: str, free_kib: int) -> None:
    write_cgroup(tmp_path, limit)
    assert free_host_bytes(meminfo, tmp_path) == free_kib * 1024


def test_free_host_bytes_without_a_cgroup(tmp_path: Path, meminfo: Path) -> None:
    assert free_host_bytes(meminfo, tmp_path / "absent") == 1000 * 1024
    assert free_host_bytes() > 0
