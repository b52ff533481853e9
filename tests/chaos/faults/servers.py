"""The server's process is ended, at the worst moment, or stands still."""

from __future__ import annotations

import random
import signal
import time

from tests.chaos.recovery import Blow
from tests.chaos.rig import Rig
from tests.chaos.server import ServerFailure

KILLED = "server killed"
NO_SNAPSHOT = "server terminated, no snapshot"
_FROZEN_S = (0.5, 3.0)
_ROOM_BYTES = 8 << 20
_EXIT_UNFINISHED = 1
_SAVING_S = 0.8
_RESTORING_S = 0.5
_POOL_IS_THERE = " blocks of "
"""Of the line after which sessions are restored."""


def kill(kind: str, rig: Rig, _rng: random.Random) -> Blow:
    """SIGKILL: every session is lost, and said to be."""
    with rig.server_lock:
        began_ns = time.monotonic_ns()
        rig.server.end(signal.SIGKILL)
        return rig.restart(kind, began_ns, is_lossy=True)


def terminate(kind: str, rig: Rig, _rng: random.Random) -> Blow:
    """SIGTERM under load: with a snapshot folder no session is lost, without one all are."""
    with rig.server_lock:
        began_ns = time.monotonic_ns()
        code = rig.server.end(signal.SIGTERM)
        if code != 0:
            rig.notes.complain(f"after SIGTERM the server ended with exit code {code}")
        is_lossless = rig.keeps_snapshots and rig.will_keep_snapshots
        return rig.restart(kind, began_ns, is_lossy=not is_lossless)


def terminate_on_full_disk(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """SIGTERM when the snapshot does not fit: the server ends and says so; what it could not write is lost."""
    with rig.server_lock:
        rig.disk.fill(rig.server.pid, rng.randrange(_ROOM_BYTES))
        began_ns = time.monotonic_ns()
        try:
            code = rig.server.end(signal.SIGTERM)
        finally:
            rig.disk.clear()
        if code not in (0, _EXIT_UNFINISHED):
            raise ServerFailure(f"on a full disk the server ended with exit code {code}")
        return rig.restart(kind, began_ns, is_lossy=True)


def kill_while_saving(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """SIGTERM, and SIGKILL a moment later: what was written whole by then comes back, and nothing older."""
    with rig.server_lock:
        began_ns = time.monotonic_ns()
        rig.server.send(signal.SIGTERM)
        rig.stopping.wait(rng.uniform(0, _SAVING_S))
        rig.server.end(signal.SIGKILL)
        return rig.restart(kind, began_ns, is_lossy=True)


def kill_while_restoring(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """SIGTERM, and SIGKILL to the next process before it listens: the one after it has the same snapshot, or none."""
    with rig.server_lock:
        began_ns = time.monotonic_ns()
        code = rig.server.end(signal.SIGTERM)
        if code != 0:
            rig.notes.complain(f"after SIGTERM the server ended with exit code {code}")
        rig.server.start_in_vain(_POOL_IS_THERE, rng.uniform(0, _RESTORING_S), *rig.snapshot_flags)
        is_lossless = rig.disk.has_snapshot and rig.will_keep_snapshots
        return rig.restart(kind, began_ns, is_lossy=not is_lossless)


def freeze(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """SIGSTOP for a while: nothing is lost, and nobody is told anything."""
    with rig.server_lock:
        blow = rig.strike(kind, rig.all_clients, time.monotonic_ns())
        rig.server.send(signal.SIGSTOP)
        try:
            rig.stopping.wait(rng.uniform(*_FROZEN_S))
        finally:
            rig.server.send(signal.SIGCONT)
        return blow
