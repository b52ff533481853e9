"""Another tenant tries the sessions of the clients: it learns no more than from sessions that never were."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

from octavo_client import Client, Session, SessionState
from octavo_client._errors import OctavoError
from octavo_client._mirror import Mirror
from octavo_client._types import Model
from octavo_client.load.content import walk_of
from octavo_client.load.fate import reason_of
from tests.chaos.access import IMPATIENT
from tests.chaos.faults.side import serves_next
from tests.chaos.form import MODEL
from tests.chaos.rig import Rig

_NUM_PROBED = 5
_INCARNATION_LEN = 8
_RANDOM_BITS = 48
"""Of a handle; those above are the server process's, as the start of an id is."""

_ABSENT = frozenset(["SESSION_NOT_FOUND", "SESSION_LOST"])
"""What an id that names nothing is answered: of this server process, and of one before."""


def probe(kind: str, rig: Rig, rng: random.Random) -> None:
    """Call everything that takes a session, with ids and handles that are another tenant's, and with made-up ones."""
    with rig.server_lock, rig.access.client(IMPATIENT) as owner:
        states = owner.list_sessions()
        began_s = time.monotonic()
        with rig.rival_access.client(IMPATIENT) as rival:
            model = rival.server_info().models[MODEL]
            for state in rng.sample(states, min(_NUM_PROBED, len(states))):
                _compare(rig, rival, model, state, _made_up(state, rng))
            listed = {state.session_id for state in rival.list_sessions()}
            if seen := listed & {state.session_id for state in states}:
                rig.notes.complain(f"another tenant sees the sessions {sorted(seen)}")
        serves_next(kind, rig, owner, rng, began_s)


def _made_up(state: SessionState, rng: random.Random) -> SessionState:
    """Return a session of the same server process that never was."""
    session_id = f"{state.session_id[:_INCARNATION_LEN]}-{rng.getrandbits(128):032x}"
    handle = state.handle >> _RANDOM_BITS << _RANDOM_BITS | rng.getrandbits(_RANDOM_BITS)
    return replace(state, session_id=session_id, handle=handle)


def _compare(
    rig: Rig, rival: Client, model: Model, real: SessionState, made_up: SessionState
) -> None:
    answers = [
        _answers(rig, rival, Session(rival, Mirror(state, model))) for state in (real, made_up)
    ]
    for call, reason in answers[0].items():
        rig.notes.refused(reason)
        if reason not in _ABSENT or reason != answers[1][call]:
            text = f"{call} of another tenant's session answered {reason}"
            rig.notes.complain(f"{text}, that of a made-up one {answers[1][call]}")


def _answers(rig: Rig, rival: Client, session: Session) -> dict[str, str]:
    """Return the reason that each call is refused with."""
    q, k, v = rig.rows.step([walk_of(0, 0)], [0])
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: rival.get_session(session.session_id),
        "decode": lambda: session.decode(0, q, k, v, start_pos=0),
        "read": lambda: session.decode(0, q, start_pos=0),
        "append": lambda: session.append(k, v, layer=0, start_pos=0),
        "truncate": lambda: session.truncate(0),
        "close": session.close,
    }
    return {name: _reason_of(call) for name, call in calls.items()}


def _reason_of(call: Callable[[], object]) -> str:
    try:
        call()
    except OctavoError as error:
        return reason_of(error)
    return "nothing: it worked"
