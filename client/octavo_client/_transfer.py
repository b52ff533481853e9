"""A session's file on its way from a server and to one: where its bytes go or come from, and beginning again.

The drivers, sync and asyncio, only call the server. Files are read and written 1 MiB at a time, whatever the session's
size.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from octavo.v1 import octavo_pb2 as pb
from octavo_client._errors import OctavoError
from octavo_client._retry import is_passing

Place = str | os.PathLike[str] | BinaryIO
"""A path, or an open file of bytes."""

TransferProgress = Callable[[int, int], object]
"""Called now and then with the bytes that have gone over and the bytes of the whole file."""

_CHUNK_BYTES = 1 << 20
_OPTIONS_BYTES = 1024
"""Room for what else is in a message."""

_LENGTH_BYTES = 8


class Sink:
    """Where an export goes: a path, at which the file appears once it is whole, or an open file.

    Args:
        place: The path or the file.
        progress: Told of every message.
    """

    def __init__(self, place: Place, progress: TransferProgress | None) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        if isinstance(place, str | os.PathLike):
            self._path = Path(place)
        else:
            self._file = place
        self._start = _position(self._file)
        self._progress = progress
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leave nothing at a path where it did not come to its end."""
        if self._path is not None:
            self._close()
            self._partial.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._file is None:
            self._file = self._partial.open("wb")
        self._file.write(data)
        self._num_bytes += len(data)
        if self._progress is not None:
            self._progress(self._num_bytes, self._total_bytes(data))

    def finish(self) -> int:
        """Make the file appear; returns its bytes."""
        if self._path is not None:
            self._close()
            self._partial.replace(self._path)
        return self._num_bytes

    def restart(self, error: OctavoError) -> OctavoError:
        """Forget what was written, to begin again because of `error`, which is returned.

        Raises:
            OctavoError: `error`, when beginning again would not help, or the file cannot be set back.
        """
        if not is_passing(error) or (self._path is None and self._start is None):
            raise error
        if self._path is None:
            assert self._file is not None
            assert self._start is not None
            self._file.seek(self._start)
            self._file.truncate()
        else:
            self._close()
        self._begin()
        return error

    @property
    def _partial(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.partial")

    def _begin(self) -> None:
        self._num_bytes = 0
        self._head = b""
        self._total = 0

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _total_bytes(self, data: bytes) -> int:
        if not self._total:
            self._head += data
            self._total = _file_bytes(self._head)
            if self._total:
                self._head = b""
        return self._total or self._num_bytes


class Origin:
    """Where an import comes from: a path, or an open file from where it stands.

    Args:
        place: The path or the file.
        request: The call's options; the first message.
        progress: Told of every message.
        max_message_bytes: Largest message that the server receives.
    """

    def __init__(
        self,
        place: Place,
        request: pb.ImportSessionRequest,
        progress: TransferProgress | None,
        max_message_bytes: int,
    ) -> None:
        self._is_own = isinstance(place, str | os.PathLike)
        self._file = _opened(place)
        self._start = _position(self._file)
        self._request = request
        self._progress = progress
        self._chunk_bytes = min(_CHUNK_BYTES, max_message_bytes - _OPTIONS_BYTES)
        self._failure: Exception | None = None
        # What gRPC still reads for a call that is over must not move the file under the next one.
        self._lock = threading.Lock()
        self._num_calls = 0

    def messages(self) -> Iterator[bytes]:
        """Return the messages of one call; those of an earlier call end."""
        with self._lock:
            self._num_calls += 1
            return self._messages(self._num_calls)

    def restart(self, error: OctavoError) -> OctavoError:
        """Return `error`, when it is worth to begin again because of it.

        Raises:
            OctavoError: `error`, when beginning again would not help, or the file cannot be set back.
            Exception: What reading the file raised: gRPC only says that the call broke.
        """
        if self._failure is not None:
            raise self._failure
        if not is_passing(error) or self._start is None:
            raise error
        return error

    def close(self) -> None:
        """Read no more, and close the file, if it was opened here."""
        with self._lock:
            self._num_calls += 1
            if self._is_own:
                self._file.close()

    def _messages(self, call_idx: int) -> Iterator[bytes]:
        try:
            yield from self._encoded(call_idx)
        except Exception as error:
            self._failure = error
            raise

    def _encoded(self, call_idx: int) -> Iterator[bytes]:
        request, num_bytes, total = self._request, 0, self._begin(call_idx)
        while data := self._read(call_idx):
            yield _with_data(request, data)
            request = pb.ImportSessionRequest()
            num_bytes += len(data)
            if self._progress is not None:
                self._progress(num_bytes, max(total, num_bytes))
        if not num_bytes:
            yield _with_data(request, b"")

    def _begin(self, call_idx: int) -> int:
        """Go to the start of the file; return its bytes, 0 where they cannot be told."""
        with self._lock:
            if self._start is None or call_idx != self._num_calls:
                return 0
            end = self._file.seek(0, os.SEEK_END)
            self._file.seek(self._start)
            return end - self._start

    def _read(self, call_idx: int) -> bytes:
        with self._lock:
            return self._file.read(self._chunk_bytes) if call_idx == self._num_calls else b""


def _with_data(request: pb.ImportSessionRequest, data: bytes) -> bytes:
    request.data = data
    return request.SerializeToString()


def _opened(place: Place) -> BinaryIO:
    return Path(place).open("rb") if isinstance(place, str | os.PathLike) else place


def _position(file: BinaryIO | None) -> int | None:
    """Return where a file stands, None when it cannot be set back."""
    return file.tell() if file is not None and file.seekable() else None


def _file_bytes(head: bytes) -> int:
    """Return the size that a file's header gives it; 0 when the header is not all there, or is none."""
    header_end = _LENGTH_BYTES + int.from_bytes(head[:_LENGTH_BYTES], "little")
    if len(head) < max(header_end, _LENGTH_BYTES):
        return 0
    try:
        end = json.loads(head[_LENGTH_BYTES:header_end])["checksum"]["data_offsets"][1]
    except (ValueError, LookupError, TypeError):
        return 0
    return header_end + int(end)
