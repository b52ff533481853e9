"""What goes over the wire: bytes of messages each way, and refusals by reason."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from octavo_server.errors import OctavoError


class StreamTraffic:
    """Bytes of one stream's messages; each way is counted by one thread at a time."""

    __slots__ = ("received_bytes", "sent_bytes")

    def __init__(self) -> None:
        self.received_bytes = 0
        self.sent_bytes = 0

    def receiving(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on what the client sends."""
        for message in messages:
            self.received_bytes += len(message)
            yield message


class Traffic:
    """Totals since the start; thread-safe. A stream's messages take no lock: its counts are added up when asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refusals: Counter[str] = Counter()
        self._ended = StreamTraffic()
        self._streams: set[StreamTraffic] = set()

    def count_refusal(self, error: OctavoError) -> None:
        """Count a refused call, step or entry."""
        with self._lock:
            self._refusals[error.reason] += 1

    def count_call(self, received_bytes: int, sent_bytes: int) -> None:
        """Count the messages of a unary call."""
        with self._lock:
            self._add(received_bytes, sent_bytes)

    @contextmanager
    def stream(self) -> Iterator[StreamTraffic]:
        """Count what a stream passes on while it is open."""
        stream = StreamTraffic()
        with self._lock:
            self._streams.add(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)
                self._add(stream.received_bytes, stream.sent_bytes)

    @property
    def refusals(self) -> Mapping[str, int]:
        """Refusals by reason; reasons that never came up are left out."""
        with self._lock:
            return {str(reason): count for reason, count in sorted(self._refusals.items())}

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes received and sent."""
        with self._lock:
            counted = [self._ended, *self._streams]
            return sum(x.received_bytes for x in counted), sum(x.sent_bytes for x in counted)

    def _add(self, received_bytes: int, sent_bytes: int) -> None:
        self._ended.received_bytes += received_bytes
        self._ended.sent_bytes += sent_bytes
