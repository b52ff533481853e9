"""Memory that a Decode stream shares with a client on the same machine, so that tensors need not go through gRPC.

The server makes it, as a memfd, and tells the client where to open it: /proc/<process>/fd/<number>. The reasons:

- The kernel checks who opens it: following that link takes the server's own user (or root), in the same process
  namespace, and the file's mode is 0600. A client of another host or user finds nothing, and goes on over gRPC.
- Its size is sealed, so nobody can shrink it under the server, which would kill the server with SIGBUS; and it is
  filled at once, so that a machine out of memory refuses it rather than killing whoever touches it first.
- It has no name in any folder. Whichever side dies, the kernel frees it with the last that mapped it.
- It belongs to one stream. When that ends, however it ends, it is closed and unmapped. A client that comes back gets
  another.

Had the client made a file in /dev/shm, it could shrink it, and leave it behind.

Tensors are copied out of it as their step is read: what is checked is then what is stored, whatever the client writes
meanwhile. That copy takes 23 us for a step of 64 sessions of an 8B-like model (768 KiB), where a whole step takes 1,000
and more; os.preadv, which needs no mapping, took 47. Without a copy, a value that changes between a kernel's check and
its use would be undefined behaviour there. The answer is written by one copy too, of 13 us.
A client that writes where it should not harms its own answers alone.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from octavo import v1
from octavo_server.errors import OctavoError, Reason, mismatch
from octavo_server.status import to_status

ALIGNMENT = 64
"""What every offset is a multiple of: a cache line, and more than any element."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


_LSE_BYTES = 4
_OFFSET = attrgetter("offset")

_NOTHING: NDArray[np.uint8] = np.empty(0, np.uint8)
"""The memory of a region that is closed."""


class Extent(NamedTuple):
    """A place in a region, and the field of the step that names it."""

    field: str
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.num_bytes


