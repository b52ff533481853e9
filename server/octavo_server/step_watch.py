"""Who looks at every step besides the engine: refusals are counted and logged, sampled steps traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from octavo_server.errors import OctavoError
from octavo_server.step import StepAnswer
from octavo_server.step_log import StepLog
from octavo_server.tracing import Tracing
from octavo_server.traffic import Traffic


@dataclass(frozen=True, slots=True)
class StepWatch:
    """Looks at the steps of one server.

    Attributes:
        traffic: Counts refusals.
        tracing: Makes spans of sampled steps, where the config asks for it.
        log: Writes what became of steps.
    """

    traffic: Traffic
    tracing: Tracing | None = None
    log: StepLog = field(default_factory=StepLog)

    def on_answer(self, step_id: int, step_key: int, answer: StepAnswer) -> None:
        """Note what became of a step."""
        self.log.on_answer(step_id, step_key, answer)
        if answer.error is not None:
            self.traffic.count_refusal(answer.error)
        for error in answer.entry_errors.values():
            self.traffic.count_refusal(error)

    @contextmanager
    def unary(self, step_id: int, step_key: int) -> Iterator[None]:
        """Log the refusal of a step that ends its call; who ends the call counts it."""
        try:
            yield
        except OctavoError as error:
            self.log.on_refusal(step_id, step_key, error)
            raise
