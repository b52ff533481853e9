"""What a run gave, and whether it is good enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo_client.load.checks import CheckCounts
from tests.chaos.account import Loss
from tests.chaos.form import Form
from tests.chaos.notes import Page


@dataclass(slots=True)
class Results:
    """Counts of a run.

    Attributes:
        faults: Injected, by kind.
        num_calls: Calls and steps, hostile messages included.
        errors: What the client library raised, by reason.
        refusals: What became of hostile messages and of probes of another tenant's sessions.
        num_opened: Sessions opened.
        num_losses: Sessions said to be gone.
        num_said_lost_tokens: Their confirmed tokens.
        num_lost_tokens: Confirmed tokens that were gone and not said to be, or with a reason that had no cause.
        complaints: What must not happen, by text.
        num_left_sessions: Sessions at the end.
        num_leaked_blocks: Blocks that were not free at the end.
        recoveries: Seconds from faults to the next right answer of each client that they hit, by kind.
        checks: Of the answers.
        seconds: What the run took.
    """

    faults: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    num_opened: int = 0
    num_losses: int = 0
    num_said_lost_tokens: int = 0
    num_lost_tokens: int = 0
    complaints: Counter[str] = field(default_factory=Counter)
    num_left_sessions: int = 0
    num_leaked_blocks: int = 0
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    checks: CheckCounts = field(default_factory=CheckCounts)
    seconds: float = 0.0

    def take(self, page: Page, losses: Sequence[tuple[Loss, str]]) -> None:
        """Add what was noted; each loss comes with why it had no cause, or ""."""
        self.num_calls += page.num_calls
        self.errors += page.errors
        self.refusals += page.refusals
        self.num_opened += page.num_opened
        self.num_lost_tokens += page.num_lost_tokens
        self.complaints += page.complaints
        for loss, fault in losses:
            self.num_losses += 1
            if fault:
                self.num_lost_tokens += loss.num_tokens
                self.complaints[fault] += 1
            else:
                self.num_said_lost_tokens += loss.num_tokens

    def failures(self, form: Form, num_faults: int) -> list[str]:
        """Return why the run is not good enough, as lines.

        Args:
            form: Of the run.
            num_faults: Faults that were to be injected.
        """
        checks = self.checks
        least = form.min_answers
        found = [
            (checks.num_wrong, f"{checks.num_wrong} answers are wrong"),
            (checks.num_dropped, f"{checks.num_dropped} answers were not checked"),
            (self.num_lost_tokens, f"{self.num_lost_tokens} tokens were lost and not said to be"),
            (self.num_left_sessions, f"{self.num_left_sessions} sessions were left open"),
            (self.num_leaked_blocks, f"{self.num_leaked_blocks} blocks leaked"),
            (checks.num_checked < least, f"{checks.num_checked} of {least} answers were checked"),
            (
                self.faults.total() < num_faults,
                f"{self.faults.total()} of {num_faults} faults were injected",
            ),
        ]
        return [
            *(text for is_bad, text in found if is_bad),
            *checks.faults,
            *(f"{text} ({count} times)" for text, count in self.complaints.most_common(20)),
        ]
