"""How long clients wait from a fault to their next right answer. Pure but for its lock."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

Answer = tuple[int, int]
"""When a step was sent and when it was answered, in nanoseconds of the machine's monotonic clock."""


@dataclass(slots=True)
class Blow:
    """A fault that clients have to recover from.

    Attributes:
        kind: Of the fault.
        began_ns: When it hit.
        counts_from_ns: Answers to steps sent from then on count: what was on its way before proves nothing.
        waiting: Clients that had no answer yet.
    """

    kind: str
    began_ns: int
    counts_from_ns: int
    waiting: set[int] = field(default_factory=set)


class Recoveries:
    """Matches blows with answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Blow] = []
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, blow: Blow) -> None:
        """Wait for the clients of a blow."""
        with self._lock:
            self._open.append(blow)

    def note(self, kind: str, seconds: float) -> None:
        """Take a recovery that a fault measured by itself."""
        with self._lock:
            self._seconds[kind].append(seconds)

    def answered(self, client_idx: int, answers: Sequence[Answer]) -> None:
        """Take the answers of a client, in the order in which they came."""
        with self._lock:
            for blow in [blow for blow in self._open if client_idx in blow.waiting]:
                arrived = [at for sent, at in answers if sent >= blow.counts_from_ns]
                if arrived:
                    self._seconds[blow.kind].append((min(arrived) - blow.began_ns) / 1e9)
                    blow.waiting.discard(client_idx)
            self._open = [blow for blow in self._open if blow.waiting]

    def is_waited_for(self, client_idx: int) -> bool:
        """Whether a client has not recovered from something."""
        with self._lock:
            return any(client_idx in blow.waiting for blow in self._open)

    def give_up(self, blow: Blow) -> Collection[int]:
        """Wait no longer for a blow; return the clients that never recovered."""
        with self._lock:
            self._open = [other for other in self._open if other is not blow]
            return sorted(blow.waiting)

    def seconds(self) -> dict[str, list[float]]:
        """Return all recoveries by kind."""
        with self._lock:
            return {kind: list(seconds) for kind, seconds in self._seconds.items()}
