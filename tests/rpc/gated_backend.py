"""A real backend whose launches a test can hold or break."""

from __future__ import annotations

import threading
from typing import Any

from octavo_server.backends.base import Backend


class GatedBackend:
    """Passes everything on to `inner`; steps wait while the gate is shut.

    Attributes:
        is_running: Set once a launch has arrived at the shut gate.
        is_broken: Makes launches raise instead.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._may_run = threading.Event()
        self._may_run.set()
        self.is_running = threading.Event()
        self.is_broken = False

    def shut(self) -> None:
        """Hold launches from now on."""
        self.is_running.clear()
        self._may_run.clear()

    def open(self) -> None:
        """Let launches through."""
        self._may_run.set()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step once the gate is open."""
        self._pass_gate()
        return self._inner.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _pass_gate(self) -> None:
        self.is_running.set()
        assert self._may_run.wait(30), "the test never opened the gate"
        if self.is_broken:
            raise RuntimeError("planted device failure")
