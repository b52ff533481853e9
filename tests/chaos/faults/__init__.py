"""Faults by kind. Each is one function: it brings the fault about, and returns what clients must recover from."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from tests.chaos.faults import connections, leases, messages, pool, servers, tenants
from tests.chaos.recovery import Blow
from tests.chaos.rig import Rig

Fault = Callable[[str, Rig, random.Random], Blow | None]
"""Takes its kind, what it works with and its draws; None: it measured its recovery by itself."""

SERVER_FAULTS: Mapping[str, Fault] = {
    servers.KILLED: servers.kill,
    "server terminated, snapshot": servers.terminate,
    servers.NO_SNAPSHOT: servers.terminate,
    "snapshot disk full": servers.terminate_on_full_disk,
    "server killed while saving": servers.kill_while_saving,
    "server killed while restoring": servers.kill_while_restoring,
    "server frozen": servers.freeze,
}
CONNECTION_FAULTS: Mapping[str, Fault] = {
    "client killed": connections.kill_client,
    "connection cut": connections.cut,
    "connection delayed": connections.delay,
    "connection corrupted": connections.corrupt,
}
SESSION_FAULTS: Mapping[str, Fault] = {
    "pool exhausted": pool.exhaust,
    "lease expired": leases.expire,
    "hostile messages": messages.send_hostile,
    "foreign sessions probed": tenants.probe,
}

LANES = (SERVER_FAULTS, CONNECTION_FAULTS, SESSION_FAULTS)
"""Each is injected by a thread of its own, one fault after the other, so that faults of different lanes meet."""
