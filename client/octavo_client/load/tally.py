"""What was counted: sent in parts from the processes to the one that reports, and added up there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from octavo_client.load.histogram import Histogram


@dataclass(slots=True)
class Tally:
    """Counts and times of measured steps, in nanoseconds; what is not a step's is of the whole run, warm-up included.

    Attributes:
        num_steps: Steps that were answered.
        num_layer_steps: Their entries: one token of one session in one layer.
        num_tokens: Those of them that were of the last layer, which completes a token.
        context: Cached tokens of those entries, added up.
        sent_bytes: Bytes of q, k and v.
        received_bytes: Bytes of the answers.
        latency: From sent, or due, to answered.
        by_sessions: Steps by the number of their sessions.
        lateness: How late steps left that had a free lane.
        num_without_lane: Steps that were due when no lane was free.
        num_unsent: Steps that were due and never sent.
        send_ns: Time to build, encode and enqueue a step.
        receive_ns: Time from a result's arrival to the return to the caller.
        num_staged: Steps whose result had its stage times.
        queue_ns, copy_in_ns, kernel_ns, copy_out_ns: Those stage times.
        staged_latency_ns, staged_send_ns, staged_receive_ns: The client's times of the same steps.
        batch_sizes: Steps by the entries that shared their launch.
        prompts: Times of prompts' uploads.
        prompt_tokens: Their tokens, once for all layers.
        prompt_bytes: Bytes of their K and V.
        num_opened: Sessions opened.
        num_closed: Sessions closed.
        refusals: Errors that were expected, by reason.
        faults: Errors that were not, by text.
        chaos: Faults that were injected, by kind.
        num_stored_unanswered: Tokens whose answer was lost, and that the server turned out to have.
        num_sampled: Answers kept to be checked.
        last_ns: When the last measured step was answered.
    """

    num_steps: int = 0
    num_layer_steps: int = 0
    num_tokens: int = 0
    context: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    latency: Histogram = field(default_factory=Histogram)
    by_sessions: Counter[int] = field(default_factory=Counter)
    lateness: Histogram = field(default_factory=Histogram)
    num_without_lane: int = 0
    num_unsent: int = 0
    send_ns: int = 0
    receive_ns: int = 0
    num_staged: int = 0
    queue_ns: int = 0
    copy_in_ns: int = 0
    kernel_ns: int = 0
    copy_out_ns: int = 0
    staged_latency_ns: int = 0
    staged_send_ns: int = 0
    staged_receive_ns: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)
    prompts: Histogram = field(default_factory=Histogram)
    prompt_tokens: int = 0
    prompt_bytes: int = 0
    num_opened: int = 0
    num_closed: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    chaos: Counter[str] = field(default_factory=Counter)
    num_stored_unanswered: int = 0
    num_sampled: int = 0
    last_ns: int = 0

    def merge(self, other: Tally) -> None:
        """Add everything that another tally counted."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name == "last_ns":
                self.last_ns = max(mine, theirs)
            elif isinstance(mine, Histogram):
                mine.merge(theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, each.name, mine + theirs)
