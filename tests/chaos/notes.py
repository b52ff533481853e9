"""What a client process tells the run."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from octavo_client.load.checks import Sample
from tests.chaos.account import Difference, Loss
from tests.chaos.recovery import Answer


@dataclass(slots=True)
class Page:
    """What was noted since the page before.

    Attributes:
        num_calls: Calls and steps sent, appends counted once.
        answers: When steps were sent and answered.
        samples: Their answers, row by row.
        errors: What the client library raised, by reason.
        refusals: What became of hostile messages, by reason or code.
        losses: Sessions said to be gone.
        num_lost_tokens: Confirmed tokens that the server no longer had, and did not say so.
        complaints: What must not happen.
        num_opened: Sessions opened.
        num_closed: Sessions closed.
        is_finished: Whether the client closed all its sessions and ends.
    """

    num_calls: int = 0
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    losses: list[Loss] = field(default_factory=list)
    num_lost_tokens: int = 0
    complaints: Counter[str] = field(default_factory=Counter)
    num_opened: int = 0
    num_closed: int = 0
    is_finished: bool = False


class Notes:
    """The page that several threads write on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._page = Page()

    def turn(self) -> Page:
        """Begin another page, and return the one before."""
        with self._lock:
            page, self._page = self._page, Page()
        return page

    def called(self) -> None:
        """Note a call."""
        with self._lock:
            self._page.num_calls += 1

    def answered(self, answer: Answer, samples: list[Sample]) -> None:
        """Note the answer to a step."""
        with self._lock:
            self._page.answers.append(answer)
            self._page.samples += samples

    def opened(self) -> None:
        """Note a new session."""
        with self._lock:
            self._page.num_opened += 1

    def closed(self) -> None:
        """Note the end of a session."""
        with self._lock:
            self._page.num_closed += 1

    def error(self, reason: str) -> None:
        """Note an error that faults bring about."""
        with self._lock:
            self._page.errors[reason] += 1

    def refused(self, reason: str) -> None:
        """Note what became of a hostile message, or of one about another tenant's session."""
        with self._lock:
            self._page.num_calls += 1
            self._page.refusals[reason] += 1

    def lost(self, loss: Loss) -> None:
        """Note a session that is said to be gone."""
        with self._lock:
            self._page.errors[loss.reason] += 1
            self._page.losses.append(loss)

    def differs(self, session_id: str, difference: Difference) -> None:
        """Note how a session differs from what it must hold."""
        with self._lock:
            self._page.num_lost_tokens += difference.num_lost
            if difference.num_lost:
                text = f"session {session_id} lost {difference.num_lost} confirmed tokens, unsaid"
                self._page.complaints[text] += 1
            if difference.num_unsent:
                text = f"session {session_id} has {difference.num_unsent} tokens that nobody sent"
                self._page.complaints[text] += 1

    def complain(self, text: str) -> None:
        """Note what must not happen."""
        with self._lock:
            self._page.complaints[text] += 1
