"""A lane's way to the server, which chaos may cut at any moment; sessions outlive it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from octavo_client import Client, Session, Timeout
from octavo_client._errors import ClientClosed, SessionNotFound
from octavo_client.access import Endpoint
from octavo_client.load.content import Walk

_MAX_CUTS = 8


@dataclass(slots=True, eq=False)
class LoadSession:
    """An open session, and where it stands.

    Attributes:
        session: As the connection's client knows it.
        generation: Of that client.
        key: What its content is made from.
        walks: [num_layers] content of the layers that are used.
        position: Tokens of each layer before the current one.
        remaining: Tokens until it is closed.
        is_unsure: Whether the answer to a step of the current token was lost.
    """

    session: Session
    generation: int
    key: int
    walks: list[Walk]
    position: int
    remaining: int
    is_unsure: bool = False


class Connection:
    """A client that can be replaced; shared by the lanes whose steps go over one stream.

    Args:
        endpoint: The server.
        timeout: Of its calls and steps.
    """

    def __init__(self, endpoint: Endpoint, timeout: Timeout) -> None:
        self.endpoint = endpoint
        self._timeout = timeout
        self._lock = threading.Lock()
        self._client = endpoint.client(timeout=timeout)
        self._generation = 0
        self._is_closed = False

    def current(self) -> tuple[Client, int]:
        """Return the client and its generation."""
        with self._lock:
            return self._client, self._generation

    def reset(self) -> None:
        """Abandon the client with everything that is in flight, and go on with another one."""
        with self._lock:
            if self._is_closed:
                return
            abandoned, self._client = self._client, self.endpoint.client(timeout=self._timeout)
            self._generation += 1
        abandoned.close()

    def adopt(self, members: Sequence[LoadSession]) -> Client:
        """Return the client, after making sessions known to it.

        Raises:
            OctavoError: A session is not there, or the server.
        """
        client, generation = self.current()
        for member in members:
            if member.generation != generation:
                member.session = client.attach(member.session.session_id)
                member.generation = generation
        return client

    def close_session(self, member: LoadSession) -> None:
        """Close a session on the server, whichever client knows it.

        Raises:
            OctavoError: It is not there, or the server.
        """
        was_cut = False
        for _ in range(_MAX_CUTS):
            try:
                self.adopt([member])
                member.session.close()
            except (
                ClientClosed
            ):  # another lane cut the connection, maybe when the server had closed the session
                was_cut = True
                continue
            except SessionNotFound:
                if not was_cut:
                    raise
            return
        raise ClientClosed(
            f"session {member.session.session_id} could not be closed: cut too often"
        )

    def close(self) -> None:
        """Close the client."""
        with self._lock:
            self._is_closed = True
            client = self._client
        client.close()
