"""The server's process as the kernel sees it, where it runs on this machine: memory and threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_INTERVAL_S = 1.0
_BYTES_PER_KB = 1024


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen at one moment.

    Attributes:
        at_s: Seconds since the first look.
        rss_bytes: Resident memory.
        num_threads: Threads.
    """

    at_s: float
    rss_bytes: int
    num_threads: int


@dataclass(slots=True)
class Watch:
    """Looks at a process once a second.

    Attributes:
        process_id: The process.
        clock: What time it is, in seconds.
        sights: What was seen.
    """

    process_id: int
    clock: Callable[[], float] = time.monotonic
    sights: list[Sight] = field(default_factory=list)
    _began_s: float = 0.0
    _next_s: float = 0.0

    def look(self) -> None:
        """Look, if it is time.

        Raises:
            OSError: There is no such process.
        """
        now = self.clock()
        if now < self._next_s:
            return
        if not self.sights:
            self._began_s = now
        self._next_s = now + _INTERVAL_S
        rss_bytes, num_threads = read_status(self.process_id)
        self.sights.append(Sight(now - self._began_s, rss_bytes, num_threads))

    def line(self) -> str:
        """Say how memory and threads went."""
        first, last = self.sights[0], self.sights[-1]
        peak = max(sight.rss_bytes for sight in self.sights)
        mb = [bytes_ / 1e6 for bytes_ in (first.rss_bytes, last.rss_bytes, peak)]
        return (
            f"the server's process: {mb[0]:,.0f} MB at first, {mb[1]:,.0f} MB at last, {mb[2]:,.0f} MB at most; "
            f"{first.num_threads} threads at first, {last.num_threads} at last"
        )


def read_status(process_id: int) -> tuple[int, int]:
    """Return the resident bytes and the threads of a process.

    Raises:
        OSError: There is no such process.
    """
    lines = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["VmRSS"].split()[0]) * _BYTES_PER_KB, int(values["Threads"])
