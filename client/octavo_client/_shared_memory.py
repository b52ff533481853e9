"""Memory shared with a server on the same machine, in which a step's tensors stay while gRPC carries the rest.

The server makes the memory and says where it is; see RegionResponse in octavo.proto. Every stream asks for a region of
its own, so until the answer comes, where there is none (another machine, another user, switched off) and where it is
full, tensors go in the messages as ever. A step that is sent again reads its tensors from the region that they lie in,
which this process keeps mapped.

A step's room holds its tensors and its answer, and an answer is the caller's as long as it is kept: the room is free
again when the last array over it is gone, and the server has answered or its stream has ended.
"""

from __future__ import annotations

import bisect
import fcntl
import logging
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.v1 import octavo_pb2 as pb
from octavo.v1.tensor_fields import TensorField
from octavo_client import _tensors
from octavo_client._encoding import Parts, encode_region_tensors, encode_tensors
from octavo_client._status import error_from_status
from octavo_client._tensors import HostArray

log = logging.getLogger("octavo_client")

MIN_BYTES = 128 * 1024
"""Steps with fewer bytes in and out go in messages, which then take no longer."""

_ALIGNMENT = 64


class Room(NamedTuple):
    """A free range of a region."""

    start: int
    end: int


class Region:
    """The memory of one stream, and which of it is free. Safe to use from several threads.

    Args:
        memory: The memory.
        num_bytes: Its size.
    """

    def __init__(self, memory: mmap.mmap | bytearray, num_bytes: int) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._free = [Room(0, num_bytes)]
        # Filled by the garbage collector, which may come at any time: also to a thread that holds the lock.
        self._returned: deque[Room] = deque()

    def take(self, num_bytes: int) -> tuple[int, NDArray[np.uint8]] | None:
        """Take the lowest free room; None when there is none so large.

        Returns:
            Its offset, and the array over it. The room is free again once no array over it is left.
        """
        size = align(num_bytes)
        with self._lock:
            while self._returned:
                self._put_back(self._returned.popleft())
            room = next((room for room in self._free if room.end - room.start >= size), None)
            if room is None:
                return None
            idx = self._free.index(room)
            taken, rest = Room(room.start, room.start + size), Room(room.start + size, room.end)
            self._free[idx : idx + 1] = [rest] if rest.end > rest.start else []
        array = np.frombuffer(self._memory, np.uint8, num_bytes, taken.start)
        weakref.finalize(array, self._returned.append, taken).atexit = False
        return taken.start, array

    def _put_back(self, room: Room) -> None:
        idx = bisect.bisect(self._free, room)
        if idx < len(self._free) and self._free[idx].start == room.end:
            room = Room(room.start, self._free.pop(idx).end)
        if idx and self._free[idx - 1].end == room.start:
            idx -= 1
            room = Room(self._free.pop(idx).start, room.end)
        self._free.insert(idx, room)


@dataclass(frozen=True, slots=True, eq=False)
class PlacedTensors:
    """A step's tensors in a region, with room for its answer.

    Attributes:
        memory: The client's, whose region may be another by now.
        region: Where they lie.
        room: [num_bytes] uint8, all of the step's room.
        start: Offset of the room.
        arrays: The tensors by field number.
        offsets: Their offsets in the region, by field number.
        out: Offset in the region of the room for the output.
        lse: Offset of the room for the log-sum-exp; None = none.
    """

    memory: SharedMemory
    region: Region
    room: NDArray[np.uint8]
    start: int
    arrays: Mapping[int, HostArray]
    offsets: Mapping[int, int]
    out: int
    lse: int | None

    def encode(self, header: pb.Step) -> Parts:
        """Return the tensors as encoded fields of a message, in parts, and say in its header where the answer goes."""
        if not self.memory.is_shared(self.region):
            header.ClearField("out_region_offset")
            header.ClearField("lse_region_offset")
            return encode_tensors(self.arrays)
        header.out_region_offset = self.out
        if self.lse is not None:
            header.lse_region_offset = self.lse
        self.memory.note_sent(header.step_id, self)
        return encode_region_tensors(self.arrays, self.offsets)

    def read(self, tensor: TensorField | None) -> HostArray:
        """Return a tensor of the answer as a read-only array, over the room when it is there.

        Raises:
            ValueError: It makes no sense.
        """
        if tensor is None or tensor.region_offset is None:
            return _tensors.from_wire(tensor)
        dtype = _tensors.host_dtype(tensor)
        start = tensor.region_offset - self.start
        end = start + prod(tensor.shape) * dtype.itemsize
        if tensor.region_offset not in (self.out, self.lse) or end > len(self.room):
            raise ValueError(
                f"the server wrote to {tensor.region_offset}, which is not this step's"
            )
        array: HostArray = self.room[start:end].view(dtype).reshape(tensor.shape)
        array.flags.writeable = False
        return array


