"""Faults that the load test injects into its own doing, to see that the server survives them.

- kill: a process of the load test is killed and replaced; the server sees its streams break.
- cancel: a stream is abandoned with a step in flight, an upload in the middle; the lane goes on over another stream.
- deadline: a step has next to no time, and passes its deadline in the queue, in the launch, or on its way back.
- slow: a client sends steps and does not read the answers for a while.
- rival: a second client appends other tokens at a position that is taken; POSITION_MISMATCH is the only right answer.

After all of them a session goes on from where the server says that it is, and its answers are checked as any others.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from numpy.typing import NDArray

from octavo.v1 import octavo_pb2 as pb
from octavo_client import Entry, Session, Timeout
from octavo_client._channel import DECODE_RPC, channel_options, open_channel
from octavo_client._config import Retry
from octavo_client._credentials import CallMetadata
from octavo_client._encoding import Result, encode_decode, encode_tensors
from octavo_client._errors import OctavoError, PositionMismatch
from octavo_client._status import error_from_rpc, error_from_status
from octavo_client._tensors import from_wire
from octavo_client._wire import random_key
from octavo_client.access import Endpoint
from octavo_client.load.content import Tensors

KINDS = ("kill", "cancel", "deadline", "slow", "rival")
STEP_KINDS = ("cancel", "deadline", "rival")

EXPECTED = {
    "cancel": {"CLIENT_CLOSED"},
    "deadline": {"STEP_EXPIRED", "STEP_TIMEOUT"},
}
"""Reasons of errors that a kind brings about by itself."""

_SHORT_S = (0.0002, 0.05)
"""From less than a step takes to more, so that its deadline passes anywhere on its way."""

NUM_SLOW_STEPS = 48
"""Tokens that a slow reader appends to a session."""

_CALL_TIMEOUT_S = 30.0


class Chaos:
    """Draws what happens to whom.

    Args:
        kinds: Of KINDS.
        rate: Share of the steps that meet one.
        seed: Of the draws.
    """

    def __init__(self, kinds: frozenset[str], rate: float, seed: int) -> None:
        self._step_kinds = [kind for kind in STEP_KINDS if kind in kinds]
        self._kinds = kinds
        self._rate = rate
        self._rng = random.Random(seed)

    def pick(self) -> str | None:
        """Return what the next step meets."""
        if not self._step_kinds or self._rng.random() >= self._rate:
            return None
        return self._rng.choice(self._step_kinds)

    def breaks_upload(self) -> bool:
        """Whether an upload is to be abandoned before the next one."""
        return "cancel" in self._kinds and self._rng.random() < 10 * self._rate

    def has(self, kind: str) -> bool:
        """Whether a kind is switched on."""
        return kind in self._kinds

    def short_s(self) -> float:
        """Return a time as long as a step may take; a tenth of it is as likely."""
        low, high = _SHORT_S
        return float(low * (high / low) ** self._rng.random())


def abandon_upload(endpoint: Endpoint, session_id: str, k: NDArray[Any], v: NDArray[Any]) -> None:
    """Begin to upload a prompt, and give up in the middle.

    Raises:
        OctavoError: The session could not be found.
    """
    impatient = Timeout(append_s=random.uniform(0.001, 0.01))
    with endpoint.client(timeout=impatient, retry=Retry(max_attempts=1)) as client:
        session = client.attach(session_id)
        try:
            session.append(k, v, layer=0)
        except OctavoError:
            return  # as it was meant, or refused; the session is closed either way


def rival_append(
    endpoint: Endpoint, session_id: str, layer: int, start_pos: int, tensors: Tensors
) -> str:
    """Append as a second client at a position that is taken; return what is wrong with the answer, or "".

    Raises:
        OctavoError: The server could not say, since it has no room or is gone.
    """
    with endpoint.client() as client:
        session = client.attach(session_id)
        result = client.decode_batch([Entry(session, layer, 1, start_pos)], *tensors)
    error = result.errors.get(0)
    if isinstance(error, PositionMismatch):
        return ""
    if error is not None:
        raise error
    return f"a second client could append at position {start_pos} of layer {layer}, which was taken"


class SlowReader:
    """A Decode stream whose answers are not read for a while.

    Args:
        endpoint: The server.
        stopping: Set when it is to end.
    """

    def __init__(self, endpoint: Endpoint, stopping: threading.Event) -> None:
        access = endpoint.access
        options = channel_options(Timeout(), Retry())
        self._channel: grpc.Channel = open_channel(
            grpc, endpoint.target, options, access.tls, access.token
        )
        self._metadata = CallMetadata(access.token, None)
        self._stopping = stopping

    def run(
        self, session: Session, start_pos: int, content: Callable[[int], Tensors]
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Send steps of one token to layer 0 at once, wait, then read the answers one by one.

        Args:
            session: Theirs.
            start_pos: Position of the first token.
            content: Returns q, k and v of a position.

        Yields:
            Position and answer, [1, num_q_heads, head_dim].

        Raises:
            OctavoError: A step was refused, or the stream broke.
        """
        positions = range(start_pos, start_pos + NUM_SLOW_STEPS)
        messages = [_message(session.handle, p, content(p)) for p in positions]
        rpc = self._channel.stream_stream(*DECODE_RPC)
        call = rpc(iter(messages), timeout=_CALL_TIMEOUT_S, metadata=self._metadata())
        self._stopping.wait(random.uniform(0.2, 2.0))
        try:
            for response in call:
                yield response.head.step_id, _answer(response)
                self._stopping.wait(random.uniform(0, 0.01))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def _message(handle: int, position: int, tensors: Tensors) -> bytes:
    header = pb.Step(
        step_id=position,
        step_key=random_key(),
        session_handles=[handle],
        layers=[0],
        start_pos=[position],
        num_tokens=[1],
    )
    fields = (pb.Step.Q_FIELD_NUMBER, pb.Step.K_FIELD_NUMBER, pb.Step.V_FIELD_NUMBER)
    return encode_decode(header, encode_tensors(dict(zip(fields, tensors, strict=True))))


def _answer(result: Result) -> NDArray[Any]:
    if result.head.HasField("error"):
        raise error_from_status(result.head.error)
    for entry_error in result.head.entry_errors:
        raise error_from_status(entry_error.error)
    return from_wire(result.out)
