"""What was done to the server and to connections, and whether a loss that a client was told follows from it. Pure."""

from __future__ import annotations

import threading
from typing import NamedTuple

from tests.chaos.account import Loss

_NS_PER_S = 1e9


class Restart(NamedTuple):
    """A server process that ended.

    Attributes:
        ended_ns: When it was seen to be gone; the next one was started after that.
        is_lossy: Whether sessions may be lost with it.
    """

    ended_ns: int
    is_lossy: bool


class History:
    """Keeps what happened; safe to use from several threads.

    Args:
        lease_s: Of the sessions.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._restarts: list[Restart] = []
        self._breaks: list[tuple[int, int]] = []

    def restarted(self, restart: Restart) -> None:
        """Note the end of a server process, before the next is started."""
        with self._lock:
            self._restarts.append(restart)

    def disconnected(self, client_idx: int, at_ns: int) -> None:
        """Note that a client's connections broke, or will."""
        with self._lock:
            self._breaks.append((client_idx, at_ns))

    def fault_of(self, loss: Loss) -> str:
        """Return why the server had no cause to say what it said; empty when it had one."""
        with self._lock:
            if loss.reason == "SESSION_LOST":
                is_due = self._was_lost(loss)
                cause = "every restart since its last answer was announced and its snapshot kept"
            elif loss.reason == "SESSION_EXPIRED":
                is_due = self._has_expired(loss)
                cause = (
                    f"it was used {_idle_s(loss):.1f} s before, its lease is {self._lease_s:g} s"
                )
            else:
                is_due = self._was_closed(loss)
                cause = "nobody closed it"
        if is_due:
            return ""
        return f"session {loss.session_id} was said to be {loss.reason} by {loss.call}: {cause}"

    def _was_lost(self, loss: Loss) -> bool:
        """Whether it could not outlive a restart: the restart is lossy, or the session had ended before."""
        restarts = [restart for restart in self._restarts if restart.ended_ns >= loss.since_ns]
        had_ended = self._has_expired(loss) or self._was_closed(loss)
        return any(restart.is_lossy or had_ended for restart in restarts)

    def _has_expired(self, loss: Loss) -> bool:
        return _idle_s(loss) >= self._lease_s

    def _was_closed(self, loss: Loss) -> bool:
        """Whether it ends with its connection, and one of its client's broke after it was last seen."""
        return loss.closes_on_disconnect and (
            any(restart.ended_ns >= loss.since_ns for restart in self._restarts)
            or any(
                client_idx == loss.client_idx and at_ns >= loss.since_ns
                for client_idx, at_ns in self._breaks
            )
        )


def _idle_s(loss: Loss) -> float:
    return (loss.until_ns - loss.since_ns) / _NS_PER_S
