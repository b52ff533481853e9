"""A name server for a few names, over UDP; as much of DNS (RFC 1035) as HAProxy and the C library ask for."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

_TYPE_A = 1
_HEADER = struct.Struct(">HHHHHH")
_ANSWER, _NO_SUCH_NAME = 0x8580, 0x8583
_TTL_S = 1


class NameServer:
    """What is known of names, and a thread that tells it.

    Attributes:
        addresses: IPv4 address by name; a name that is not here does not exist.
    """

    def __init__(self, host: str) -> None:
        self.addresses: dict[str, str] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 53))
        self._thread = Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        """Answer a query of one question; records behind it are not looked at."""
        query_id = _HEADER.unpack_from(query)[0]
        name, end = _name_at(query, _HEADER.size)
        question = query[_HEADER.size : end + 4]
        address = self.addresses.get(name)
        (record_type,) = struct.unpack_from(">H", query, end)
        records = b""
        if address and record_type == _TYPE_A:
            records = struct.pack(">HHHIH", 0xC00C, _TYPE_A, 1, _TTL_S, 4) + socket.inet_aton(
                address
            )
        flags = _ANSWER if address else _NO_SUCH_NAME
        return _HEADER.pack(query_id, flags, 1, bool(records), 0, 0) + question + records


def _name_at(query: bytes, start: int) -> tuple[str, int]:
    """Return the name at a place, without its last dot, and where it ends."""
    labels = []
    while num_bytes := query[start]:
        labels.append(query[start + 1 : start + 1 + num_bytes].decode().lower())
        start += 1 + num_bytes
    return ".".join(labels), start + 1


@contextmanager
def serving_names(host: str) -> Iterator[NameServer]:
    """Run a name server on port 53 of an address, which only root may."""
    server = NameServer(host)
    try:
        yield server
    finally:
        server.close()
