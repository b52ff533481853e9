"""Starts what a run needs, and ends all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from octavo_client.load.checks import CheckPool
from octavo_client.load.content import draw_rows
from tests.chaos.disk import SnapshotDisk
from tests.chaos.fleet import Fleet
from tests.chaos.form import DTYPE, MODEL, Form
from tests.chaos.history import History
from tests.chaos.identity import CLIENTS, HOSTILE, RIVAL, Identity
from tests.chaos.notes import Notes
from tests.chaos.proxy import FaultyProxy
from tests.chaos.recovery import Recoveries
from tests.chaos.rig import Rig
from tests.chaos.run import Run
from tests.chaos.server import ServerProcess
from tests.chaos.worker import Orders

_NUM_CHECKERS = 2
_NICENESS = 3
"""Of those: every answer is to be checked, and clients wait for that."""

_NUM_SPARE_SESSIONS = 600
"""For those of killed clients, and of faults."""

_DRAIN_TIMEOUT_S = 20


@contextmanager
def chaos_run(form: Form, seed: int, folder: Path, say: Callable[[str], None]) -> Iterator[Run]:
    """Give a run whose server and clients work.

    Args:
        form: Of the run.
        seed: Of everything that is drawn.
        folder: For files, which is there and empty.
        say: Shows a line.
    """
    with ExitStack() as stack:
        disk = SnapshotDisk(folder / "disk", form.disk_bytes)
        stack.callback(disk.close)
        say(f"the snapshot folder is on {'a disk of its own' if disk.is_mounted else 'this disk'}")
        identity = Identity(folder, form)
        server = ServerProcess([*_flags(form), *identity.flags], folder / "server.log")
        stack.callback(server.close)
        server.start("--snapshot-dir", str(disk.folder))
        access = identity.access(CLIENTS, server.address)
        with access.client() as client:
            models = client.server_info().models
        proxies = [FaultyProxy(server.address, seed + idx) for idx in range(form.num_clients)]
        for proxy in proxies:
            stack.callback(proxy.close)
        fleet = Fleet(
            form.num_clients,
            lambda idx, generation: Orders(
                form, seed, idx, generation, identity.access(CLIENTS, proxies[idx].target)
            ),
        )
        stack.callback(fleet.close)
        checks = CheckPool(
            (seed, dict(models), DTYPE), _NUM_CHECKERS, is_eager=True, niceness=_NICENESS
        )
        stack.callback(checks.close)
        rig = Rig(
            form=form,
            seed=seed,
            server=server,
            disk=disk,
            proxies=proxies,
            fleet=fleet,
            access=access,
            rival_access=identity.access(RIVAL, server.address),
            hostile_access=identity.access(HOSTILE, server.address),
            rows=draw_rows(seed, models[MODEL], DTYPE),
            history=History(form.lease_s),
            recoveries=Recoveries(),
            notes=Notes(),
        )
        fleet.start()
        yield Run(rig, checks, say)


def _flags(form: Form) -> list[str]:
    values = {
        "model": form.model_flag,
        "backend": "cpu",
        "lease-s": form.lease_s,
        "max-lease-s": form.lease_s,
        "max-sessions": form.num_sessions + _NUM_SPARE_SESSIONS,
        "drain-timeout-s": _DRAIN_TIMEOUT_S,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
