"""Raw bytes to every call: random ones, and valid messages that were changed."""

from __future__ import annotations

import random
import time

import grpc

from octavo_client import Client
from octavo_client._errors import OctavoError
from octavo_client.load.fate import reason_of
from tests.chaos.access import GONE, IMPATIENT
from tests.chaos.faults.side import open_side, serves_next
from tests.chaos.rig import Rig
from tests.fuzz.calls import CALLS, answer_of, fault_in
from tests.fuzz.mutation import mutated
from tests.fuzz.valid_messages import ModelShape, valid_messages

_NUM_MESSAGES = 60
_CALL_TIMEOUT_S = 30.0


def send_hostile(kind: str, rig: Rig, rng: random.Random) -> None:
    """Send messages about a session of one's own, each on a call of its own; all must be answered or refused."""
    with rig.server_lock, rig.hostile_access.client(IMPATIENT) as client:
        victim = open_side(rig, client, rng)
        victim.decode(rig)
        model = victim.session.model
        shape = ModelShape(model.name, model.num_q_heads, model.num_kv_heads, model.head_dim)
        valid = valid_messages(shape, victim.session.session_id, victim.session.handle)
        began_s = time.monotonic()
        with rig.hostile_access.channel() as channel:
            for _ in range(_NUM_MESSAGES):
                name = rng.choice(sorted(CALLS))
                _send(rig, channel, name, mutated(valid[name], rng))
        serves_next(kind, rig, client, rng, began_s)
        _close_all(rig, client)


def _send(rig: Rig, channel: grpc.Channel, name: str, message: bytes) -> None:
    answer = answer_of(channel, name, [message], _CALL_TIMEOUT_S, rig.hostile_access.metadata)
    for outcome in answer.refusals or ("answered",):
        rig.notes.refused(outcome)
    if fault := fault_in(answer):
        rig.notes.complain(f"{name} with {message[:200].hex()}: {fault}")


def _close_all(rig: Rig, client: Client) -> None:
    """Close what the messages opened; the tenant has no other sessions."""
    for state in client.list_sessions():
        try:
            client.attach(state.session_id).close()
        except OctavoError as error:
            if reason_of(error) not in GONE:  # messages may have asked for leases of milliseconds
                rig.notes.complain(f"session {state.session_id} could not be closed: {error}")
