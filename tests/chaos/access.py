"""How clients of the run reach the server, and what they may raise."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from octavo_client import Client, Retry, Timeout
from octavo_client.access import Access as Files
from octavo_client.access import Endpoint

Metadata = tuple[tuple[str, str | bytes], ...]

TIMEOUT = Timeout(connect_s=2.0, call_s=60.0, step_s=60.0, append_s=120.0)
RETRY = Retry(max_attempts=1000, initial_backoff_s=0.05, max_backoff_s=0.5)
"""Patient enough to bridge a restart."""

IMPATIENT = Timeout(connect_s=2.0, call_s=20.0, step_s=20.0, append_s=60.0)

GONE = frozenset(["SESSION_NOT_FOUND", "SESSION_EXPIRED", "SESSION_LOST"])
"""Reasons that end a session; whether there was a cause is judged."""

EXPECTED = frozenset(
    [
        "OUT_OF_BLOCKS",
        "SESSION_LIMIT",
        "STREAM_LIMIT",
        "QUEUE_FULL",
        "STEP_EXPIRED",
        "DRAINING",
        "STEP_TIMEOUT",
        "CALL_TIMEOUT",
        "CONNECTION_LOST",
    ]
)
"""Reasons that faults bring about, and after which a session goes on."""


@dataclass(frozen=True, slots=True)
class Access:
    """One tenant's way to the server.

    Attributes:
        target: "host:port" of the server or of a proxy before it.
        files: What proves the client to it.
    """

    target: str
    files: Files

    def client(self, timeout: Timeout = TIMEOUT, retry: Retry = RETRY) -> Client:
        """Return a client."""
        return Endpoint(self.target, self.files).client(timeout=timeout, retry=retry)

    def channel(self) -> grpc.Channel:
        """Return a bare channel; its calls take `metadata`."""
        assert self.files.tls is not None, "the run is never without TLS"
        return grpc.secure_channel(self.target, self.files.tls.credentials())

    @property
    def metadata(self) -> Metadata:
        """What a bare call carries."""
        return (("authorization", f"Bearer {self.files.read_token()}"),)
