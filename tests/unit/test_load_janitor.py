"""The server must hold after a run of the load test what it held before; and its process can be watched."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from octavo_client import ConnectionLost, ServerInfo, SessionNotFound
from octavo_client.load import janitor as janitor_module
from octavo_client.load.janitor import Janitor, read_baseline
from octavo_client.load.watch import Watch, read_status
from tests.unit.client_fakes import model


class FakeClient:
    """A server's sessions; `stuck` ones cannot be closed."""

    def __init__(self, *session_ids: str) -> None:
        self.session_ids = list(session_ids)
        self.stuck: set[str] = set()
        self.num_free_blocks = 12

    def list_sessions(self) -> list[Any]:
        return [SimpleNamespace(session_id=session_id) for session_id in self.session_ids]

    def server_info(self) -> ServerInfo:
        models = {"tiny": replace(model(), num_free_blocks=self.num_free_blocks)}
        num_sessions = len(self.session_ids)
        return ServerInfo("", "", "", "", MappingProxyType(models), 1, 1, num_sessions, 9)

    def attach(self, session_id: str) -> Any:
        if session_id in self.stuck:
            raise ConnectionLost("gone", may_be_applied=False)
        if session_id not in self.session_ids:
            raise SessionNotFound("SESSION_NOT_FOUND", "none")
        return SimpleNamespace(close=lambda: self.session_ids.remove(session_id))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(janitor_module, "_SETTLE_S", 0)
    return FakeClient("theirs")


def test_what_was_there_before_stays_and_all_else_is_closed(client: Any) -> None:
    janitor = Janitor(client, read_baseline(client))
    client.session_ids += ["ours", "killed"]
    janitor.close_soon(["killed", "closed before"])
    assert janitor.finish(sweep=False) == []
    assert client.session_ids == ["theirs", "ours"]
    assert janitor.left_open() == ["ours"]
    assert janitor.finish(sweep=True) == []
    assert client.session_ids == ["theirs"]
    assert janitor.differences() == []
    janitor.close()


def test_what_cannot_be_closed_is_said(client: Any) -> None:
    janitor = Janitor(client, read_baseline(client))
    client.session_ids.append("ours")
    client.stuck.add("ours")
    (fault,) = janitor.finish(sweep=True)
    assert "ours could not be closed" in fault
    janitor.close()


def test_a_leaked_session_or_block_is_a_difference(client: Any) -> None:
    janitor = Janitor(client, read_baseline(client))
    client.session_ids.append("leaked")
    assert janitor.differences() == ["the server has 2 sessions, it had 1 before the run"]
    client.session_ids.remove("leaked")
    client.num_free_blocks -= 1
    assert janitor.differences() == ["model tiny has 11 free blocks, it had 12 before the run"]
    janitor.close()


def test_a_process_is_watched_once_a_second() -> None:
    times = iter([10.0, 10.5, 11.0, 11.2])
    watch = Watch(os.getpid(), lambda: next(times))
    for _ in range(4):
        watch.look()
    assert [sight.at_s for sight in watch.sights] == [0.0, 1.0]
    assert watch.sights[0].rss_bytes > 1 << 20
    assert f"{watch.sights[0].num_threads} threads at first" in watch.line()


def test_a_thread_more_is_seen() -> None:
    ending = threading.Event()
    _, before = read_status(os.getpid())
    thread = threading.Thread(target=ending.wait)
    thread.start()
    _, during = read_status(os.getpid())
    ending.set()
    thread.join()
    assert during == before + 1
