"""Runs `octavo-server` with its arguments, on a backend whose second step fails as a device does."""

from __future__ import annotations

import sys
from typing import Any

from octavo_server import server
from octavo_server.backends.base import StepOutput
from octavo_server.backends.reference import ReferenceBackend
from octavo_server.cli import main


class FailingBackend:
    """The reference backend for one step; a device that is lost from then on."""

    def __init__(self) -> None:
        self._inner = ReferenceBackend()
        self._num_steps = 0

    def step(self, *args: Any, **kwargs: Any) -> StepOutput:
        """Run the first step alone."""
        self._num_steps += 1
        if self._num_steps > 1:
            raise RuntimeError("planted device failure")
        return self._inner.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


if __name__ == "__main__":
    vars(server)["create_backend"] = lambda *_, **__: FailingBackend()
    sys.exit(main())
