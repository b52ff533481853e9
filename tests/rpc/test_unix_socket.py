"""A server that listens on a Unix socket, beside its port and alone."""

from __future__ import annotations

import asyncio
import re
import socket
import stat
from pathlib import Path

import pytest

import octavo_client as oc
from octavo_server.backends.base import UnsupportedError
from octavo_server.config_keys import NO_HOST
from octavo_server.unix_socket import MAX_PATH_BYTES
from tests.rpc.checked_session import Checked, draw_step
from tests.rpc.conftest import serving
from tests.rpc.wire import MODEL

ONCE = oc.Retry(max_attempts=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the socket is to be."""
    return tmp_path / "octavo.sock"


def test_a_client_decodes_over_it(path: Path) -> None:
    with serving(unix_socket=str(path)) as wire, oc.Client(f"unix:{path}") as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with client.open_session(MODEL) as session:
            checked, tensors = Checked(session), draw_step(3)
            checked.check(0, tensors, session.decode(0, *tensors))
        with oc.Client(wire.address) as over_tcp:
            assert over_tcp.server_info().incarnation == client.server_info().incarnation
    assert not path.exists()


async def decode_one(target: str) -> tuple[int, ...]:
    async with oc.AsyncClient(target) as client, await client.open_session(MODEL) as session:
        await session.decode(0, *draw_step(2))
        return session.lengths


def test_it_can_be_all_that_a_server_listens_on(path: Path) -> None:
    with serving(unix_socket=str(path), host=NO_HOST) as wire:
        assert wire.server.port == 0
        assert asyncio.run(decode_one(f"unix:{path}")) == (2, 0)


def test_a_socket_that_nobody_listens_on_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with serving(unix_socket=str(path)), oc.Client(f"unix:{path}") as client:
        assert client.server_info().models


def test_a_served_socket_is_left_alone(path: Path) -> None:
    with serving(unix_socket=str(path)), oc.Client(f"unix:{path}") as client:
        expected = f"cannot listen on unix:{re.escape(str(path))}: another server listens there"
        with pytest.raises(UnsupportedError, match=expected), serving(unix_socket=str(path)):
            pass
        assert client.server_info().models


def test_a_file_of_another_kind_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with (
        pytest.raises(UnsupportedError, match="file of another kind"),
        serving(unix_socket=str(path)),
    ):
        pass
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * MAX_PATH_BYTES, f"a path may have {MAX_PATH_BYTES} bytes"),
        ("nowhere/octavo.sock", "its folder must be there"),
    ],
)
def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why), serving(unix_socket=str(tmp_path / name)):
        pass


def test_errors_name_the_socket(path: Path) -> None:
    with serving(unix_socket=str(path)), oc.Client(f"unix:{path}", retry=ONCE) as client:
        session = client.open_session(MODEL)
        session.decode(0, *draw_step(1))
    with oc.Client(f"unix:{path}", retry=ONCE) as client, pytest.raises(oc.ConnectionLost) as lost:
        client.server_info()
    assert str(path) in str(lost.value)
