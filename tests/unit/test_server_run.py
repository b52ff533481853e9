"""What `run` does around a server: the rest of the process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from octavo_server import server
from octavo_server.config import ServerConfig


def test_torch_keeps_one_thread_once_the_pools_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class IdleAlarm:
        """Nobody rings it but a failing device."""

        def ring(self) -> None:
            events.append("failure")

        def watch_signals(self) -> None:
            pass

        def wait(self) -> None:
            return None

    class FailingServer:
        """Allocates its pools, and fails before it serves anything."""

        def __init__(self, config: ServerConfig, on_failure: Callable[[], None]) -> None:
            events.append("pools")
            on_failure()

        def start(self) -> int:
            events.append("start")
            return 1

        def stop(self) -> bool:
            return True

    monkeypatch.setattr(server, "Server", FailingServer)
    monkeypatch.setattr(server, "_Alarm", IdleAlarm)
    monkeypatch.setattr("torch.set_num_threads", lambda num: events.append(f"{num} thread"))
    assert server.run(ServerConfig()) == server.EXIT_DEVICE_FAILURE
    assert events == ["pools", "failure", "1 thread", "start"]
