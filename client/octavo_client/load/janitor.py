"""The server as the run found it: sessions of killed processes are closed, and nothing may be left."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from octavo_client import Client, ServerInfo
from octavo_client._errors import OctavoError, SessionNotFound

_SETTLE_S = 20.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the server held before the run.

    Attributes:
        session_ids: Its sessions.
        free_blocks: By model.
    """

    session_ids: frozenset[str]
    free_blocks: dict[str, int]


def read_baseline(client: Client) -> Baseline:
    """Ask the server what it holds."""
    session_ids = frozenset(session.session_id for session in client.list_sessions())
    return Baseline(session_ids, _free_blocks(client.server_info()))


class Janitor:
    """Closes what others left open, in a thread of its own.

    Args:
        client: To the server.
        baseline: What the server held before.
    """

    def __init__(self, client: Client, baseline: Baseline) -> None:
        self._client = client
        self._baseline = baseline
        self._executor = ThreadPoolExecutor(1, "load-janitor")
        self._jobs: list[Future[list[str]]] = []

    def close_soon(self, session_ids: Iterable[str]) -> None:
        """Close sessions, without waiting for it."""
        self._jobs.append(self._executor.submit(self._close_all, list(session_ids)))

    def finish(self, *, sweep: bool) -> list[str]:
        """Wait until all is closed.

        Args:
            sweep: Whether every session that was not there before the run is to be closed.

        Returns:
            What could not be closed.
        """
        faults = [fault for job in self._jobs for fault in job.result()]
        self._jobs.clear()
        return faults + (self._close_all(self.left_open()) if sweep else [])

    def left_open(self) -> list[str]:
        """Return the sessions that were not there before the run."""
        return [
            session.session_id
            for session in self._client.list_sessions()
            if session.session_id not in self._baseline.session_ids
        ]

    def differences(self) -> list[str]:
        """Return how the server differs from what it was, once it had time to settle."""
        deadline = time.monotonic() + _SETTLE_S
        while (found := self._differences()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return found

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(cancel_futures=True)

    def _differences(self) -> list[str]:
        info = self._client.server_info()
        found = []
        num_before = len(self._baseline.session_ids)
        if info.num_sessions != num_before:
            found.append(
                f"the server has {info.num_sessions} sessions, it had {num_before} before the run"
            )
        for model, num_free in _free_blocks(info).items():
            before = self._baseline.free_blocks.get(model, num_free)
            if num_free != before:
                found.append(
                    f"model {model} has {num_free} free blocks, it had {before} before the run"
                )
        return found

    def _close_all(self, session_ids: Iterable[str]) -> list[str]:
        return [fault for session_id in session_ids for fault in self._close_one(session_id)]

    def _close_one(self, session_id: str) -> list[str]:
        try:
            self._client.attach(session_id).close()
        except SessionNotFound:
            return []
        except OctavoError as error:
            return [f"session {session_id} could not be closed: {error}"]
        return []


def _free_blocks(info: ServerInfo) -> dict[str, int]:
    return {name: model.num_free_blocks for name, model in info.models.items()}
