"""TLS and mutual TLS on real connections: who is let in, and files that change while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import octavo_client as oc
from octavo.v1 import octavo_pb2 as pb
from octavo.v1.octavo_pb2_grpc import OctavoServiceStub
from octavo_server.backends.base import UnsupportedError
from octavo_server.tls import TlsFiles
from tests.rpc.certificates import Authority, Files, shown_certificate
from tests.rpc.checked_session import Checked, draw_prompt, draw_step
from tests.rpc.conftest import serving
from tests.rpc.wire import CALL_TIMEOUT_S, MODEL, Wire

ONCE = oc.Retry(max_attempts=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Files:
    return authority.issue(tmp_path / "server")


def decode_once(wire: Wire, tls: oc.Tls | None) -> None:
    """Open a session, append a prompt, decode a step, and check what comes back."""
    with (
        oc.Client(wire.address, retry=ONCE, tls=tls) as client,
        client.open_session(MODEL) as session,
    ):
        checked = Checked(session)
        session.append(*(prompt := draw_prompt(5)))
        checked.take_prompt(prompt)
        checked.check(0, step := draw_step(), session.decode(0, *step))
        checked.check(0, step := draw_step(), session.decode(0, *step))


def is_let_in(wire: Wire, tls: oc.Tls | None) -> bool:
    """Whether a new connection gets an answer."""
    with oc.Client(wire.address, retry=ONCE, tls=tls) as client:
        try:
            client.server_info()
        except oc.ConnectionLost:
            return False
        return True


def test_every_call_goes_over_tls(authority: Authority, files: Files) -> None:
    tls = oc.Tls(ca=authority.path)

    async def decode_async(target: str) -> None:
        async with (
            oc.AsyncClient(target, retry=ONCE, tls=tls) as client,
            await client.open_session(MODEL) as session,
        ):
            checked = Checked(session)
            await session.append(*(prompt := draw_prompt(5)))
            checked.take_prompt(prompt)
            checked.check(0, step := draw_step(), await session.decode(0, *step))

    with serving(**files.settings) as wire:
        decode_once(wire, tls)
        asyncio.run(decode_async(wire.address))


def test_plain_text_and_an_unknown_authority_get_nowhere(
    authority: Authority, files: Files, tmp_path: Path
) -> None:
    with serving(**files.settings) as wire:
        assert not is_let_in(wire, None)
        assert not is_let_in(wire, oc.Tls(ca=Authority(tmp_path, "other").path))
        assert is_let_in(wire, oc.Tls(ca=authority.path))


def test_certificate_must_be_for_the_name_that_was_asked(
    authority: Authority, tmp_path: Path
) -> None:
    files = authority.issue(tmp_path / "server", "octavo.internal")
    with serving(**files.settings) as wire:
        assert not is_let_in(wire, oc.Tls(ca=authority.path))
        assert is_let_in(wire, oc.Tls(ca=authority.path, server_name="octavo.internal"))


def test_mutual_tls_lets_in_clients_of_its_authority_alone(
    authority: Authority, files: Files, tmp_path: Path
) -> None:
    clients = Authority(tmp_path, "clients")
    theirs = clients.issue(tmp_path / "theirs", "orchestrator")
    stranger = authority.issue(tmp_path / "stranger", "orchestrator")
    ca = authority.path
    with serving(**files.settings, tls_client_ca=str(clients.path)) as wire:
        decode_once(wire, oc.Tls(ca, theirs.cert, theirs.key))
        assert not is_let_in(wire, oc.Tls(ca))
        assert not is_let_in(wire, oc.Tls(ca, stranger.cert, stranger.key))
        # The authorities of clients are followed as well.
        clients.path.write_bytes(authority.path.read_bytes())
        assert is_let_in(wire, oc.Tls(ca, stranger.cert, stranger.key))
        assert not is_let_in(wire, oc.Tls(ca, theirs.cert, theirs.key))


def swap_link(folder: Path, link: Path) -> None:
    """Lead a link to another folder, in one instant, as Kubernetes does with a secret that changed."""
    next_link = link.with_name("..data_tmp")
    next_link.symlink_to(folder)
    next_link.rename(link)


def test_new_files_are_taken_up_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    mounted, link = tmp_path / "mounted", tmp_path / "mounted" / "..data"
    mounted.mkdir()
    first = authority.issue(mounted / "..2026_1")
    second = authority.issue(mounted / "..2026_2")
    swap_link(mounted / "..2026_1", link)
    for name in ("tls.crt", "tls.key"):
        (mounted / name).symlink_to(Path("..data") / name)
    shown = Files(mounted)
    tls = oc.Tls(ca=authority.path)
    with serving(**shown.settings) as wire, oc.Client(wire.address, tls=tls) as old:
        old.server_info()
        assert shown_certificate(wire.address) == first.cert.read_text()
        swap_link(mounted / "..2026_2", link)
        assert shown_certificate(wire.address) == second.cert.read_text()
        third = authority.issue(mounted / "..2026_2")  # in place
        assert shown_certificate(wire.address) == third.cert.read_text()
        assert is_let_in(wire, tls)
        old.server_info()  # over the connection that it has


BREAK: dict[str, Callable[[Files, Files], object]] = {
    "a certificate that is half written": lambda files, _: files.cert.write_bytes(
        files.cert.read_bytes()[:-60]
    ),
    "a key that is half written": lambda files, _: files.key.write_bytes(
        files.key.read_bytes()[:100]
    ),
    "another certificate's key": lambda files, other: files.key.write_bytes(other.key.read_bytes()),
    "no key": lambda files, _: files.key.unlink(),
    "an empty certificate": lambda files, _: files.cert.write_bytes(b""),
    "no text": lambda files, _: files.cert.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("break_them", BREAK.values(), ids=BREAK)
def test_files_that_are_not_good_leave_the_old_ones_in_use(
    authority: Authority,
    files: Files,
    tmp_path: Path,
    break_them: Callable[[Files, Files], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tls = oc.Tls(ca=authority.path)
    good = files.cert.read_text()
    key = files.key.read_text().splitlines()[1]
    with serving(**files.settings) as wire, caplog.at_level(logging.INFO):
        break_them(files, authority.issue(tmp_path / "other"))
        for _ in range(2):
            assert shown_certificate(wire.address) == good
        assert is_let_in(wire, tls)
        (record,) = [r for r in caplog.records if r.name == "octavo_server.tls"]
        assert record.levelno == logging.ERROR
        assert "the credentials from before stay in use" in record.getMessage()
        assert key not in caplog.text
        renewed = authority.issue(tmp_path / "server")
        assert shown_certificate(wire.address) == renewed.cert.read_text()


@pytest.mark.parametrize("break_them", BREAK.values(), ids=BREAK)
def test_files_that_are_not_good_at_the_start_are_refused(
    authority: Authority,
    files: Files,
    tmp_path: Path,
    break_them: Callable[[Files, Files], object],
) -> None:
    key = files.key.read_text().splitlines()[1]
    break_them(files, authority.issue(tmp_path / "other"))
    with pytest.raises(UnsupportedError, match=r"^TLS: tls_(cert|key) .*; expected ") as refused:
        TlsFiles(files.cert, files.key).credentials()
    assert str(tmp_path) in str(refused.value)
    assert key not in str(refused.value)


def test_key_with_a_passphrase_is_refused_by_name(files: Files) -> None:
    from cryptography.hazmat.primitives import serialization as pem  # noqa: PLC0415

    key = pem.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            pem.Encoding.PEM,
            pem.PrivateFormat.PKCS8,
            pem.BestAvailableEncryption(b"x"),
        )
    )
    with pytest.raises(UnsupportedError, match="needs a passphrase; expected a key without one"):
        TlsFiles(files.cert, files.key).credentials()


def test_authorities_that_are_not_there_are_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tls_client_ca .*nowhere\.pem cannot be read: No"):
        TlsFiles(files.cert, files.key, tmp_path / "nowhere.pem").credentials()
    with pytest.raises(UnsupportedError, match=r"tls_client_ca .* holds no whole certificates"):
        TlsFiles(files.cert, files.key, files.key).credentials()


def test_health_port_answers_health_alone_in_plain_text(files: Files, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("tenants: []")
    with serving(**files.settings, tenants=str(tenants), health_address="127.0.0.1:0") as wire:
        channel = grpc.insecure_channel(f"127.0.0.1:{wire.server.health_port}")
        with channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="ready")
            response = health.Check(request, timeout=CALL_TIMEOUT_S)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(request, timeout=CALL_TIMEOUT_S)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            stub: Any = OctavoServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as refused:
                stub.ServerInfo(pb.ServerInfoRequest(), timeout=CALL_TIMEOUT_S)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            wire.server._set_unready()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
