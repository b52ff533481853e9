"""Waiting for a fact instead of for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT_S = 20
POLL_S = 0.005


def wait_until(is_so: Callable[[], object]) -> None:
    """Return once something is so; fail when it does not come about."""
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, "what was waited for never came about"
        time.sleep(POLL_S)


async def until(is_so: Callable[[], object]) -> None:
    """Do the same without holding the event loop up."""
    await asyncio.to_thread(wait_until, is_so)
