"""Sessions drawn from the workload: opened, filled with a prompt, and closed."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from octavo_client import Session, Timeout
from octavo_client._errors import OctavoError, SessionNotFound
from octavo_client.load.book import Book
from octavo_client.load.chaos import Chaos, abandon_upload
from octavo_client.load.connection import Connection, LoadSession
from octavo_client.load.content import Rows, Walk, session_key, walk_of
from octavo_client.load.pace import Clock
from octavo_client.load.plan import Share, Workload

_WHOLE_UPLOAD_BYTES = 32 << 20
"""Prompts of more bytes are made and sent layer by layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Rig:
    """What the lanes of one process share.

    Attributes:
        workload: What they do.
        share: How much of it.
        rows: Content by model.
        book: Where they note it.
        chaos: What disturbs them.
        clock: What time it is.
        stopping: Set when the run is to end early.
    """

    workload: Workload
    share: Share
    rows: Mapping[str, Rows]
    book: Book
    chaos: Chaos
    clock: Clock
    stopping: threading.Event


class SessionSource:
    """Opens and closes the sessions of one lane.

    Args:
        rig: What the lanes share.
        lane_idx: The lane, from 0 in this process.
        connection: Its way to the server.
    """

    def __init__(self, rig: Rig, lane_idx: int, connection: Connection) -> None:
        self._rig = rig
        self._connection = connection
        self._name = (rig.workload.seed, *_numbers(rig.share), lane_idx)
        self._serials = itertools.count()

    def open(self, model: str, *, is_first: bool) -> LoadSession:
        """Open a session and upload its prompt.

        Args:
            model: Name of its model.
            is_first: Whether it is one that the run begins with: some of its output is behind it then, so that sessions
                do not end all at once.

        Raises:
            OctavoError: It was refused, or the server is gone; nothing is left open.
        """
        workload = self._rig.workload
        key = session_key(*self._name, next(self._serials))
        rng = random.Random(key)
        num_prompt, num_output = workload.prompt_tokens.draw(rng), workload.output_tokens.draw(rng)
        if self._rig.chaos.breaks_upload():
            self._open_and_abandon(model, num_prompt)
        client, generation = self._connection.current()
        session = client.open_session(model)
        self._rig.book.opened(session.session_id)
        walks = [walk_of(key, layer) for layer in range(workload.num_layers(model))]
        remaining = rng.randint(1, num_output) if is_first else num_output
        member = LoadSession(session, generation, key, walks, num_prompt, remaining)
        try:
            self._upload(member, num_prompt)
        except OctavoError:
            self.close(member)
            raise
        return member

    def close(self, member: LoadSession) -> None:
        """Close a session; what goes wrong is noted."""
        session_id = member.session.session_id
        try:
            self._connection.close_session(member)
        except SessionNotFound as error:
            self._rig.book.error(error)
        except OctavoError as error:
            self._rig.book.error(error)
            return
        self._rig.book.closed(session_id)

    def _upload(self, member: LoadSession, num_tokens: int) -> None:
        session = member.session
        rows = self._rig.rows[session.model.name]
        started = self._rig.clock()
        upload_prompt(session, rows, member.walks, num_tokens)
        num_bytes = len(member.walks) * num_tokens * rows.k[0].nbytes * 2
        self._rig.book.uploaded(num_tokens, num_bytes, self._rig.clock() - started)

    def _open_and_abandon(self, model: str, num_tokens: int) -> None:
        """Open a session, break its upload off, and close it."""
        book = self._rig.book
        client, generation = self._connection.current()
        session = client.open_session(model)
        book.opened(session.session_id)
        k, v = self._rig.rows[model].prompt([Walk(0, 1)], num_tokens)
        abandon_upload(self._connection.endpoint, session.session_id, k[0], v[0])
        book.chaos("cancel upload")
        self.close(LoadSession(session, generation, 0, [], 0, 0))


def upload_prompt(session: Session, rows: Rows, walks: list[Walk], num_tokens: int) -> None:
    """Append the prompt of every layer that is used."""
    layer_bytes = 2 * num_tokens * rows.k[0].nbytes
    is_whole = len(walks) == session.model.num_layers
    if is_whole and layer_bytes * len(walks) <= _WHOLE_UPLOAD_BYTES:
        session.append(*rows.prompt(walks, num_tokens))
        return
    for layer, walk in enumerate(walks):
        k, v = rows.prompt([walk], num_tokens)
        session.append(k[0], v[0], layer=layer)


def timeouts(workload: Workload) -> Timeout:
    """Return the timeouts of a lane's client."""
    return Timeout(call_s=max(workload.timeout_s, 10.0), step_s=workload.timeout_s)


def _numbers(share: Share) -> tuple[int, int, int]:
    return share.point_idx, share.process_idx, share.generation
