"""Backends by name, and the memory that they find."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from octavo_server.backends.base import UnsupportedError
from octavo_server.backends.cpu import CpuBackend
from octavo_server.backends.host_memory import free_host_bytes
from octavo_server.backends.reference import ReferenceBackend
from octavo_server.backends.registry import create_backend
from tests.kernels.rig import HAS_GPU

FASTEST = "cuda" if HAS_GPU else "cpu"


@pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU: the cuda kernels run emulated only")
def test_the_cuda_backend_on_a_gpu() -> None:
    """The tests of this folder take it as one more backend where it is."""
    assert create_backend("cuda", num_threads=0).description.startswith("cuda: ")


@pytest.mark.parametrize(
    ("name", "created"), [("reference", "reference"), ("cpu", "cpu"), ("auto", FASTEST)]
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


@pytest.mark.skipif(HAS_GPU, reason="torch sees a GPU")
@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_pinning_reaches_the_cpu_backend(name: str) -> None:
    backend = create_backend(name, num_threads=1, pin_threads=True)
    assert backend.description.endswith("1 threads on a core each")


@pytest.mark.skipif(HAS_GPU, reason="torch sees a GPU")
def test_cuda_without_a_gpu_says_what_is_missing() -> None:
    with pytest.raises(
        UnsupportedError, match=r"CPU build: install a CUDA build|sees no GPU: check"
    ):
        create_backend("cuda", num_threads=0)


def test_auto_serves_from_the_cpu_where_the_gpu_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> NoReturn:
        raise UnsupportedError("it is too old")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("octavo_server.backends.cuda.create_cuda_backend", refuse)
    assert create_backend("auto", num_threads=1).name == "cpu"
    assert "the GPU cannot be used: it is too old" in caplog.text


def test_auto_takes_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    backend = ReferenceBackend()
    monkeypatch.setattr("octavo_server.backends.cuda.create_cuda_backend", lambda: backend)
    assert create_backend("auto", num_threads=1) is backend


@pytest.mark.parametrize("name", ["CUDA", "CPU", ""])
def test_unknown_backends_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"one of auto, cpu, cuda, reference, got '{name}'"):
        create_backend(name, num_threads=1)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Return a proc(5) with 1000 KiB available and no groups."""
    path = tmp_path / "proc"
    (path / "self").mkdir(parents=True)
    meminfo = "MemTotal:       2000 kB\nMemFree:         10 kB\nMemAvailable:   1000 kB\n"
    (path / "meminfo").write_text(meminfo)
    return path


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    """Return where groups are."""
    path = tmp_path / "cgroup"
    path.mkdir()
    return path


def write_group(path: Path, limit: str) -> None:
    """Write a group that uses 300 KiB, 100 KiB of them clean page cache."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{300 * 1024}\n")
    (path / "memory.stat").write_text(f"anon {200 * 1024}\ninactive_file {100 * 1024}\n")


def write_group_of_version_1(path: Path, limit: int) -> None:
    """Write a group that uses 300 KiB, 100 KiB of them clean page cache, 20 of these its own."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{300 * 1024}\n")
    stat = f"inactive_file {20 * 1024}\ntotal_inactive_file {100 * 1024}\n"
    (path / "memory.stat").write_text(stat)


def write_membership(proc: Path, *lines: str) -> None:
    """Write the groups that this process is in."""
    (proc / "self" / "cgroup").write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("limit", "free_kib"),
    [("max", 1000), (str(5000 * 1024), 1000), (str(700 * 1024), 500), (str(100 * 1024), 0)],
)
@pytest.mark.parametrize("group", ["", "system.slice/octavo.service"])
def test_free_host_bytes(proc: Path, cgroups: Path, group: str, limit: str, free_kib: int) -> None:
    write_membership(proc, f"0::/{group}")
    write_group(cgroups / group, limit)
    assert free_host_bytes(proc, cgroups) == free_kib * 1024


@pytest.mark.parametrize(
    ("own", "parent", "free_kib"), [("max", 700, 500), (600, 700, 400), (900, 700, 500)]
)
def test_free_host_bytes_below_a_limited_group(
    proc: Path, cgroups: Path, own: str | int, parent: int, free_kib: int
) -> None:
    write_membership(proc, "0::/kubepods/pod/container")
    write_group(cgroups / "kubepods", "max")
    write_group(cgroups / "kubepods" / "pod", str(parent * 1024))
    own_limit = own if isinstance(own, str) else str(own * 1024)
    write_group(cgroups / "kubepods" / "pod" / "container", own_limit)
    assert free_host_bytes(proc, cgroups) == free_kib * 1024


@pytest.mark.parametrize("path", ["/docker/0123", "/../other", "/"])
def test_free_host_bytes_where_only_the_own_group_is_visible(
    proc: Path, cgroups: Path, path: str
) -> None:
    write_membership(proc, f"0::{path}")
    write_group(cgroups, str(700 * 1024))
    assert free_host_bytes(proc, cgroups) == 500 * 1024


@pytest.mark.parametrize(("limit_kib", "free_kib"), [(700, 500), (2**53 - 4, 1000)])
@pytest.mark.parametrize("visible", ["docker/0123", ""])
def test_free_host_bytes_in_version_1(
    proc: Path, cgroups: Path, visible: str, limit_kib: int, free_kib: int
) -> None:
    lines = ("9:name=systemd:/", "5:cpu,memory:/docker/0123", "3:cpuset:/", "0::/")
    write_membership(proc, *lines)
    write_group_of_version_1(cgroups / "memory" / visible, limit_kib * 1024)
    assert free_host_bytes(proc, cgroups) == free_kib * 1024


def test_free_host_bytes_without_groups(proc: Path, tmp_path: Path) -> None:
    assert free_host_bytes(proc, tmp_path / "absent") == 1000 * 1024
    write_membership(proc, "0::/")
    assert free_host_bytes(proc, tmp_path / "absent") == 1000 * 1024
    assert free_host_bytes() > 0
