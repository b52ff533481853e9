"""Sessions exported and imported by the clients, also over a connection that breaks."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

import octavo_client as oc
from tests.rpc.checked_session import Checked, draw_prompt, draw_step
from tests.rpc.cutting_proxy import CuttingProxy, cutting_proxy
from tests.rpc.wire import MODEL, Wire

QUICK = oc.Retry(max_attempts=20, initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture
def client(wire: Wire) -> Iterator[oc.Client]:
    with oc.Client(wire.address, retry=QUICK) as client:
        yield client


@pytest.fixture
def proxy(wire: Wire) -> Iterator[CuttingProxy]:
    with cutting_proxy(wire.address) as proxy:
        yield proxy


@pytest.fixture
def shaky(proxy: CuttingProxy) -> Iterator[oc.Client]:
    with oc.Client(proxy.target, retry=QUICK) as client:
        yield client


def filled(client: oc.Client, num_tokens: int = 40, **options: Any) -> Checked:
    """Open a session with tokens in it."""
    checked = Checked(client.open_session(MODEL, **options))
    prompt = draw_prompt(num_tokens)
    cast(oc.Session, checked.session).append(*prompt)
    checked.take_prompt(prompt)
    return checked


def go_on(session: oc.Session, like: Checked) -> None:
    """Decode with a copy of a session, and check it."""
    copy = Checked(session)
    copy.layers = deepcopy(like.layers)
    assert session.lengths == like.lengths
    tensors = draw_step()
    copy.check(1, tensors, session.decode(1, *tensors))


def test_a_session_goes_to_a_path_and_comes_back(client: oc.Client, tmp_path: Path) -> None:
    checked = filled(client, lease_s=99.0, on_disconnect="close")
    session = cast(oc.Session, checked.session)
    told: list[tuple[int, int]] = []
    path = tmp_path / "session.safetensors"
    num_bytes = session.export_to(path, progress=lambda *sizes: told.append(sizes))
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size == num_bytes
    assert told[-1] == (num_bytes, num_bytes)
    assert {total for _, total in told} == {num_bytes}
    told.clear()
    copy = client.import_session(str(path), progress=lambda *sizes: told.append(sizes))
    assert told[-1] == (num_bytes, num_bytes)
    go_on(copy, checked)
    state = client.get_session(copy.session_id)
    assert (state.lease_s, state.on_disconnect) == (99.0, "close")
    other = client.import_session(path, lease_s=5.0, on_disconnect="keep", reserve_tokens=60)
    state = client.get_session(other.session_id)
    assert (state.lease_s, state.on_disconnect, state.num_blocks) == (5.0, "keep", 4)


def test_a_session_goes_through_open_files(client: oc.Client) -> None:
    checked = filled(client)
    file = io.BytesIO(b"before")
    file.seek(6)
    num_bytes = client.export_session(checked.session.session_id, file)
    assert file.tell() == 6 + num_bytes
    file.seek(6)
    go_on(client.import_session(file, model=MODEL), checked)


def test_what_is_refused_leaves_nothing(client: oc.Client, tmp_path: Path) -> None:
    with pytest.raises(oc.SessionNotFound):
        client.export_session("nobody", tmp_path / "session")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(oc.SnapshotInvalid, match="cut off") as refused:
        client.import_session(io.BytesIO(b""))
    assert "cut off" in refused.value.cause
    with pytest.raises(FileNotFoundError):
        client.import_session(tmp_path / "session")
    assert client.list_sessions() == []


def test_a_file_that_cannot_be_read_is_what_is_raised(client: oc.Client) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        client.import_session(Broken())


def test_an_import_begins_again_after_the_connection_broke(
    client: oc.Client, proxy: CuttingProxy, shaky: oc.Client, tmp_path: Path
) -> None:
    checked = filled(client, 60)
    path = tmp_path / "session"
    client.export_session(checked.session.session_id, path)
    shaky.server_info()
    proxy.cut_after_bytes, proxy.num_cuts_left = 2000, 2
    copy = shaky.import_session(path)
    assert proxy.num_cuts_left == 0
    go_on(copy, checked)
    assert len(client.list_sessions()) == 2


def test_an_import_whose_answer_was_lost_opens_one_session(
    client: oc.Client, proxy: CuttingProxy, shaky: oc.Client, tmp_path: Path
) -> None:
    checked = filled(client)
    path = tmp_path / "session"
    client.export_session(checked.session.session_id, path)
    shaky.server_info()

    class Watched(io.FileIO):
        """Cuts the connection once the server has opened the session, of which nobody is told."""

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size) or b""
            if not data and proxy.num_connections == 1:
                proxy.drop_answers()
            return data

    with Watched(path) as file:
        copy = asyncio.run(cut_once_imported(client, proxy, shaky, file))
    go_on(copy, checked)
    assert len(client.list_sessions()) == 2


async def cut_once_imported(
    client: oc.Client, proxy: CuttingProxy, shaky: oc.Client, file: Any
) -> oc.Session:
    """Import over a connection that is cut when the server has the session."""
    importing = asyncio.create_task(asyncio.to_thread(shaky.import_session, file))
    while len(await asyncio.to_thread(client.list_sessions)) < 2:
        await asyncio.sleep(0.005)
    proxy.cut()
    return await importing


def test_an_export_begins_again_where_it_can(
    client: oc.Client, proxy: CuttingProxy, shaky: oc.Client, tmp_path: Path
) -> None:
    checked = filled(client, 60)
    session_id = checked.session.session_id
    shaky.server_info()

    class Cutting(io.BytesIO):
        """Cuts the connection at the first bytes, once."""

        num_cuts = 0

        def write(self, data: Any, /) -> int:
            if not self.num_cuts:
                self.num_cuts += 1
                proxy.cut()
            return super().write(data)

    file = Cutting()
    shaky.export_session(session_id, file)
    assert file.num_cuts == 1
    go_on(client.import_session(io.BytesIO(file.getvalue())), checked)


def test_the_asyncio_client_does_the_same(wire: Wire, tmp_path: Path) -> None:
    async def run() -> None:
        async with oc.AsyncClient(wire.address, retry=QUICK) as client:
            session = await client.open_session(MODEL)
            checked = Checked(session)
            prompt = draw_prompt(40)
            await session.append(*prompt)
            checked.take_prompt(prompt)
            path = tmp_path / "session"
            told: list[tuple[int, int]] = []
            num_bytes = await session.export_to(path, progress=lambda *sizes: told.append(sizes))
            assert told[-1] == (num_bytes, path.stat().st_size)
            with path.open("rb") as file:
                copy = await client.import_session(cast(BinaryIO, file), lease_s=5.0)
            checked.session = copy
            tensors = draw_step()
            checked.check(0, tensors, await copy.decode(0, *tensors))
            assert (await client.get_session(copy.session_id)).lease_s == 5.0
            with pytest.raises(oc.SnapshotInvalid):
                await client.import_session(io.BytesIO(b"garbage"))

    asyncio.run(run())
