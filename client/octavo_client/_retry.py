"""When to try again, and after how long. No I/O: time is the caller's."""

from __future__ import annotations

import random
from dataclasses import dataclass

from google.protobuf.message import Message

from octavo.v1 import octavo_pb2 as pb
from octavo_client._config import Retry
from octavo_client._errors import (
    GONE,
    ConnectionLost,
    Draining,
    InterruptedCall,
    OctavoError,
    QueueFull,
    RefusedError,
    StreamLimit,
)
from octavo_client._log import log_retry


def is_passing(error: OctavoError) -> bool:
    """Whether a stream that ended so is to be opened again: the server is away, moving, or briefly full."""
    return isinstance(error, (ConnectionLost, Draining, StreamLimit, QueueFull))


_LONGEST_WAIT_S = 7 * 86_400.0
"""What every clock and field below can take; nobody waits so long for one attempt."""

_MAX_DOUBLINGS = 64
"""Beyond the longest backoff of anyone, and below what a float holds."""


class Backoff:
    """Delays between attempts: doubled each time, with jitter, reset by a success."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._num_failures = 0

    def reset(self) -> None:
        """Note a success."""
        self._num_failures = 0

    def next_delay(self, error: OctavoError) -> float | None:
        """Return the seconds to wait after a failure; None when the attempts are used up."""
        self._num_failures += 1
        if self._num_failures >= self._retry.max_attempts:
            return None
        num_doublings = min(self._num_failures - 1, _MAX_DOUBLINGS)
        longest = self._retry.initial_backoff_s * 2.0**num_doublings
        delay: float = min(longest, self._retry.max_backoff_s) * random.uniform(0.5, 1.0)
        asked = error.retry_after_s if isinstance(error, RefusedError) else None
        delay = min(max(delay, asked or 0.0), _LONGEST_WAIT_S)
        log_retry(error, delay)
        return delay


@dataclass(frozen=True, slots=True)
class CallRule:
    """How a call may be repeated.

    Attributes:
        name: The rpc.
        response: What it answers with.
        changes: Whether it changes anything.
        is_repeatable: Whether it may be sent again when the one before may have been applied.
        settled_by: The refusals that mean, once the one before may have been applied, that it was.
    """

    name: str
    response: type[Message]
    changes: bool = True
    is_repeatable: bool = True
    settled_by: tuple[type[RefusedError], ...] = ()


SERVER_INFO = CallRule("ServerInfo", pb.ServerInfoResponse, changes=False)
SERVER_STATS = CallRule("ServerStats", pb.ServerStatsResponse, changes=False)
GET_SESSION = CallRule("GetSession", pb.GetSessionResponse, changes=False)
LIST_SESSIONS = CallRule("ListSessions", pb.ListSessionsResponse, changes=False)
OPEN_SESSION = CallRule("OpenSession", pb.OpenSessionResponse)
CLOSE_SESSION = CallRule("CloseSession", pb.CloseSessionResponse, settled_by=GONE)
KEEP_ALIVE = CallRule("KeepAlive", pb.KeepAliveResponse, changes=False)
TRUNCATE = CallRule("TruncateSession", pb.TruncateSessionResponse)
TRUNCATE_GUARDED = CallRule("TruncateSession", pb.TruncateSessionResponse, is_repeatable=False)


class Attempts:
    """The attempts of one call, or of a row of calls, within one deadline."""

    def __init__(self, retry: Retry, deadline: float) -> None:
        self._deadline = deadline
        self._backoff = Backoff(retry)
        self._is_ambiguous = False

    def remaining(self, now: float) -> float:
        """Return the seconds left for the next attempt."""
        return min(max(self._deadline - now, 0.001), _LONGEST_WAIT_S)

    def succeeded(self) -> None:
        """Note that a call of the row succeeded."""
        self._backoff.reset()

    def delay_after(self, error: OctavoError, now: float) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            OctavoError: `error`, when the attempts or the time are used up.
        """
        delay = self._backoff.next_delay(error)
        if delay is None or now + delay >= self._deadline:
            raise error
        return delay

    def delay_by_rule(self, rule: CallRule, error: OctavoError, now: float) -> float | None:
        """Return the seconds to wait before the next attempt; None when the call turns out to be done.

        Raises:
            OctavoError: `error`, when there is to be no other attempt.
        """
        if self._is_ambiguous and isinstance(error, rule.settled_by):
            return None
        self._is_ambiguous |= isinstance(error, InterruptedCall) and error.may_be_applied
        is_broken = isinstance(error, ConnectionLost) and rule.is_repeatable
        is_unapplied = isinstance(error, (Draining, QueueFull))
        if not (is_broken or is_unapplied):
            raise error
        return self.delay_after(error, now)
