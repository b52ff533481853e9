"""What faults work with."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo_client.load.content import Rows
from tests.chaos.access import Access
from tests.chaos.disk import SnapshotDisk
from tests.chaos.fleet import Fleet
from tests.chaos.form import Form
from tests.chaos.history import History, Restart
from tests.chaos.notes import Notes
from tests.chaos.proxy import FaultyProxy
from tests.chaos.recovery import Blow, Recoveries
from tests.chaos.server import ServerProcess


@dataclass(slots=True, eq=False)
class Rig:
    """The server, its clients, and what is between them.

    Attributes:
        form: Of the run.
        seed: Of the run.
        server: Under test.
        disk: Of its snapshots.
        proxies: By client.
        fleet: The clients.
        access: The way past the proxies, for faults that have a client of their own.
        rival_access: Of another tenant.
        hostile_access: Of a tenant that sends anything.
        rows: Content of sessions.
        history: What was done.
        recoveries: What came of it.
        notes: Where faults note what they see by themselves.
        server_lock: Held by faults that end the server, and by those that need it to stay.
        keeps_snapshots: Whether the server's process has a snapshot folder.
        will_keep_snapshots: Whether the next one gets one.
        stopping: Set when the run is to end early.
    """

    form: Form
    seed: int
    server: ServerProcess
    disk: SnapshotDisk
    proxies: list[FaultyProxy]
    fleet: Fleet
    access: Access
    rival_access: Access
    hostile_access: Access
    rows: Rows
    history: History
    recoveries: Recoveries
    notes: Notes
    server_lock: threading.Lock = field(default_factory=threading.Lock)
    keeps_snapshots: bool = True
    will_keep_snapshots: bool = True
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def all_clients(self) -> range:
        """Indices of all clients."""
        return range(self.form.num_clients)

    @property
    def snapshot_flags(self) -> list[str]:
        """Of a server with a snapshot folder."""
        return ["--snapshot-dir", str(self.disk.folder)]

    def start_server(self) -> None:
        """Start the next process of the server."""
        self.keeps_snapshots = self.will_keep_snapshots
        if not self.keeps_snapshots:
            self.disk.forget()
        self.server.start(*(self.snapshot_flags if self.keeps_snapshots else []))

    def restart(self, kind: str, began_ns: int, *, is_lossy: bool) -> Blow:
        """Start a server again that a fault ended; all clients have to recover from that."""
        ended_ns = time.monotonic_ns()
        self.history.restarted(Restart(ended_ns, is_lossy))
        blow = self.strike(kind, self.all_clients, began_ns, ended_ns)
        self.start_server()
        return blow

    def strike(
        self, kind: str, clients: Iterable[int], began_ns: int, counts_from_ns: int | None = None
    ) -> Blow:
        """Wait for the recovery of clients from a fault."""
        blow = Blow(kind, began_ns, counts_from_ns or began_ns, set(clients))
        self.recoveries.add(blow)
        return blow