class SharedMemory:
    """What a client shares with its server: the region of its open stream, while it has one.

    `place` may be called from any thread, all else by one caller at a time.
    """

    def __init__(self) -> None:
        self._region: Region | None = None
        # What the server may yet write to, by step_id: also after its caller gave up.
        self._in_flight: dict[int, PlacedTensors] = {}

    def request(self) -> bytes:
        """Return the message that asks for a region, the first of a new stream."""
        self.forget()
        return pb.DecodeRequest(region=pb.RegionRequest()).SerializeToString()

    def on_answer(self, answer: pb.RegionResponse) -> None:
        """Open the region that the server made; where that cannot be, say so in the log and go on without."""
        if answer.HasField("error"):
            log.warning("steps go over gRPC: %s", error_from_status(answer.error))
            return
        try:
            self._region = Region(_open(answer), answer.num_bytes)
        except (OSError, ValueError) as error:
            log.warning(
                "steps go over gRPC: the memory of server process %d could not be opened (%s); "
                "client and server must run on one machine, in one process namespace, as one user",
                answer.process_id,
                error,
            )

    def on_result(self, step_id: int) -> None:
        """Note that the server is done with a step."""
        self._in_flight.pop(step_id, None)

    def forget(self) -> None:
        """Note that the stream, and with it the region, is gone."""
        self._region = None
        self._in_flight.clear()

    def is_shared(self, region: Region) -> bool:
        """Whether a region is that of the open stream."""
        return region is self._region

    def note_sent(self, step_id: int, placed: PlacedTensors) -> None:
        """Keep a step's room until the server is done with it."""
        self._in_flight[step_id] = placed

    def place(
        self, arrays: Mapping[int, HostArray], out_bytes: int, lse_bytes: int
    ) -> PlacedTensors | None:
        """Copy a step's tensors into the region; None when they are to go in messages.

        Args:
            arrays: The tensors, of any strides, by field number.
            out_bytes: Room for the output.
            lse_bytes: Room for the log-sum-exp; 0 = none.
        """
        region = self._region
        sizes = [array.nbytes for array in arrays.values()]
        if region is None or sum(sizes) + out_bytes < MIN_BYTES:
            return None
        taken = region.take(sum(map(align, sizes)) + align(out_bytes) + lse_bytes)
        if taken is None:
            return None
        start, room = taken
        placed: dict[int, HostArray] = {}
        offsets: dict[int, int] = {}
        end = 0
        for number, array in arrays.items():
            offsets[number] = start + end
            placed[number] = _copy(array, room[end : end + array.nbytes])
            end += align(array.nbytes)
        out = start + end
        lse = out + align(out_bytes) if lse_bytes else None
        return PlacedTensors(self, region, room, start, placed, offsets, out, lse)


def align(num_bytes: int) -> int:
    """Return a size rounded up, so that what follows it may begin there."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _copy(array: HostArray, room: NDArray[np.uint8]) -> HostArray:
    """Copy an array to its room, as plain numbers of its size: numpy copies those without the GIL."""
    placed: HostArray = room.view(array.dtype).reshape(array.shape)
    bits = np.dtype(f"u{array.itemsize}")
    np.copyto(placed.view(bits), array.view(bits))
    return placed


def _check_name(path: str, name: str) -> None:
    if not os.readlink(path).startswith(f"/memfd:{name} "):
        raise ValueError(f"{path} is another file")


def _open(answer: pb.RegionResponse) -> mmap.mmap:
    """Map the memory that a server made.

    Raises:
        OSError, ValueError: It is not there, not ours to open, or not what it must be.
    """
    path = f"/proc/{answer.process_id}/fd/{answer.fd}"
    # Before it is opened, which in another process than the server's might be anything; and after, as the stream may
    # have ended in between, and another one's memory be there.
    _check_name(path, answer.name)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _check_name(f"/proc/self/fd/{fd}", answer.name)
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError(f"{path} may shrink")
        if os.fstat(fd).st_size != answer.num_bytes:
            raise ValueError(f"{path} is not of {answer.num_bytes} bytes")
        return mmap.mmap(fd, answer.num_bytes)
    finally:
        os.close(fd)
