"""The pool runs out of blocks while everybody works."""

from __future__ import annotations

import random
import time

from octavo_client._errors import OctavoError, OutOfBlocks, SessionLimit
from tests.chaos.access import IMPATIENT
from tests.chaos.faults.side import SideSession, open_side
from tests.chaos.form import BLOCK_SIZE
from tests.chaos.recovery import Blow
from tests.chaos.rig import Rig

_HELD_S = (0.3, 1.5)


def exhaust(kind: str, rig: Rig, rng: random.Random) -> Blow:
    """Take all blocks by reservations and hold them for a while; sessions with room in their blocks go on meanwhile."""
    with rig.server_lock, rig.access.client(IMPATIENT) as client:
        taken: list[SideSession] = []
        reserve = rig.form.max_context
        try:
            while reserve >= BLOCK_SIZE:
                try:
                    taken.append(open_side(rig, client, rng, reserve=reserve))
                except OutOfBlocks:
                    reserve //= 2
            blow = rig.strike(kind, rig.all_clients, time.monotonic_ns())
            taken[0].decode(rig)  # what is reserved is there
            rig.stopping.wait(rng.uniform(*_HELD_S))
        except SessionLimit as error:
            raise AssertionError(
                f"max_sessions is too small to exhaust the pool: {error}"
            ) from None
        finally:
            _close_all(rig, taken)
        return blow


def _close_all(rig: Rig, taken: list[SideSession]) -> None:
    for side in taken:
        try:
            side.close(rig)
        except OctavoError as error:
            rig.notes.complain(f"a session that held reserved blocks could not be closed: {error}")
