"""What an error of a step means for the session: whether it is tried again, and whether its token is stored. Pure."""

from __future__ import annotations

from enum import Enum, auto

from octavo_client._errors import (
    ClientClosed,
    Draining,
    InterruptedCall,
    OctavoError,
    OutOfBlocks,
    PositionMismatch,
    QueueFull,
    RefusedError,
    SessionLimit,
    StepExpired,
    StreamLimit,
)

MAX_TRIES = 50
MAX_TRIES_FOR_BLOCKS = 3
"""Then the session is given up: its own blocks may be what the others wait for."""

_LEAST_DELAY_S, _MOST_DELAY_S = 0.01, 2.0


class Fate(Enum):
    """What became of a token."""

    AGAIN = auto()  # not stored; to be sent again after a while
    UNSURE = auto()  # stored or not; to be sent again at once, and a refused position will tell
    APPLIED = auto()  # stored by an attempt before, whose answer was lost
    GIVEN_UP = auto()  # the session is of no more use


_PASSING = (QueueFull, OutOfBlocks, SessionLimit, StreamLimit, StepExpired, Draining)


def fate_of(error: OctavoError, start_pos: int, *, is_unsure: bool, num_tries: int) -> Fate:
    """Return what an entry's error means.

    Args:
        error: The error.
        start_pos: Position of the entry's token.
        is_unsure: Whether the answer to an attempt before was lost.
        num_tries: Attempts so far, this one included.
    """
    if isinstance(error, PositionMismatch) and is_unsure and error.length == start_pos + 1:
        return Fate.APPLIED
    is_last = num_tries >= (MAX_TRIES_FOR_BLOCKS if isinstance(error, OutOfBlocks) else MAX_TRIES)
    if isinstance(error, _PASSING) and not is_last:
        return Fate.AGAIN
    if isinstance(error, (InterruptedCall, ClientClosed)) and not is_last:
        return Fate.UNSURE
    return Fate.GIVEN_UP


def reason_of(error: OctavoError) -> str:
    """Return the reason that an error is counted under: the server's, or the exception's name in the same style."""
    if isinstance(error, RefusedError):
        return error.reason or error.code
    name = type(error).__name__
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()


def delay_after(error: OctavoError, num_tries: int, jitter: float) -> float:
    """Return the seconds to wait before the next attempt: the server's hint, doubled from the second one on.

    Args:
        error: What the attempt met.
        num_tries: Attempts so far.
        jitter: From 0 to 1.
    """
    hint_s = (error.retry_after_s if isinstance(error, RefusedError) else None) or _LEAST_DELAY_S
    return float(min(hint_s * 2.0 ** min(num_tries - 1, 10), _MOST_DELAY_S) * (0.5 + 0.5 * jitter))
