"""What happens between a client and the server, and to clients."""

from __future__ import annotations

import random
import time

from tests.chaos.recovery import Blow
from tests.chaos.rig import Rig

_DELAY_S = (0.02, 0.3)
_DELAYED_S = (0.5, 2.0)
_FLIP_TIMEOUT_S = 60.0


def kill_client(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """SIGKILL a client: its sessions end by their leases, and another client takes its place."""
    client_idx = rng.randrange(rig.form.num_clients)
    began_ns = time.monotonic_ns()
    rig.fleet.replace(client_idx)
    return rig.strike(kind, [client_idx], began_ns, time.monotonic_ns())


def cut(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """Cut a client's connections, wherever in a message they are."""
    client_idx = rng.randrange(rig.form.num_clients)
    rig.history.disconnected(client_idx, time.monotonic_ns())
    rig.proxies[client_idx].cut()
    return rig.strike(kind, [client_idx], time.monotonic_ns())


def delay(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """Hold back what a client and the server say to each other."""
    client_idx = rng.randrange(rig.form.num_clients)
    proxy = rig.proxies[client_idx]
    proxy.delay(rng.uniform(*_DELAY_S))
    blow = rig.strike(kind, [client_idx], time.monotonic_ns())
    rig.stopping.wait(rng.uniform(*_DELAYED_S))
    proxy.delay(0)
    return blow


def corrupt(kind: str, rig: Rig, rng: random.Random) -> Blow | None:
    """Flip a bit on the way: TLS finds it and ends the connection."""
    client_idx = rng.randrange(rig.form.num_clients)
    # A client whose session may end with its connection is told so from the flip on, which comes with its next data.
    rig.history.disconnected(client_idx, time.monotonic_ns() + int(_FLIP_TIMEOUT_S * 1e9))
    waiting = rig.strike("", [client_idx], time.monotonic_ns())  # lifts the client's brake
    if not rig.proxies[client_idx].corrupt(_FLIP_TIMEOUT_S):
        rig.notes.complain(f"client {client_idx} said nothing for {_FLIP_TIMEOUT_S:g} s")
    rig.recoveries.give_up(waiting)
    return rig.strike(kind, [client_idx], time.monotonic_ns())
