"""How much of the host's memory a pool may take."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return the bytes that the kernel calls available, or what the cgroup leaves if that is less.

    Args:
        meminfo: Of proc(5).
        cgroup: This process's cgroup, version 2. Without a limit there, meminfo alone counts.
    """
    available = _field(meminfo, "MemAvailable:") * 1024
    try:
        limit = int((cgroup / "memory.max").read_text())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return available
    # Clean page cache counts as used and gives way when a pool needs it.
    used = int((cgroup / "memory.current").read_text())
    reclaimable = _field(cgroup / "memory.stat", "inactive_file")
    return max(0, min(available, limit - used + reclaimable))


def _field(path: Path, key: str) -> int:
    """Return the number beside `key` in a file of `key number` lines."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == key)
