"""What proves a client: TLS files, tokens and routes, and what it refuses to send."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest

import octavo_client as oc
from octavo_client._credentials import MAX_TOKEN_LEN, CallMetadata, channel_credentials, is_local
from octavo_client.access import NO_ACCESS, Access, access_of, add_access_flags

TOKEN = "octavo_abcdefghijklmnopqrstuvwxyz0123456789"

LOCAL = [
    *("localhost", "localhost:1", "127.0.0.1:1", "127.9.9.9", "[::1]:1", "[::1]", "::1"),
    *("dns:localhost:1", "dns:///localhost:1", "dns://8.8.8.8/127.0.0.1:1"),
    *("ipv4:127.0.0.1:1", "ipv6:[::1]:1", "ipv4:127.0.0.1:1,127.0.0.2:1"),
    *("unix:octavo.sock", "unix:///run/octavo.sock", "unix-abstract:octavo"),
]
REMOTE = [
    *("example.org", "example.org:1", "10.0.0.1:1", "[2001:db8::1]:1", "0.0.0.0:1", "[::]:1"),
    *("dns:///example.org:1", "ipv4:10.0.0.1:1", "ipv4:127.0.0.1:1,10.0.0.1:1"),
    *("localhost.example.org:1", "xds:///localhost", "", "dns:///localhost:1/x"),
    *("::1:5005", "ipv6:::1:5005"),  # without brackets all of it is the address
]


@pytest.mark.parametrize("target", LOCAL)
def test_this_machine_is_known(target: str) -> None:
    assert is_local(target)
    assert channel_credentials(target, None, TOKEN) is None


@pytest.mark.parametrize("target", REMOTE)
def test_a_token_does_not_leave_this_machine_in_plain_text(target: str) -> None:
    assert not is_local(target)
    assert channel_credentials(target, None, None) is None
    for token in (TOKEN, lambda: TOKEN, oc.Token(TOKEN)):
        with pytest.raises(ValueError, match="in plain text, for all on the way to read"):
            channel_credentials(target, None, token)
    assert channel_credentials(target, None, oc.Token(TOKEN, allow_plaintext=True)) is None
    assert channel_credentials(target, oc.Tls(), TOKEN) is not None


def test_both_clients_refuse() -> None:
    for client in (oc.Client, oc.AsyncClient):
        with pytest.raises(ValueError, match="in plain text"):
            client("example.org:1", token=TOKEN)


def test_metadata_has_token_and_route() -> None:
    assert CallMetadata(None, "r")() == (("octavo-route", "r"),)
    whole = (("octavo-route", "r"), ("authorization", f"Bearer {TOKEN}"))
    assert CallMetadata(TOKEN, "r")() == whole
    assert CallMetadata(oc.Token(TOKEN), "r")() == whole


def test_a_route_is_drawn_once_a_client() -> None:
    first, second = CallMetadata(None, None), CallMetadata(None, None)
    assert first() == first() != second()


def test_a_function_is_asked_for_every_call() -> None:
    tokens = iter(["a1", "b2"])
    metadata = CallMetadata(lambda: next(tokens), "r")
    assert [metadata()[1][1] for _ in range(2)] == ["Bearer a1", "Bearer b2"]
    with pytest.raises(StopIteration):
        metadata()


@pytest.mark.parametrize("token", ["", f"{TOKEN}\n", f" {TOKEN}", f"{TOKEN}é", "x" * 513, "a\0b"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_quoted(token: str) -> None:
    for source in (token, lambda: token):
        with pytest.raises(ValueError, match=f"token must be 1 to {MAX_TOKEN_LEN}") as refused:
            CallMetadata(source, None)()
        assert TOKEN not in str(refused.value)
    with pytest.raises(TypeError, match=r"token must be a str or a function .*, got bytes"):
        CallMetadata(TOKEN.encode, None)()  # type: ignore[arg-type]


@pytest.mark.parametrize("route", ["", "a b", "é", "x" * 129, "a\n", 7])
def test_a_route_that_cannot_be_sent_is_refused(route: Any) -> None:
    with pytest.raises(ValueError, match="route must be 1 to 128 visible ASCII characters"):
        CallMetadata(None, route)


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(oc.Token(TOKEN))


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    nowhere, empty = tmp_path / "nowhere.pem", tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ValueError, match=r"tls\.ca .*nowhere\.pem cannot be read: No such file"):
        oc.Client("localhost:1", tls=oc.Tls(ca=nowhere))
    with pytest.raises(ValueError, match=r"tls\.ca .*empty\.pem is no PEM file"):
        oc.AsyncClient("localhost:1", tls=oc.Tls(ca=empty))
    with pytest.raises(ValueError, match="tls has a cert and no key; give both or none"):
        oc.Tls(cert=empty)
    with pytest.raises(ValueError, match="tls has a key and no cert; give both or none"):
        oc.Tls(key=empty)


def flags(*arguments: str) -> Access:
    parser = argparse.ArgumentParser()
    add_access_flags(parser)
    return access_of(parser.parse_args(arguments))


def test_flags_name_files_and_hold_no_secret(tmp_path: Path) -> None:
    assert flags() == NO_ACCESS
    assert (NO_ACCESS.tls, NO_ACCESS.token) == (None, None)
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    access = flags(f"--token-file={path}", "--tls-ca=ca.pem", "--tls-cert=c.pem", "--tls-key=k.pem")
    assert access.tls == oc.Tls(Path("ca.pem"), Path("c.pem"), Path("k.pem"))
    assert TOKEN.encode() not in pickle.dumps(access)
    metadata = CallMetadata(access.token, "r")
    assert metadata()[1] == ("authorization", f"Bearer {TOKEN}")
    path.write_text("another")
    assert metadata()[1] == ("authorization", "Bearer another")


def test_flags_are_checked_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the token file .*nowhere cannot be read: .*No such"):
        flags(f"--token-file={tmp_path / 'nowhere'}").check("localhost:1")
    with pytest.raises(ValueError, match="in plain text"):
        flags(f"--token-file={__file__}").check("example.org:1")
    flags(f"--token-file={__file__}", "--allow-plaintext-token").check("example.org:1")
