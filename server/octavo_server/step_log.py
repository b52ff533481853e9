"""What the logs say of steps: all at debug, refused ones at info, by the step_key that the client logs as well."""

from __future__ import annotations

import logging
import time

from octavo_server.errors import OctavoError
from octavo_server.logs import Throttle
from octavo_server.step import StepAnswer

log = logging.getLogger(__name__)

MAX_LINES_A_S = 20
"""Refusals that are logged in one second: a client in error must not fill the disk, or slow the others down."""


class StepLog:
    """Logs the steps of one server."""

    def __init__(self) -> None:
        self._throttle = Throttle(log, "refusals")

    def on_answer(self, step_id: int, step_key: int, answer: StepAnswer) -> None:
        """Log what became of a step."""
        if answer.error is None and not answer.entry_errors:
            if log.isEnabledFor(logging.DEBUG):
                names = step_names(step_id, step_key)
                log.debug("step %d (%016x) was answered", step_id, step_key, extra=names)
            return
        if answer.error is not None:
            self.on_refusal(step_id, step_key, answer.error)
        for entry_idx, error in answer.entry_errors.items():
            self.on_refusal(step_id, step_key, error, entry_idx)

    def on_refusal(
        self, step_id: int, step_key: int, error: OctavoError, entry_idx: int | None = None
    ) -> None:
        """Log why a step, or one of its entries, was refused."""
        if not (
            log.isEnabledFor(logging.INFO)
            and self._throttle.passes(MAX_LINES_A_S, time.monotonic())
        ):
            return
        extra = step_names(step_id, step_key) | {"reason": str(error.reason)}
        what = f"step {step_id} ({step_key:016x})"
        if entry_idx is not None:
            what = f"entry {entry_idx} of {what}"
            extra["entry_idx"] = entry_idx
        log.info("%s was refused: %s: %s", what, error.reason, error, extra=extra)


def step_names(step_id: int, step_key: int) -> dict[str, object]:
    """Return the fields by which logs name a step."""
    return {"step_id": step_id, "step_key": f"{step_key:016x}"}
