"""What the device's memory does: a pure read, and a copy, by kernels of the benchmark's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.bench.results import Bandwidth
from tests.bench.setting import Setting
from tests.bench.stats import Summary, summarize

BUFFER_BYTES = 4 << 30
BLOCKS_PER_MULTIPROCESSOR = (2, 4, 8, 16)
"""Grids that are tried: the best one is the limit."""

_CHUNK_BYTES = 1 << 28

Queue = Callable[[int], None]
"""Queues one pass with a number of thread blocks."""


def measure_bandwidth(setting: Setting, num_bytes: int = BUFFER_BYTES) -> Bandwidth:
    """Measure both over a buffer of random bytes; the copy is of its first half onto its second."""
    device, library = setting.device, setting.kernels
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
    for first in range(0, num_bytes, _CHUNK_BYTES):
        buffer[first : first + _CHUNK_BYTES].random_(0, 256)
    sink = torch.zeros(4, dtype=torch.int32, device=device.torch_device)
    for tensor in (buffer, sink):
        device.adopt(tensor)
    source, half = buffer.data_ptr(), num_bytes // 2

    def read(num_blocks: int) -> None:
        library.read(source, num_bytes, sink.data_ptr(), num_blocks, device.stream())

    def copy(num_blocks: int) -> None:
        library.copy(source + half, source, half, num_blocks, device.stream())

    found = Bandwidth(_best(setting, read, num_bytes), _best(setting, copy, 2 * half), num_bytes)
    device.synchronize()
    assert torch.equal(buffer[:half], buffer[half : 2 * half]), "the copy is not its source"
    return found


def _best(setting: Setting, queue: Queue, num_bytes: int) -> Summary:
    """Return GB/s of the grid that is fastest."""
    found = []
    for per_multiprocessor in BLOCKS_PER_MULTIPROCESSOR:
        enqueue = partial(queue, per_multiprocessor * setting.device.num_multiprocessors)
        setting.device.time_us(enqueue)
        times = (setting.device.time_us(enqueue) for _ in range(setting.num_rounds))
        found.append(summarize([num_bytes / us / 1e3 for us in times]))
    return max(found, key=lambda summary: summary.median)
