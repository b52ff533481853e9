"""What the lanes of one process note, until it is sent to the process that reports."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from octavo_client._errors import OctavoError
from octavo_client.load.checks import Sample
from octavo_client.load.fate import reason_of
from octavo_client.load.tally import Tally


@dataclass(slots=True)
class Page:
    """What was noted since the page before.

    Attributes:
        tally: Counts and times.
        samples: Answers to check.
        opened: Ids of sessions opened.
        closed: Ids of sessions closed.
    """

    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)


class Book:
    """The page that is written on, by several threads.

    Args:
        expected: Reasons of errors that do not fail the run.
    """

    def __init__(self, expected: frozenset[str]) -> None:
        self._expected = expected
        self._page = Page()
        self.lock = threading.Lock()

    @property
    def page(self) -> Page:
        """The page; write on it while the lock is held."""
        return self._page

    def turn(self) -> Page:
        """Begin another page, and return the one before."""
        with self.lock:
            page, self._page = self._page, Page()
        return page

    def error(self, error: OctavoError) -> None:
        """Note an error: expected, by its reason, or a fault."""
        reason = reason_of(error)
        with self.lock:
            if reason in self._expected:
                self._page.tally.refusals[reason] += 1
            else:
                self._page.tally.faults[f"{reason}: {error}"] += 1

    def fault(self, text: str) -> None:
        """Note what must not happen."""
        with self.lock:
            self._page.tally.faults[text] += 1

    def chaos(self, kind: str) -> None:
        """Note a fault that was injected."""
        with self.lock:
            self._page.tally.chaos[kind] += 1

    def stored_unanswered(self) -> None:
        """Note a token that turned out to be stored, though its answer was lost."""
        with self.lock:
            self._page.tally.num_stored_unanswered += 1

    def opened(self, session_id: str) -> None:
        """Note a new session."""
        with self.lock:
            self._page.opened.append(session_id)
            self._page.tally.num_opened += 1

    def closed(self, session_id: str) -> None:
        """Note that a session is no more."""
        with self.lock:
            self._page.closed.append(session_id)
            self._page.tally.num_closed += 1

    def uploaded(self, num_tokens: int, num_bytes: int, took_ns: int) -> None:
        """Note a prompt."""
        with self.lock:
            self._page.tally.prompts.record(took_ns)
            self._page.tally.prompt_tokens += num_tokens
            self._page.tally.prompt_bytes += num_bytes


def shorten(faults: Counter[str], most: int) -> list[str]:
    """Return the most frequent faults as lines."""
    return [
        text if count == 1 else f"{text} ({count} times)"
        for text, count in faults.most_common(most)
    ]
