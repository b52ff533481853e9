"""A server ended and started again on the same port and snapshot folder: nothing is lost, or it is said to be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from octavo_client import Client, SessionLost, SessionNotFound
from tests.e2e.server_process import WAIT_S, ServerProcess
from tests.rpc.checked_session import Checked, draw_prompt, draw_step
from tests.rpc.wire import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS

MODEL = (
    f"name=tiny,num_layers={NUM_LAYERS},num_q_heads={NUM_Q_HEADS},num_kv_heads={NUM_KV_HEADS},"
    f"head_dim={HEAD_DIM},max_context=2048,num_blocks=128"
)
OTHER_BLOCKS = MODEL.replace("num_blocks=128", "num_blocks=64,block_size=64")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    """A server, and its successors on the same folder."""
    with ServerProcess("--snapshot-dir", str(folder)) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def filled(client: Client, num_tokens: int = 40) -> Checked:
    """Open a session with tokens in it."""
    checked = Checked(client.open_session("tiny"))
    prompt = draw_prompt(num_tokens)
    checked.session.append(*prompt)
    checked.take_prompt(prompt)
    return checked


def step(checked: Checked) -> None:
    """Decode one token in every layer and check the answers."""
    for layer in range(NUM_LAYERS):
        tensors = draw_step()
        result: Any = checked.session.decode(layer, *tensors)
        checked.check(layer, tensors, result)


def snapshot_files(folder: Path) -> list[Path]:
    return sorted((folder / "sessions").iterdir())


BACKEND = ("--backend", "reference", "--model", MODEL)


def test_a_rolling_restart_under_load_loses_nothing(
    server: ServerProcess, client: Client, folder: Path
) -> None:
    """Clients decode while the server is ended and another one starts, with another backend and block size."""
    server.start(*BACKEND)
    sessions = [filled(client, num_tokens) for num_tokens in (1, 40, 100)]
    is_back = threading.Event()
    stepped = threading.Barrier(len(sessions) + 1)

    def decode(checked: Checked) -> None:
        step(checked)
        stepped.wait(WAIT_S)
        while not is_back.is_set():
            step(checked)
        for _ in range(3):
            step(checked)

    with ThreadPoolExecutor(len(sessions)) as threads:
        decoding = [threads.submit(decode, checked) for checked in sessions]
        stepped.wait(WAIT_S)
        assert server.terminate() == 0
        assert len(snapshot_files(folder)) == len(sessions)
        assert {path.stat().st_mode & 0o777 for path in snapshot_files(folder)} == {0o600}
        assert (folder / "sessions").stat().st_mode & 0o777 == 0o700
        server.start("--backend", "cpu", "--model", OTHER_BLOCKS)
        is_back.set()
        for future in decoding:
            future.result(WAIT_S)
    assert sorted(path.name for path in folder.iterdir()) == ["lock"]
    assert "restored 3 sessions; refused 0" in server.logs()
    for checked in sessions:
        assert client.get_session(checked.session.session_id).lengths == checked.lengths
        checked.session.close()
        with pytest.raises(SessionNotFound):
            client.get_session(checked.session.session_id)


def test_what_a_killed_server_had_is_lost_also_where_it_had_restored_it(
    server: ServerProcess, client: Client, folder: Path
) -> None:
    """It is killed after its first answer, as if before it had deleted the snapshot that it had consumed."""
    server.start(*BACKEND)
    checked, other = filled(client), filled(client)
    assert server.terminate() == 0
    names = [path.name for path in snapshot_files(folder)]
    server.start(*BACKEND)
    step(checked)
    server.kill()
    consumed = folder / "consumed-0badcafe"
    consumed.mkdir()
    (consumed / names[0]).write_bytes(b"")
    server.start(*BACKEND)
    for lost in (checked, other):
        with pytest.raises(SessionLost):
            step(lost)
    assert not consumed.exists()


def test_sessions_that_do_not_fit_the_disk_are_lost_and_the_rest_is_written(
    server: ServerProcess, client: Client, folder: Path
) -> None:
    server.start(*BACKEND, prefix=("prlimit", "--fsize=20000", "--"))
    small, large = filled(client, 20), filled(client, 500)
    assert server.terminate() == 1
    assert [path.stem for path in snapshot_files(folder)] == [small.session.session_id]
    assert f"session {large.session.session_id} is lost, it cannot be written" in server.logs()
    assert "1 sessions are lost" in server.logs()
    server.start(*BACKEND)
    step(small)
    with pytest.raises(SessionLost):
        step(large)
