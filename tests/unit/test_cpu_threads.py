"""The cpu backend's threads as the system sees them: which cores they may use, and when they wake."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from octavo_server.backends.base import UnsupportedError
from octavo_server.backends.cpu import CpuBackend
from tests.kernels.rig import Entry, Rig, make_spec

NUM_CORES = len(os.sched_getaffinity(0))
SPEC = make_spec(4, 2, 128, num_layers=2, block_size=128)
SMALL_SPEC = make_spec(2, 2, 64, num_layers=2, block_size=16)

needs_cores = pytest.mark.skipif(NUM_CORES < 2, reason="this machine has one core")


@dataclass(frozen=True, slots=True)
class Worker:
    """One thread of a pool: its id, the cores it may use, and how often it went to sleep."""

    thread_id: int
    cores: frozenset[int]
    num_sleeps: int


def workers() -> list[Worker]:
    """Return the threads of all pools of this process, the oldest first."""
    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    return [_worker(task) for task in tasks if _read(task / "comm").strip() == "octavo-cpu"]


def _worker(task: Path) -> Worker:
    fields = dict(line.split(":\t", 1) for line in _read(task / "status").splitlines())
    thread_id = int(task.name)
    cores = frozenset(os.sched_getaffinity(thread_id))
    return Worker(thread_id, cores, int(fields["voluntary_ctxt_switches"]))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the thread has ended
        return ""


def own_workers(create: Callable[[], CpuBackend]) -> tuple[CpuBackend, list[Worker]]:
    """Create a backend; return it with its threads."""
    others = {worker.thread_id for worker in workers()}
    backend = create()
    return backend, [worker for worker in workers() if worker.thread_id not in others]


def run_large_step(backend: CpuBackend) -> None:
    """Append and attend enough to be shared out."""
    rig = Rig(backend, SPEC, num_blocks=10)
    entries = [Entry(rig.open(1100), 0, 1000)]
    rig.step(entries, rig.draw(entries))


def cores_of_a_caller(backend: CpuBackend) -> set[int]:
    """Run a step in a thread of its own; return where that thread may run after it."""
    cores: set[int] = set()

    def call() -> None:
        run_large_step(backend)
        cores.update(os.sched_getaffinity(0))

    caller = threading.Thread(target=call)
    caller.start()
    caller.join()
    return cores


@needs_cores
def test_pinned_threads_have_a_core_each() -> None:
    available = sorted(os.sched_getaffinity(0))
    backend, own = own_workers(lambda: CpuBackend(num_threads=2, pin_threads=True))
    assert [worker.cores for worker in own] == [{available[1]}]
    assert cores_of_a_caller(backend) == {available[0]}
    assert backend.description.endswith(", 2 threads on a core each")
    assert os.sched_getaffinity(0) == set(available), "nobody else is bound"


@needs_cores
def test_threads_are_not_pinned_unless_asked() -> None:
    available = os.sched_getaffinity(0)
    backend, own = own_workers(lambda: CpuBackend(num_threads=3))
    assert [worker.cores for worker in own] == [available] * 2
    assert cores_of_a_caller(backend) == available


def test_more_pinned_threads_than_cores_are_refused() -> None:
    text = f"num_threads is {NUM_CORES + 1}, and this process may use {NUM_CORES} cores; lower"
    with pytest.raises(UnsupportedError, match=text):
        CpuBackend(num_threads=NUM_CORES + 1, pin_threads=True)


def asleep(own: list[Worker]) -> list[Worker]:
    """Return a backend's threads once they have gone to sleep."""
    ids = {worker.thread_id for worker in own}
    for _ in range(100):
        before = [worker for worker in workers() if worker.thread_id in ids]
        time.sleep(0.02)
        if before == [worker for worker in workers() if worker.thread_id in ids]:
            return before
    raise AssertionError("the threads do not come to rest")


def test_small_steps_wake_no_thread() -> None:
    backend, own = own_workers(lambda: CpuBackend(num_threads=3))
    rig = Rig(backend, SMALL_SPEC, num_blocks=4)
    entries = [Entry(rig.open(50), 1)]
    before = asleep(own)
    for _ in range(50):
        rig.step(entries, rig.draw(entries))
        backend.copy_blocks(rig.cache, [(0, 0)])
    assert asleep(own) == before


def test_large_steps_wake_threads() -> None:
    backend, own = own_workers(lambda: CpuBackend(num_threads=3))
    before = asleep(own)
    run_large_step(backend)
    assert asleep(own) != before


def test_many_copies_are_shared_out() -> None:
    backend, own = own_workers(lambda: CpuBackend(num_threads=3))
    rig = Rig(backend, SPEC, num_blocks=8)
    session = rig.open(128)
    rig.fill(session, 1, 128)
    source = rig.block_tables[session][0]
    before = asleep(own)
    backend.copy_blocks(rig.cache, [(source, target) for target in range(8)])
    assert asleep(own) != before
    copied = rig.read(1, np.arange(8 * 128)).k_codes.reshape(8, 128, 4, 128)
    np.testing.assert_array_equal(copied, np.broadcast_to(copied[source], copied.shape))
