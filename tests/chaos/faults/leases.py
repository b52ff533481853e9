"""Sessions that nobody uses end by their leases, and say so."""

from __future__ import annotations

import random
import time

from octavo_client import Client
from octavo_client._errors import OctavoError, SessionExpired
from tests.chaos.access import IMPATIENT
from tests.chaos.faults.side import SideSession, open_side, serves_next
from tests.chaos.rig import Rig

_NUM_SESSIONS = 3
_LEASE_S = 0.5
_EXPIRY_TIMEOUT_S = 15.0
_POLL_S = 0.05


def expire(kind: str, rig: Rig, rng: random.Random) -> None:
    """Let leases of half a second end, then use the sessions."""
    with rig.server_lock, rig.access.client(IMPATIENT) as client:
        sides = [open_side(rig, client, rng, lease_s=_LEASE_S) for _ in range(_NUM_SESSIONS)]
        for side in sides:
            side.decode(rig)
        if not _are_gone(client, {side.session.session_id for side in sides}):
            rig.notes.complain(f"leases of {_LEASE_S} s lasted {_EXPIRY_TIMEOUT_S} s and more")
        began_s = time.monotonic()
        for side in sides:
            _use_expired(rig, side)
        serves_next(kind, rig, client, rng, began_s)


def _are_gone(client: Client, session_ids: set[str]) -> bool:
    deadline = time.monotonic() + _EXPIRY_TIMEOUT_S
    while session_ids & {session.session_id for session in client.list_sessions()}:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _use_expired(rig: Rig, side: SideSession) -> None:
    session_id = side.session.session_id
    try:
        side.decode(rig)
    except SessionExpired as error:
        rig.notes.error(error.reason)
        rig.notes.closed()
    except OctavoError as error:
        rig.notes.complain(f"session {session_id}, whose lease ended, answered {error}")
    else:
        rig.notes.complain(f"session {session_id}, whose lease ended, still answers")
