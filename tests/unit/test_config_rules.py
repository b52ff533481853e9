"""Plain text and TLS: what the configuration allows, and what it warns of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from octavo_server.config import ConfigError, load_config
from octavo_server.config_rules import is_loopback, plaintext_warnings

TINY = "name=tiny,num_layers=1,num_q_heads=1,num_kv_heads=1,head_dim=8,max_context=8,num_blocks=1"
TLS = {"tls_cert": "cert.pem", "tls_key": "key.pem"}


def mistakes_of(**flags: str) -> list[str]:
    try:
        load_config(None, flags, [TINY])
    except ConfigError as error:
        return list(error.mistakes)
    return []


def warnings_of(**flags: str) -> list[str]:
    return list(plaintext_warnings(load_config(None, flags, [TINY])))


LOCAL = ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"]
EXPOSED = ["0.0.0.0", "::", "[::]", "10.0.0.1", "192.168.0.9", "example.org", "::ffff:8.8.8.8"]
# Not known to be loopback without asking the resolver, so not taken for it.
DOUBTFUL = ["127.1", "2130706433", "localhost.example.org", "dns:///127.0.0.1", "unix:/x"]


@pytest.mark.parametrize("host", LOCAL)
def test_loopback_needs_nothing_and_warns_of_nothing(host: str) -> None:
    assert is_loopback(host)
    assert mistakes_of(host=host) == []
    assert warnings_of(host=host) == []


@pytest.mark.parametrize("host", EXPOSED + DOUBTFUL)
def test_any_other_host_needs_tls_or_the_flag_and_the_flag_warns(host: str) -> None:
    (mistake,) = mistakes_of(host=host)
    assert mistake.startswith(f"--host: got {host!r}, which is not loopback, without TLS")
    assert warnings_of(host=host, **TLS) == []
    (warning,) = warnings_of(host=host, allow_plaintext="true")
    assert "can read and change queries, keys and values" in warning


def test_warning_names_tokens_where_there_are_some() -> None:
    (warning,) = warnings_of(host="0.0.0.0", allow_plaintext="true", tenants="tenants.yaml")
    assert "change tokens, " in warning


def test_unix_socket_alone_needs_nothing() -> None:
    assert mistakes_of(host="none", unix_socket="octavo.sock") == []
    assert warnings_of(host="none", unix_socket="octavo.sock") == []


@pytest.mark.parametrize("key", ["metrics_address", "health_address"])
def test_monitoring_off_loopback_needs_its_own_flag(key: str) -> None:
    for address in ("127.0.0.1:0", "[::1]:9", "localhost:80"):
        assert mistakes_of(**{key: address}) == []
    for address in ("0.0.0.0:9464", "[::]:0", "example.org:1", "none:9464"):
        exposed = {key: address}
        (mistake,) = mistakes_of(**exposed, allow_plaintext="true", **TLS)
        assert re.match(rf"--{key.replace('_', '-')}: got '.*', which is not", mistake)
        (warning,) = warnings_of(**exposed, allow_plaintext_monitoring="true")
        assert warning.startswith(f"{key} {address} answers whoever can reach it")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["tls_cert"], ["tls_key"]),
        (["tls_key"], ["tls_cert"]),
        (["tls_client_ca"], ["tls_cert", "tls_key"]),
        (["tls_cert", "tls_client_ca"], ["tls_key"]),
    ],
)
def test_tls_files_come_together(given: list[str], missing: list[str]) -> None:
    mistakes = mistakes_of(**{name: f"{name}.pem" for name in given})
    assert len(mistakes) == len(missing)
    for mistake, name in zip(mistakes, missing, strict=True):
        assert f"{given[0].replace('_', '-')}: given without {name}; expected the two" in mistake


def test_mistake_is_shown_where_its_key_stands(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("port: 1\nhost: 0.0.0.0\n")
    with pytest.raises(ConfigError) as refused:
        load_config(path, {}, [TINY])
    (mistake,) = refused.value.mistakes
    assert mistake.startswith(f"{path}:2: host: got '0.0.0.0'")
    assert load_config(path, {"host": "::1"}, [TINY]).host == "::1"
