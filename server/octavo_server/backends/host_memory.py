"""How much of the host's memory a pool may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


class _MemoryFiles(NamedTuple):
    """Where a version of cgroups says what its memory is.

    Attributes:
        limit: File with the bytes that the group may use.
        usage: File with those that it does.
        reclaimable: Field of memory.stat with the clean page cache of the group and those below it.
    """

    limit: str
    usage: str
    reclaimable: str


_VERSION_1 = _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _MemoryFiles("memory.max", "memory.current", "inactive_file")


def free_host_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the bytes that the kernel calls available, or what a cgroup leaves if that is less.

    Args:
        proc: Of proc(5).
        cgroups: Of cgroups(7), version 2 or with version 1's `memory` below it. Where this process
            is in no group with a limit, proc alone counts.
    """
    available = _field(proc / "meminfo", "MemAvailable:") * 1024
    return max(0, min([available, *_group_rooms(proc / "self" / "cgroup", cgroups)]))


def _group_rooms(membership: Path, cgroups: Path) -> Iterator[int]:
    """Yield what every group that this process is in leaves of its limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _rooms(cgroups, path, _VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _rooms(cgroups / "memory", path, _VERSION_1)


def _rooms(root: Path, path: str, files: _MemoryFiles) -> Iterator[int]:
    """Yield the room in the group `path` and in those above it.

    In a container the path may be the host's, which is not there: the container's own is the root.
    """
    group = root / path.strip("/")
    for level in (group, *group.parents):
        if not level.is_relative_to(root):
            return
        try:
            limit = int((level / files.limit).read_text())
            used = int((level / files.usage).read_text())
            # Clean page cache counts as used and gives way when a pool needs it.
            reclaimable = _field(level / "memory.stat", files.reclaimable)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        yield limit - used + reclaimable


def _field(path: Path, key: str) -> int:
    """Return the number beside `key` in a file of `key number` lines, 0 without it."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == key), 0)
