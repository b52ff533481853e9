"""How a client proves itself and is led to its server: TLS, a token, a route. Costs nothing per step."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import grpc

from octavo_client._tracing import trace_metadata

ROUTE_KEY = "octavo-route"
_AUTHORIZATION_KEY = "authorization"

MAX_TOKEN_LEN = 512
MAX_ROUTE_LEN = 128

# What a bearer token may be, RFC 6750, section 2.1; and visible ASCII.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_ROUTE = re.compile(r"[!-~]+")
_LOCAL_SCHEMES = ("unix:", "unix-abstract:")
_SCHEME = re.compile(r"(dns|ipv4|ipv6):(//[^/]*/)?")

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """Encrypt, and check who the server is; with `cert` and `key` also prove who the client is (mutual TLS).

    The files are read when the client is made: files that changed since take another client.

    Attributes:
        ca: PEM file of the authorities that may vouch for the server; None = those that gRPC comes with.
        cert: PEM file of the client's certificate, followed by those between it and its authority.
        key: PEM file of its private key, without a passphrase.
        server_name: The name that the server's certificate must be for, where it is not the target's.
    """

    ca: str | PathLike[str] | None = None
    cert: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise ValueError(f"tls has a {given} and no {missing}; give both or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """Return a channel's credentials.

        Raises:
            ValueError: A file cannot be read, or is no PEM.
        """
        return grpc.ssl_channel_credentials(
            _read_pem("ca", self.ca), _read_pem("key", self.key), _read_pem("cert", self.cert)
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A token with its rules, where the plain token will not do.

    Attributes:
        source: The token, or what returns it, asked for every call and for every stream.
        allow_plaintext: Whether it may go to another machine without TLS, where whoever is on the way can read it: only
            where something below encrypts, such as a mesh or a tunnel.
    """

    source: str | Callable[[], str] = field(repr=False)
    allow_plaintext: bool = False


TokenSource = str | Callable[[], str] | Token


class CallMetadata:
    """The metadata of a client's calls, the span of whoever calls among it; made for each call and each stream.

    Args:
        token: As the client's.
        route: As the client's.

    Raises:
        ValueError, TypeError: One of them cannot be sent.
    """

    def __init__(self, token: TokenSource | None, route: str | None) -> None:
        source = token.source if isinstance(token, Token) else token
        if route is not None and not (
            isinstance(route, str) and len(route) <= MAX_ROUTE_LEN and _ROUTE.fullmatch(route)
        ):
            raise ValueError(
                f"route must be 1 to {MAX_ROUTE_LEN} visible ASCII characters, got {route!r}"
            )
        self._source = source if callable(source) else None
        self._fixed: Metadata = ((ROUTE_KEY, route or secrets.token_hex(16)),)
        if source is not None and self._source is None:
            self._fixed += (_authorization(source),)

    def __call__(self) -> Metadata:
        """Return the metadata of the next call.

        Raises:
            ValueError, TypeError: The token cannot be sent. What the caller's own function raises passes.
        """
        metadata = self._fixed + trace_metadata()
        return metadata if self._source is None else (*metadata, _authorization(self._source()))


def channel_credentials(
    target: str, tls: Tls | None, token: TokenSource | None
) -> grpc.ChannelCredentials | None:
    """Return the credentials of a channel; None = plain text.

    Raises:
        ValueError: A file of `tls` cannot be used, or the token would go to another machine in plain text.
    """
    if tls is not None:
        return tls.credentials()
    may_be_read = token is not None and not is_local(target)
    if may_be_read and not (isinstance(token, Token) and token.allow_plaintext):
        raise ValueError(
            f"a token would go to {target} in plain text, for all on the way to read: give tls=Tls(...), "
            "or token=Token(..., allow_plaintext=True) where something below encrypts"
        )
    return None


def is_local(target: str) -> bool:
    """Whether a target is on this machine for certain: a Unix socket, loopback addresses, or localhost."""
    if target.startswith(_LOCAL_SCHEMES):
        return True
    addresses = _SCHEME.sub("", target, count=1).split(",")
    return all(_is_loopback(address) for address in addresses)


def _is_loopback(address: str) -> bool:
    bracketed = re.fullmatch(r"\[([^\]]*)\](:\d+)?", address)
    # More than one colon without brackets is an address of IPv6, and has no port: gRPC reads it so too.
    has_port = address.count(":") == 1
    host = bracketed[1] if bracketed else re.sub(r":\w+$", "", address) if has_port else address
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _authorization(token: object) -> tuple[str, str]:
    # The text of no error quotes the token: errors are logged.
    if not isinstance(token, str):
        raise TypeError(
            f"token must be a str or a function that returns one, got {type(token).__name__}"
        )
    if len(token) > MAX_TOKEN_LEN or not _TOKEN.fullmatch(token):
        raise ValueError(
            f"token must be 1 to {MAX_TOKEN_LEN} letters, digits and -._~+/, got {len(token)} characters that are "
            "not; does it end with a line break?"
        )
    return _AUTHORIZATION_KEY, f"Bearer {token}"


def _read_pem(name: str, path: str | PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        pem = Path(path).read_bytes()
    except OSError as error:
        text = f"tls.{name} {path} cannot be read: {error.strerror}; expected a PEM file"
        raise ValueError(text) from error
    if b"-----BEGIN " not in pem:
        raise ValueError(f"tls.{name} {path} is no PEM file; expected -----BEGIN ... in it")
    return pem
