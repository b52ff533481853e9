"""What the client logs, as `octavo_client`: steps by the step_id and step_key under which the server logs them too."""

from __future__ import annotations

import logging
from typing import Any

from octavo_client._errors import OctavoError, RefusedError

log = logging.getLogger("octavo_client")


def log_sent_again(step_id: int, step_key: int) -> None:
    """Log that a step goes over another stream, for the one before broke."""
    extra = _names(step_id, step_key)
    log.info("step %d (%016x) is sent again", step_id, step_key, extra=extra)


def log_failure(
    step_id: int, step_key: int, error: OctavoError, entry_idx: int | None = None
) -> None:
    """Log why a step, or one of its entries, has no answer."""
    if not log.isEnabledFor(logging.INFO):
        return
    extra = _names(step_id, step_key)
    if isinstance(error, RefusedError):
        extra["reason"] = error.reason
    what = f"step {step_id} ({step_key:016x})"
    if entry_idx is not None:
        what = f"entry {entry_idx} of {what}"
        extra["entry_idx"] = entry_idx
    log.info("%s failed: %s", what, _told(error), extra=extra)


def log_retry(error: OctavoError, delay_s: float) -> None:
    """Log that what failed is tried again."""
    log.info("trying again in %.2f s after %s", delay_s, _told(error))


def _told(error: OctavoError) -> str:
    is_named = isinstance(error, RefusedError)
    return str(error) if is_named else f"{type(error).__name__}: {error}"


def _names(step_id: int, step_key: int) -> dict[str, Any]:
    return {"step_id": step_id, "step_key": f"{step_key:016x}"}
