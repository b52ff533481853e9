"""The Unix socket that a server listens on beside, or instead of, its port.

The file's mode is 0600 from the moment it is there, so that only the server's own user can connect. gRPC would
replace any socket of that name, also one that another server listens on; here the path is looked at first. Two servers
that start on one path in the same instant are not told apart.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc

from octavo_server.backends.base import UnsupportedError

MAX_PATH_BYTES = 107
"""What the kernel's address of a Unix socket holds."""

_NOT_FOR_OTHERS = 0o177


class UnixSocket:
    """A socket file; gRPC removes it when its server stops.

    Args:
        path: Where; a relative path starts from the working folder.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).absolute()

    @property
    def target(self) -> str:
        """The address as gRPC's clients write it."""
        return f"unix:{self._path}"

    def listen(self, server: grpc.Server) -> None:
        """Listen, in the place of a socket that nobody listens on any more.

        Raises:
            UnsupportedError: The path is too long, taken, or cannot be made.
        """
        self._check_length()
        self._make_way()
        try:
            with _umask(_NOT_FOR_OTHERS):
                server.add_insecure_port(self.target)
        except RuntimeError:
            raise self._refusal("its folder must be there, and be writable") from None

    def _check_length(self) -> None:
        num_bytes = len(os.fsencode(self._path))
        if num_bytes > MAX_PATH_BYTES:
            raise self._refusal(
                f"a path may have {MAX_PATH_BYTES} bytes, this has {num_bytes}; choose a shorter one"
            )

    def _make_way(self) -> None:
        try:
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise self._refusal("a file of another kind is there; choose another path")
            if self._is_served():
                raise self._refusal("another server listens there; stop it or choose another path")
            self._path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._refusal(f"{error.strerror}; choose another path") from None

    def _is_served(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self._path))
            except ConnectionRefusedError:
                return False
            except BlockingIOError:  # its backlog is full
                return True
        return True

    def _refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"cannot listen on {self.target}: {why}")


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Set the process's umask for a while; meant for before there are threads that make files."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