class Region:
    """The memory of one stream.

    Args:
        num_bytes: Its size.

    Raises:
        OSError: There is not so much memory, or no file descriptor left.
    """

    def __init__(self, num_bytes: int) -> None:
        self.name = f"octavo-{secrets.token_hex(16)}"
        self.num_bytes = num_bytes
        self._memory = _NOTHING
        self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self.fd, 0o600)
            os.posix_fallocate(self.fd, 0, num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            # Unmapped with the last array over it: when it is closed, and no copy is under way.
            self._memory = np.frombuffer(mmap.mmap(self.fd, num_bytes), np.uint8)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and unmap it; steps that are still under way write their answers nowhere."""
        os.close(self.fd)
        self._memory = _NOTHING

    def check(self, extents: Sequence[Extent]) -> None:
        """Check places in the region, each by itself and against the others.

        Raises:
            OctavoError: BAD_TENSOR.
        """
        for extent in extents:
            if extent.offset % ALIGNMENT or extent.end > self.num_bytes:
                expected = (
                    f"a multiple of {ALIGNMENT}, and with the {extent.num_bytes} bytes of the tensor "
                    f"at most the region's {self.num_bytes}"
                )
                raise _bad_offset(extent.field, expected, extent.offset)
        in_order = sorted(extents, key=_OFFSET)
        for before, after in itertools.pairwise(in_order):
            if after.offset < before.end:
                expected = f"at least {before.end}, the end of {before.field}"
                raise _bad_offset(after.field, expected, after.offset)

    def read(self, extent: Extent) -> NDArray[np.uint8]:
        """Return a copy of what is at a place.

        Raises:
            OctavoError: BAD_TENSOR.
        """
        self.check([extent])
        return self._memory[extent.offset : extent.end].copy()

    def write(self, offset: int, array: NDArray[Any]) -> None:
        """Write a contiguous array at a place that was checked."""
        flat = array.reshape(-1).view(np.uint8)
        memory = self._memory
        if memory is not _NOTHING:
            memory[offset : offset + flat.size] = flat


@dataclass(frozen=True, slots=True)
class AnswerPlace:
    """Where in a region a step's answer is to be written.

    Attributes:
        region: The stream's; None = the answer goes into the result.
        out: Offset of the output; None = it goes into the result.
        lse: Offset of the log-sum-exp; None = it goes into the result.
    """

    region: Region | None = None
    out: int | None = None
    lse: int | None = None

    def write(self, name: str, array: NDArray[Any]) -> int | None:
        """Write `out` or `lse`, contiguous, to its place and return that; None when it goes into the result."""
        offset = self.out if name == "out" else self.lse
        if self.region is None or offset is None:
            return None
        self.region.write(offset, array)
        return offset


IN_RESULT = AnswerPlace()
"""The place of an answer that goes into the result."""


def answer_place(
    step: v1.Step,
    tensors: Sequence[tuple[str, NDArray[Any]]],
    placed: Mapping[str, int | None],
    region: Region | None,
) -> AnswerPlace:
    """Return where the answer to a step goes.

    Args:
        step: The step, whose tensors were read.
        tensors: Its tensors, each with its name.
        placed: Where in the region they lie, by name; None = in the message.
        region: The stream's, if it has one.

    Raises:
        OctavoError: BAD_TENSOR: there is no room there, or it is another tensor's.
    """
    names = [name for name in ("out", "lse") if step.HasField(f"{name}_region_offset")]
    q = next((tensor for name, tensor in tensors if name == "q"), None)
    if not names or q is None:
        return IN_RESULT
    offsets = {name: getattr(step, f"{name}_region_offset") for name in names}
    if region is None:
        raise no_region(names[0], offsets[names[0]])
    num_bytes = {"out": q.nbytes, "lse": q.shape[0] * q.shape[1] * _LSE_BYTES}
    extents = [Extent(name, offset, num_bytes[name]) for name, offset in offsets.items()]
    for name, tensor in tensors:
        offset = placed[name]
        if offset is not None:
            extents.append(Extent(name, offset, tensor.nbytes))
    region.check(extents)
    return AnswerPlace(region, offsets.get("out"), offsets.get("lse"))


def no_region(field: str, offset: int) -> OctavoError:
    """Return the refusal of an offset where there is no region."""
    return _bad_offset(field, "absent where no region was asked for and given", offset)


class StreamMemory:
    """The region of one stream, from when its client asks for it until the stream ends.

    A context manager: leaving it closes the region.

    Args:
        num_bytes: Size of the region; 0 = none is given.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._is_closed = False
        self.region: Region | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
            region, self.region = self.region, None
        if region is not None:
            region.close()

    def open(self) -> v1.RegionResponse:
        """Make the region, and return where it is or why there is none."""
        with self._lock:
            cause = self._why_not()
            if not cause:
                try:
                    self.region = region = Region(self._num_bytes)
                    return _location(region)
                except OSError as error:
                    cause = f"{self._num_bytes} bytes could not be had: {error.strerror}"
        return v1.RegionResponse(error=to_status(_unavailable(cause)))

    def _why_not(self) -> str:
        if self._num_bytes == 0:
            return "shared_memory is off in the server's config"
        if self._is_closed or self.region is not None:
            return "a stream has one region, and only until it ends"
        return ""


def _location(region: Region) -> v1.RegionResponse:
    return v1.RegionResponse(
        process_id=os.getpid(), fd=region.fd, name=region.name, num_bytes=region.num_bytes
    )


def _unavailable(cause: str) -> OctavoError:
    message = f"no shared memory: {cause}; send tensors in the messages"
    return OctavoError(Reason.SHARED_MEMORY_UNAVAILABLE, message, cause=cause)


def _bad_offset(field: str, expected: str, offset: int) -> OctavoError:
    return mismatch(Reason.BAD_TENSOR, f"{field}.region_offset", expected, offset)
