"""The disk under the snapshot folder, which can be full: a small tmpfs where one may be mounted, else a file limit."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

_LIMIT_BYTES = 64 << 10
_CHUNK_BYTES = 4 << 20


class SnapshotDisk:
    """A folder that runs out of room when told to.

    Args:
        folder: Where it is; made, and emptied.
        size_bytes: Of the disk, where one can be mounted.

    Attributes:
        folder: For the server.
        is_mounted: Whether it is a disk of its own.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "octavo-chaos", str(folder)]
        done = (
            subprocess.run(mount, check=False, capture_output=True) if os.geteuid() == 0 else None
        )
        self.is_mounted = done is not None and done.returncode == 0
        self.folder = folder / "snapshots"
        self._ballast = folder / "ballast"
        self.folder.mkdir()

    def fill(self, server_pid: int, room_bytes: int) -> None:
        """Leave room for this much, on the disk or, where it is not ours, in each file of the server's process."""
        if not self.is_mounted:
            # The signal that comes with it is ignored by Python: writes fail with EFBIG.
            resource.prlimit(server_pid, resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES))
            return
        with self._ballast.open("wb", buffering=0) as ballast:
            while (free := shutil.disk_usage(self._ballast.parent).free) > room_bytes:
                ballast.write(bytes(min(_CHUNK_BYTES, free - room_bytes)))

    def clear(self) -> None:
        """Give the room back; the limit of a process ends with it."""
        self._ballast.unlink(missing_ok=True)

    @property
    def has_snapshot(self) -> bool:
        """Whether there is a snapshot that no server has consumed."""
        return (self.folder / "sessions").is_dir()

    def forget(self) -> None:
        """Remove the snapshots that are there, which no server would read in time."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def close(self) -> None:
        """Remove all of it."""
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder.parent)], check=False)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
