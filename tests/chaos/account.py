"""What one session must hold, from what its client sent and was told. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.chaos.form import NUM_LAYERS


class Difference(NamedTuple):
    """How a session's lengths differ from what they may be, in tokens, all layers added up.

    Attributes:
        num_lost: Confirmed, and no longer there.
        num_unsent: There, and never sent.
    """

    num_lost: int
    num_unsent: int


class Loss(NamedTuple):
    """A session that its client was told to be gone.

    Attributes:
        client_idx: The client.
        session_id: The session.
        reason: That was told.
        call: The call that was told.
        num_tokens: Confirmed tokens of all layers.
        since_ns: When the last call was sent that the server answered with the session there.
        until_ns: When the loss was told.
        closes_on_disconnect: Whether the session's policy lets it end with a connection.
    """

    client_idx: int
    session_id: str
    reason: str
    call: str
    num_tokens: int
    since_ns: int
    until_ns: int
    closes_on_disconnect: bool


@dataclass(slots=True)
class Account:
    """Tokens of one session, by layer.

    Attributes:
        seen_ns: When the last call was sent that the server answered with the session there.
        confirmed: Tokens that an answer said are stored.
        sent: End of the furthest token that was ever sent.
    """

    seen_ns: int
    confirmed: list[int] = field(default_factory=lambda: [0] * NUM_LAYERS)
    sent: list[int] = field(default_factory=lambda: [0] * NUM_LAYERS)

    def send(self, layer: int, end: int) -> None:
        """Note tokens on their way."""
        self.sent[layer] = max(self.sent[layer], end)

    def confirm(self, layer: int, end: int, sent_ns: int) -> None:
        """Note an answer to what was sent at `sent_ns`."""
        self.confirmed[layer] = max(self.confirmed[layer], end)
        self.seen_ns = max(self.seen_ns, sent_ns)

    def cut(self, length: int) -> None:
        """Note that tokens from `length` on are to be forgotten: from now on they may be gone."""
        self.confirmed = [min(confirmed, length) for confirmed in self.confirmed]

    def was_cut(self, asked_ns: int) -> None:
        """Note that they are forgotten."""
        self.sent = list(self.confirmed)
        self.seen_ns = max(self.seen_ns, asked_ns)

    def settle(self, lengths: Sequence[int], asked_ns: int) -> Difference:
        """Take over the lengths that the server told, and return how they differ from what they may be."""
        layers = list(zip(lengths, self.confirmed, self.sent, strict=True))
        num_lost = sum(max(confirmed - length, 0) for length, confirmed, _ in layers)
        num_unsent = sum(max(length - sent, 0) for length, _, sent in layers)
        self.confirmed = list(lengths)
        self.seen_ns = max(self.seen_ns, asked_ns)
        return Difference(num_lost, num_unsent)
