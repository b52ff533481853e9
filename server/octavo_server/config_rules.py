"""Rules that join several keys of the server: what goes together, and what plain text may be spoken on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from octavo_server.config_keys import NO_HOST, ServerConfig

Mistake = tuple[str, str]
"""The key that a mistake is shown at, and what is wrong."""

_MONITORING = ("metrics_address", "health_address")


def server_mistakes(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield the mistakes of the server's keys together, as far as they were given and well.

    Args:
        values: By key.
    """
    if values.get("host") == NO_HOST and not values.get("unix_socket"):
        yield "host", f"got {NO_HOST!r} without a unix_socket; expected an address"
    yield from _tls_mistakes(values)
    host = values.get("host", NO_HOST)
    if _is_exposed(host) and not (values.get("tls_cert") or values.get("allow_plaintext")):
        yield (
            "host",
            f"got {host!r}, which is not loopback, without TLS; expected tls_cert and tls_key, or "
            "allow_plaintext on a network that nobody else can reach",
        )
    for name in _MONITORING:
        address = values.get(name, "")
        if _is_address_exposed(address) and not values.get("allow_plaintext_monitoring"):
            yield (
                name,
                f"got {address!r}, which is not loopback; it is answered in plain text and without a token: "
                "expected allow_plaintext_monitoring beside it, or a loopback address",
            )


def plaintext_warnings(config: ServerConfig) -> Iterator[str]:
    """Yield what a server should say of the plain text that it was allowed to speak."""
    if _is_exposed(config.host) and not config.tls_cert:
        what = "tokens, queries, keys and values" if config.tenants else "queries, keys and values"
        yield (
            f"{config.host} is served in plain text (allow_plaintext): whoever is on the way can read and change "
            f"{what}; set tls_cert and tls_key"
        )
    for name in _MONITORING:
        address = getattr(config, name)
        if _is_address_exposed(address):
            yield f"{name} {address} answers whoever can reach it (allow_plaintext_monitoring)"


def is_loopback(host: str) -> bool:
    """Whether a host to listen on is reached from this machine alone; a name other than localhost may not be."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        return bare == "localhost" or ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """Return the host of "host:port"."""
    return address.rpartition(":")[0]


def _is_exposed(host: str) -> bool:
    return host != NO_HOST and not is_loopback(host)


def _is_address_exposed(address: str) -> bool:
    # Here `none` is a name like any other.
    return bool(address) and not is_loopback(host_of(address))


def _tls_mistakes(values: Mapping[str, Any]) -> Iterator[Mistake]:
    given = [name for name in ("tls_cert", "tls_key", "tls_client_ca") if values.get(name)]
    missing = {"tls_cert", "tls_key"} - set(given)
    for name in sorted(missing if given else ()):
        yield given[0], f"given without {name}; expected the two together, and {name} is missing"
