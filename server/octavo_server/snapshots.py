"""Sessions over a restart: written to a folder once the server has drained, and read back before it serves again.

    lock                    held by the process that the folder is of
    sessions/ID.safetensors a snapshot, one file a session, each whole: it is written under another name first
    refused/                files that could not be restored, for people to look at; nothing reads them
    consumed-INCARNATION/   a snapshot that was restored, until it is deleted

An old state must never return, so a snapshot is consumed: `sessions` is renamed away, durably, before the server that
restored it answers anything. A process that ends before that has answered nothing, and the next one reads the same
snapshot; one that ends after it leaves what nobody reads. A process that ends while it writes has left its streams
before, so what is there of its snapshot is not old.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from octavo_server.backends.base import UnsupportedError
from octavo_server.errors import OctavoError, Reason
from octavo_server.session_file import SessionReader, write_session
from octavo_server.session_header import InvalidSessionFileError
from octavo_server.session_transfer import Export, Import, Transfers, abandoning
from octavo_server.tenant import Tenant

log = logging.getLogger(__name__)

NUM_WRITERS = 4
"""Sessions that are written at once: while one is read, others are hashed and written."""

PROGRESS_S = 5.0
"""Seconds between logs of how far it is."""

_SUFFIX = ".safetensors"
_PARTIAL = ".partial"
_SESSION_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{32}")


class RestoreStoppedError(Exception):
    """The server was told to stop while it restored sessions; the text is how far it was."""


class Snapshots:
    """The snapshot folder of one server.

    Args:
        folder: Made if it is not there.
        incarnation: Name of this server process.
        transfers: The engine's.
        tenant_of: Returns the tenant of a name.
    """

    def __init__(
        self,
        folder: Path,
        incarnation: str,
        transfers: Transfers,
        tenant_of: Callable[[str], Tenant],
    ) -> None:
        self._folder = folder
        self._sessions = folder / "sessions"
        self._refused = folder / "refused"
        self._consumed = folder / f"consumed-{incarnation}"
        self._strange = self._refused / f"sessions-{incarnation}"
        self._transfers = transfers
        self._tenant_of = tenant_of
        self._progress = _Progress()

    def lock(self) -> None:
        """Take the folder for the life of this process.

        Raises:
            UnsupportedError: It is another process's, or cannot be written to.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnsupportedError(
                f"snapshot_dir {self._folder} is another running server's; give each server a folder of its own"
            ) from None
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._lock_fd)

    def restore(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Open the sessions of the snapshot that is there, and consume it; before the server answers anything.

        Args:
            is_stopping: Asked before each file whether the server is to stop instead.

        Raises:
            RestoreStoppedError: It is; the snapshot is as it was.
            UnsupportedError: The folder cannot be read or changed, or the device failed; the snapshot is as it was.
        """
        try:
            self._delete_leftovers()
            if self._sessions.exists():
                self._restore(is_stopping)
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def delete_consumed(self) -> None:
        """Delete the snapshot that was restored."""
        shutil.rmtree(self._consumed, ignore_errors=True)

    def write(self) -> int:
        """Write every session; what fails is logged, and the rest is written all the same.

        Returns:
            The sessions that could not be written.
        """
        exports = self._transfers.export_all()
        if not exports:
            return 0
        log.info("writing %d sessions to %s", len(exports), self._sessions)
        self._progress.begin(len(exports))
        try:
            self._make_folder()
            with ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="octavo-snapshot") as threads:
                num_failed = sum(not is_written for is_written in threads.map(self._try, exports))
            _sync_folder(self._sessions)
        except OSError as error:
            log.error("no session is written: %s", error)
            return len(exports)
        log.info("wrote %d sessions; %d failed", len(exports) - num_failed, num_failed)
        return num_failed

    def _restore(self, is_stopping: Callable[[], bool]) -> None:
        files = [
            path for path in self._sessions.iterdir() if path.suffix == _SUFFIX and path.is_file()
        ]
        files.sort(key=lambda path: path.stat().st_mtime_ns)
        self._progress.begin(len(files))
        restored: list[Import] = []
        refused: list[Path] = []
        for num_read, path in enumerate(files):
            if is_stopping():
                raise RestoreStoppedError(f"{num_read} of {len(files)} sessions were read")
            try:
                restored.append(self._read(path))
            except (InvalidSessionFileError, OctavoError, OSError) as error:
                _check_device(error)
                log.error("%s is refused, its session is lost: %s", path, error)
                refused.append(path)
            self._progress.advance()
        if refused:
            self._set_aside(refused)
        self._sessions.rename(self._consumed)
        _sync_folder(self._folder)
        for started in restored:
            started.finish()
        log.info("restored %d sessions; refused %d", len(restored), len(refused))

    def _read(self, path: Path) -> Import:
        with path.open("rb", buffering=0) as file:
            reader = SessionReader(file)
            saved = reader.header()
            session_id = "" if saved.identity is None else saved.identity.session_id
            if not _SESSION_ID.fullmatch(session_id) or session_id != path.stem:
                raise InvalidSessionFileError(f"it is of session {session_id!r}, by its header")
            assert saved.identity is not None
            started = self._transfers.restore(saved, self._tenant_of(saved.identity.tenant))
            with abandoning(started):
                started.receive(reader, saved, Future.result)
        return started

    def _set_aside(self, paths: list[Path]) -> None:
        self._refused.mkdir(mode=0o700, exist_ok=True)
        for path in paths:
            path.replace(self._refused / path.name)
        _sync_folder(self._refused)

    def _delete_leftovers(self) -> None:
        for path in self._folder.glob("consumed-*"):
            shutil.rmtree(path)
        for path in self._sessions.glob(f"*{_PARTIAL}"):
            log.error("session %s is lost: its process ended while it was written", path.stem)
            path.unlink()

    def _make_folder(self) -> None:
        if self._sessions.exists():
            log.error("%s is set aside: it was put there while this server ran", self._sessions)
            self._refused.mkdir(mode=0o700, exist_ok=True)
            self._sessions.rename(self._strange)
        self._sessions.mkdir(mode=0o700)
        _sync_folder(self._folder)

    def _try(self, export: Export) -> bool:
        try:
            self._write(export)
        except (OctavoError, OSError) as error:
            log.error("session %s is lost, it cannot be written: %s", export.session_id, error)
            return False
        self._progress.advance()
        return True

    def _write(self, export: Export) -> None:
        path = self._sessions / f"{export.session_id}{_SUFFIX}"
        partial = path.with_suffix(_PARTIAL)
        try:
            with open(partial, "xb", opener=_open_private) as file:
                for part in write_session(export.saved, export.values(Future.result)):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class _Progress:
    """Logs how many of some files are done, now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def begin(self, num_files: int) -> None:
        """Begin with none."""
        self._num_files, self._num_done = num_files, 0
        self._logged_at = time.monotonic()

    def advance(self) -> None:
        """Note that one more is done."""
        now = time.monotonic()
        with self._lock:
            self._num_done += 1
            if now - self._logged_at >= PROGRESS_S:
                self._logged_at = now
                log.info("%d of %d sessions", self._num_done, self._num_files)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _check_device(error: Exception) -> None:
    if isinstance(error, OctavoError) and error.reason is Reason.DEVICE_FAILURE:
        raise UnsupportedError(
            "the device failed while sessions were restored; they are still where they were"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make what was made, renamed or deleted in a folder last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unusable(folder: Path, error: OSError) -> UnsupportedError:
    return UnsupportedError(
        f"snapshot_dir {folder} cannot be used: {error}; choose another folder, or free it"
    )
