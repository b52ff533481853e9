"""The GPU as the benchmark uses it: memory, a stream, a clock, and what it says of itself."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tests.bench.bench_library import ROOT, BenchLibrary

H200_BYTES_PER_S = 4.8e12
"""What the issue's goals are fractions of."""

_cuda: Any = torch.cuda
_H200 = re.compile(r"\bH200\b")


class Device(Protocol):
    """What runs kernels. A test has one that is emulated."""

    torch_device: torch.device
    num_multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    """Of which the benchmark may take most."""

    def stream(self) -> int:
        """Return the stream that work is queued on."""

    def time_us(self, enqueue: Callable[[], None]) -> float:
        """Return how long what is queued by `enqueue` runs."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Return what queues all of that again at once.

        Raises:
            RuntimeError: It cannot be captured.
        """

    def adopt(self, tensor: torch.Tensor) -> None:
        """Let kernels use a tensor, and take what it holds for written."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def release(self) -> None:
        """Give back memory that no tensor has any more."""


class GpuDevice:
    """A GPU through torch, on a stream of its own that is torch's current one from then on."""

    def __init__(self, device_idx: int = 0) -> None:
        self.torch_device = torch.device("cuda", device_idx)
        torch.cuda.set_device(self.torch_device)
        torch.cuda.set_stream(_cuda.Stream(self.torch_device))
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.num_multiprocessors: int = properties.multi_processor_count
        self.l2_bytes: int = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.memory_bytes: int = properties.total_memory
        self.name: str = properties.name
        self.arch = 10 * properties.major + properties.minor

    def stream(self) -> int:
        """Return torch's current stream: another one while a graph is captured."""
        return torch.cuda.current_stream(self.torch_device).cuda_stream

    def time_us(self, enqueue: Callable[[], None]) -> float:
        """Time by events around the work."""
        start, stop = (_cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        enqueue()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Capture a CUDA graph."""
        self.synchronize()
        stream = torch.cuda.current_stream(self.torch_device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                enqueue()
        finally:
            torch.cuda.set_stream(stream)  # torch does not, where the capture fails
        return graph.replay

    def adopt(self, tensor: torch.Tensor) -> None:
        """Do nothing: a GPU's memory is a GPU's memory."""

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        """Empty torch's cache."""
        torch.cuda.empty_cache()


def nominal_rate(name: str, library: BenchLibrary) -> float | None:
    """Return the bytes a second that fractions are told of, None when they are not known."""
    return H200_BYTES_PER_S if is_h200(name) else library.nominal_rate(0)


def is_h200(name: str) -> bool:
    """Return whether a device is the one that the goals are for."""
    return _H200.search(name) is not None


def describe_gpu(device: GpuDevice, nominal: float | None) -> dict[str, Any]:
    """Return a GPU's facts for the results."""
    return {
        "name": device.name,
        "compute_capability": f"{device.arch // 10}.{device.arch % 10}",
        "num_multiprocessors": device.num_multiprocessors,
        "l2_bytes": device.l2_bytes,
        "memory_bytes": device.memory_bytes,
        "nominal_bytes_per_s": nominal,
        "driver": _first_line(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        ),
    }


def describe_software(nvcc: str) -> dict[str, Any]:
    """Return the versions that the results depend on."""
    version = torch.version
    answer = _run([nvcc, "--version"])
    release = re.search(r"V[\d.]+", answer or "")
    status = _run(["git", "status", "--porcelain", "--untracked-files=no"])
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": version.cuda,
        "nvcc": release.group() if release else None,
        "commit": _first_line(["git", "rev-parse", "HEAD"]),
        "is_dirty": None if status is None else bool(status.strip()),
        "system": platform.platform(),
    }


def _first_line(command: list[str]) -> str | None:
    answer = _run(command)
    return answer.strip().partition("\n")[0] if answer else None


def _run(command: list[str]) -> str | None:
    """Return what a command prints, None when it fails or is not there."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
