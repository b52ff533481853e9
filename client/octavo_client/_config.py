"""Small value objects that a caller passes: how long to wait, and how often to try again."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True, slots=True)
class Timeout:
    """How long the client waits before it gives up; every wait is bounded.

    Attributes:
        connect_s: Seconds for one attempt to connect.
        call_s: Seconds for one unary call (server_info, open_session, truncate ...), its retries included.
        step_s: Seconds for one decode step, from submit to result, reconnecting included.
        append_s: Seconds for one whole append, export or import, all messages and reconnecting included.
    """

    connect_s: float = 10.0
    call_s: float = 10.0
    step_s: float = 30.0
    append_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "call_s", "step_s", "append_s"):
            check_seconds(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class Retry:
    """How often the client tries again where that is safe; the timeouts bound it all.

    The defaults leave it to the timeouts: a server that is restarted is back within a step's.

    Attributes:
        max_attempts: Attempts in a row that may fail before the error is raised; 1 = never try again.
        initial_backoff_s: Seconds before the second attempt; doubled for every further one.
        max_backoff_s: Most seconds between two attempts.
    """

    max_attempts: int = 100
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s < float("inf"):
            raise ValueError(
                "initial_backoff_s must be positive and at most max_backoff_s, which is finite, "
                f"got {self.initial_backoff_s} and {self.max_backoff_s}"
            )


def check_seconds(name: str, seconds: float) -> None:
    """Check a wait that a caller asked for.

    Raises:
        ValueError: It is not positive and finite.
        TypeError: It is no number.
    """
    if not isinstance(seconds, Real) or isinstance(seconds, bool):
        raise TypeError(f"{name} must be a number of seconds, got {seconds!r}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {seconds}")
