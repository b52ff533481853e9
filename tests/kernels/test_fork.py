"""What becomes of the cpu backend in a child after fork(), where its threads are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
import warnings

import torch

from octavo_server.backends.cpu import CpuBackend
from tests.kernels.rig import Entry, Rig, make_spec

def run(backend):
    rig = Rig(backend, make_spec(4, 2, 128, num_layers=1, block_size=128), num_blocks=8)
    entries = [Entry(rig.open(1000), 0, 900)]
    rig.append(entries, rig.draw(entries))  # enough to be shared out
    rig.query([Entry(0, 0, 4, start_pos=896)], rig.draw([Entry(0, 0, 4)]).q)
    rig.verify_stored(0, 0)

torch.set_num_threads(1)  # its own threads do not outlive a fork either, and it waits for them
backend = CpuBackend(num_threads=3)
run(backend)
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads and fork
child = os.fork()
run(backend)
if child == 0:
    run(CpuBackend(num_threads=3))
    del backend
    print("child is done", flush=True)
else:
    assert os.waitpid(child, 0) == (child, 0)
    print("parent is done", flush=True)
"""


def test_a_child_goes_on_and_exits() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.stdout.splitlines() == ["child is done", "parent is done"], answer.stderr
    assert answer.returncode == 0
