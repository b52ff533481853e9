"""`octavo-server status` beside a real server."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import octavo_client as oc
from octavo_client import access
from octavo_server import status_command
from octavo_server.cli import main
from octavo_server.status_command import add_status
from octavo_server.tokens import draw_token, hash_token
from tests.rpc.checked_session import draw_step
from tests.rpc.conftest import serving
from tests.rpc.wire import MODEL, Wire


def test_status_shows_a_running_server(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    wire.open()
    assert main(["status", "--target", wire.address]) == 0
    text = capsys.readouterr().out
    assert f"at {wire.address}, up " in text
    assert "1 of 6; " in text
    assert "since its start:" in text


def test_status_is_one_json_object(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    with oc.Client(wire.address) as client:
        client.open_session(MODEL).decode(0, *draw_step())
        assert main(["status", "--target", wire.address, "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        told = json.loads(line)
        assert told["stats"]["num_steps"] == client.server_stats().num_steps
        assert told["info"]["models"][MODEL]["num_layers"] == 2


def test_watching_shows_what_happened_in_between(
    wire: Wire, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with oc.Client(wire.address) as client:
        session = client.open_session(MODEL)
        num_sleeps = iter((True, False))

        def sleep(seconds: float) -> None:
            assert seconds == 0.5
            if not next(num_sleeps):
                raise KeyboardInterrupt
            for _ in range(3):
                session.decode(0, *draw_step())

        monkeypatch.setattr(status_command, "time", SimpleNamespace(sleep=sleep))
        assert main(["status", "--target", wire.address, "--watch", "0.5", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["interval"]["is_since_start"]
    assert not second["interval"]["is_since_start"]
    assert second["stats"]["num_steps"] - first["stats"]["num_steps"] == 3
    assert second["interval"]["batch_sizes"] == {"1": 3}


def test_no_server_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = oc.Retry(max_attempts=1)
    monkeypatch.setattr(access, "Client", partial(oc.Client, retry=hasty))
    assert main(["status", "--target", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("octavo-server: no status of 127.0.0.1:1: ")


def test_status_proves_itself_by_the_flags_of_every_client(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    token = draw_token()
    tenants = {"tenants": [{"name": "a", "token_sha256": [hash_token(token).hex()]}]}
    (tmp_path / "tenants.yaml").write_text(json.dumps(tenants))
    (tmp_path / "token").write_text(token + "\n")
    with serving(tenants=str(tmp_path / "tenants.yaml")) as wire:
        assert main(["status", "--target", wire.address]) == 1
        assert "UNAUTHENTICATED" in capsys.readouterr().err
        flags = ["--token-file", str(tmp_path / "token")]
        assert main(["status", "--target", wire.address, *flags]) == 0
    assert main(["status", "--target", "example.org:1", *flags]) == 2
    assert "plain text" in capsys.readouterr().err


def test_status_has_the_flags_of_every_client() -> None:
    theirs = argparse.ArgumentParser()
    access.add_access_flags(theirs)
    ours = argparse.ArgumentParser()
    add_status(ours.add_subparsers())
    given = ours.parse_args(["status", "--target", "x"])
    assert vars(theirs.parse_args([])).items() <= vars(given).items()


@pytest.mark.parametrize("seconds", ["0", "x", "-1", "nan", "1e9"])
def test_what_is_no_interval_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", "--target", "x:1", "--watch", seconds])
    assert ended.value.code == 2
    assert "expected seconds from 0.1 to 86400" in capsys.readouterr().err
