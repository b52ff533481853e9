"""Sessions over a restart within one process: what is restored, what is refused, and that nothing returns twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from octavo import v1
from octavo_server import snapshots
from octavo_server.backends.base import UnsupportedError
from octavo_server.config_keys import ModelConfig, ServerConfig
from octavo_server.server import Server, Stopped
from octavo_server.snapshots import RestoreStoppedError
from tests.rpc.conftest import NUM_BLOCKS, serving, tiny_model
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Caching, Wire, refusal_of_call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@contextmanager
def serving_from(folder: Path, **changes: Any) -> Iterator[Wire]:
    """Run a server with a snapshot folder, which it writes in the end."""
    with serving(snapshot_dir=str(folder), **changes) as wire:
        yield wire


def filled(wire: Wire, *lengths: int) -> Caching:
    """Open a session with tokens in its layers."""
    caching = wire.open()
    for layer, length in enumerate(lengths):
        wire.append(caching, layer, length)
    return caching


def files(folder: Path) -> dict[str, Path]:
    """Return the files of a snapshot by session id."""
    return {path.stem: path for path in (folder / "sessions").iterdir()}


def reason(wire: Wire, caching: Caching) -> str:
    """Return what the server says of a session that is not there."""
    with pytest.raises(grpc.RpcError) as caught:
        wire.lengths(caching)
    return refusal_of_call(caught.value).reason


def test_sessions_go_on_under_their_names(folder: Path) -> None:
    with serving_from(folder) as wire:
        cachings = [filled(wire, 20, 5), wire.open(), filled(wire, 1)]
    assert sorted(files(folder)) == sorted(caching.session_id for caching in cachings)
    with serving_from(folder) as wire:
        assert os.listdir(folder) == ["lock"]
        for caching in cachings:
            wire.append(caching, 0, 2)
        stats = wire.stub.ServerStats(v1.ServerStatsRequest(), timeout=CALL_TIMEOUT_S)
        assert stats.num_opened_sessions == 3
        wire.close(cachings[0])
        assert reason(wire, cachings[0]) == "SESSION_NOT_FOUND"
    with serving_from(folder) as wire:
        assert reason(wire, cachings[0]) == "SESSION_LOST"
        wire.append(cachings[2], 0, 2)


def test_a_step_answered_before_the_restart_is_a_replay_after_it(folder: Path) -> None:
    opening = v1.OpenSessionRequest(model=MODEL, request_id="mine", lease_ms=77_000)
    with serving_from(folder) as wire:
        opened = wire.stub.OpenSession(opening, timeout=CALL_TIMEOUT_S).session
        step = wire.step((Caching(opened.session_id, opened.session_handle), 1, 5))
        answer = wire.run(step)
    with serving_from(folder) as wire:
        assert wire.run(step).out == answer.out
        again = wire.stub.OpenSession(opening, timeout=CALL_TIMEOUT_S).session
        assert (again.session_id, again.session_handle) == (
            opened.session_id,
            opened.session_handle,
        )
        assert (list(again.lengths), again.lease_ms) == ([0, 5], 77_000)


def test_what_cannot_be_restored_is_set_aside_and_the_rest_is_restored(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_from(folder) as wire:
        damaged, renamed, sound = (filled(wire, 5) for _ in range(3))
        request = v1.ExportSessionRequest(session_id=sound.session_id)
        export = b"".join(
            response.data for response in wire.stub.ExportSession(request, timeout=CALL_TIMEOUT_S)
        )
    path = files(folder)[damaged.session_id]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    names = {path.name, "mine.safetensors", f"0badcafe-{'0' * 32}.safetensors"}
    files(folder)[renamed.session_id].rename(folder / "sessions" / "mine.safetensors")
    (folder / "sessions" / f"0badcafe-{'0' * 32}.safetensors").write_bytes(export)
    (folder / "sessions" / "0badcafe-00.partial").write_bytes(b"half")
    with serving_from(folder) as wire:
        wire.append(sound)
        assert {reason(wire, damaged), reason(wire, renamed)} == {"SESSION_LOST"}
        assert wire.num_free_blocks() == NUM_BLOCKS - 1
    assert {path.name for path in (folder / "refused").iterdir()} == names
    assert f"{path} is refused, its session is lost: its checksum does not fit" in caplog.text
    assert "0badcafe-00 is lost: its process ended while it was written" in caplog.text


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (tiny_model(MODEL, 8), "its window is not that of model 'tiny'"),
        (tiny_model("other", 0), "no model 'tiny'"),
        (ModelConfig(tiny_model(MODEL, 0).spec, num_blocks=2), "holds at most 32 tokens, got 40"),
    ],
)
def test_sessions_that_the_models_do_not_take_are_refused(
    folder: Path, model: ModelConfig, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_from(folder) as wire:
        caching = filled(wire, 40)
    with serving_from(folder, models=(model,)) as wire:
        assert reason(wire, caching) == "SESSION_LOST"
        assert wire.num_free_blocks(model.spec.name) == model.num_blocks
    assert cause in caplog.text
    assert os.listdir(folder / "refused") == [f"{caching.session_id}.safetensors"]


def test_a_snapshot_that_cannot_be_consumed_is_not_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_from(folder) as wire:
        caching = filled(wire, 5)

    def fail(_path: Path, _target: Path) -> None:
        raise OSError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        server = Server(config(folder))
        with pytest.raises(UnsupportedError, match="planted"):
            server.start()
        assert server._snapshots is not None
        server._snapshots.close()
    with serving_from(folder) as wire:
        wire.append(caching)


def test_a_server_that_is_to_stop_leaves_the_snapshot_to_the_next(folder: Path) -> None:
    with serving_from(folder) as wire:
        cachings = [filled(wire, 5), filled(wire, 3)]
    snapshot = {path: path.stat().st_ino for path in files(folder).values()}
    answers = iter([False, True])
    server = Server(config(folder), is_stopping=lambda: next(answers))
    with pytest.raises(RestoreStoppedError, match="1 of 2 sessions"):
        server.start()
    assert server.stop() == Stopped(is_drained=True, num_unsaved=0)
    assert {path: path.stat().st_ino for path in files(folder).values()} == snapshot
    with serving_from(folder) as wire:
        for caching in cachings:
            wire.append(caching)


def config(folder: Path) -> ServerConfig:
    """Return the config of a server with a snapshot folder."""
    models = (tiny_model(MODEL, 0),)
    return ServerConfig(port=0, backend="reference", models=models, snapshot_dir=str(folder))


def test_a_device_that_fails_while_sessions_are_restored_costs_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_from(folder) as wire:
        caching = filled(wire, 5)

    def fail(*_args: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("octavo_server.backends.reference.ReferenceBackend.write_blocks", fail)
        server = Server(config(folder))
        with pytest.raises(UnsupportedError, match="the device failed while sessions"):
            server.start()
        assert server._snapshots is not None
        server._snapshots.close()
    with serving_from(folder) as wire:
        wire.append(caching)


def test_a_snapshot_that_was_put_there_meanwhile_is_not_taken_for_ours(folder: Path) -> None:
    with serving_from(folder) as wire:
        caching = filled(wire, 5)
        (folder / "sessions").mkdir()
        (folder / "sessions" / "strange.safetensors").write_bytes(b"")
    assert list(files(folder)) == [caching.session_id]
    (strange,) = (folder / "refused").iterdir()
    assert os.listdir(strange) == ["strange.safetensors"]


def test_two_servers_do_not_share_a_folder(folder: Path) -> None:
    with serving_from(folder), pytest.raises(UnsupportedError, match="another running server's"):
        Server(config(folder)).start()


def test_a_file_that_cannot_be_written_is_said_and_the_rest_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_from(folder) as wire:
        lost, kept = filled(wire, 5), filled(wire, 5)
        write = snapshots.Snapshots._write

        def fail(self: Any, export: Any) -> None:
            if export.session_id == lost.session_id:
                raise OSError("planted")
            write(self, export)

        monkeypatch.setattr(snapshots.Snapshots, "_write", fail)
        assert wire.server.stop() == Stopped(is_drained=True, num_unsaved=1)
        monkeypatch.undo()
        assert list(files(folder)) == [kept.session_id]
        assert f"session {lost.session_id} is lost, it cannot be written: planted" in caplog.text
