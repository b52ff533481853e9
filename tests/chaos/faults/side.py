"""A session that a fault has for itself, whose answers are checked as all others."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from octavo_client import Client, Session
from octavo_client.load.checks import Sample, host_row
from octavo_client.load.content import Walk, session_key, walk_of
from tests.chaos.form import MODEL
from tests.chaos.rig import Rig


@dataclass(slots=True)
class SideSession:
    """An open session of which layer 0 alone is used.

    Attributes:
        session: As its client knows it.
        key: What its content is made from.
        walk: Its content.
        length: Its tokens.
    """

    session: Session
    key: int
    walk: Walk
    length: int = 0

    def decode(self, rig: Rig) -> float:
        """Have one token answered, and checked in time; return when it was, in seconds of the monotonic clock."""
        sent_ns = time.monotonic_ns()
        rig.notes.called()
        result = self.session.decode(0, *rig.rows.step([self.walk], [self.length]))
        answered_ns = time.monotonic_ns()
        sample = Sample(MODEL, self.key, 0, self.length, host_row(result.out, 0))
        rig.notes.answered((sent_ns, answered_ns), [sample])
        self.length += 1
        return answered_ns / 1e9

    def close(self, rig: Rig) -> None:
        """Close it."""
        rig.notes.called()
        self.session.close()
        rig.notes.closed()


def open_side(
    rig: Rig, client: Client, rng: random.Random, *, lease_s: float | None = None, reserve: int = 0
) -> SideSession:
    """Open a session.

    Raises:
        OctavoError: It was refused.
    """
    key = session_key(rng.getrandbits(62))
    rig.notes.called()
    session = client.open_session(MODEL, lease_s=lease_s, reserve_tokens=reserve)
    rig.notes.opened()
    return SideSession(session, key, walk_of(key, 0))


def serves_next(kind: str, rig: Rig, client: Client, rng: random.Random, began_s: float) -> None:
    """Have a new session answered, which ends the fault."""
    side = open_side(rig, client, rng)
    rig.recoveries.note(kind, side.decode(rig) - began_s)
    side.close(rig)
