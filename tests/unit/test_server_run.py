"""What `run` does around a server: the rest of the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from octavo_server import server
from octavo_server.config_keys import ServerConfig
from octavo_server.snapshots import RestoreStoppedError


def test_torch_keeps_one_thread_once_the_pools_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class IdleAlarm:
        """Nobody rings it but a failing device."""

        def ring(self) -> None:
            events.append("failure")

        def watch_signals(self) -> None:
            pass

        def has_rung(self) -> bool:
            return False

        def wait(self) -> None:
            return None

    class FailingServer:
        """Allocates its pools, and fails before it serves anything."""

        metrics_url = ""

        def __init__(
            self,
            config: ServerConfig,
            on_failure: Callable[[], None],
            is_stopping: Callable[[], bool],
        ) -> None:
            assert not is_stopping()
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


def test_a_signal_while_sessions_are_restored_ends_the_process_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alarm, stopped = server._Alarm(), []
    monkeypatch.setattr(server, "_Alarm", lambda: alarm)
    monkeypatch.setattr(alarm, "watch_signals", lambda: None)

    class RestoringServer:
        """Is told to stop while it starts."""

        def __init__(self, _config: object, _on_failure: object, is_stopping: Any) -> None:
            self._is_stopping = is_stopping

        def start(self) -> int:
            assert not self._is_stopping()
            alarm.ring()
            assert self._is_stopping()
            raise RestoreStoppedError("0 of 1 sessions were read")

        def stop(self) -> None:
            stopped.append(True)

    monkeypatch.setattr(server, "Server", RestoringServer)
    monkeypatch.setattr("torch.set_num_threads", lambda _num: None)
    assert server.run(ServerConfig()) == 0
    assert stopped == [True]
