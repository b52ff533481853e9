"""How a command line says what proves it to a server: flags, and what a client makes of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo_client._credentials import Tls, Token, channel_credentials
from octavo_client._sync import Client

__all__ = ["NO_ACCESS", "Access", "Endpoint", "access_of", "add_access_flags"]


@dataclass(frozen=True, slots=True)
class Access:
    """The files that prove a client to its server. Holds paths alone, so it can be pickled and printed.

    Attributes:
        tls_ca: PEM file of the server's authorities.
        tls_cert: PEM file of the client's certificate.
        tls_key: PEM file of its key.
        token_file: File with the token, read for every call.
        allow_plaintext_token: Whether the token may go to another machine in plain text.
    """

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    allow_plaintext_token: bool = False

    @property
    def tls(self) -> Tls | None:
        """The TLS of a client; None = plain text."""
        paths = (self.tls_ca, self.tls_cert, self.tls_key)
        return Tls(*paths) if any(paths) else None

    @property
    def token(self) -> Token | None:
        """The token of a client; None = none."""
        if self.token_file is None:
            return None
        return Token(self.read_token, self.allow_plaintext_token)

    def read_token(self) -> str:
        """Return the token that the file holds now, without the line break behind it.

        Raises:
            OSError: The file cannot be read.
        """
        assert self.token_file is not None, "asked where there is a file"
        return self.token_file.read_text(encoding="utf-8").strip()

    def check(self, target: str) -> None:
        """Check that a client of a target can be made with it.

        Raises:
            ValueError: It cannot; the text names the file, and what to do.
        """
        channel_credentials(target, self.tls, self.token)
        if self.token_file is not None:
            try:
                self.read_token()
            except (OSError, UnicodeDecodeError) as error:
                text = f"the token file {self.token_file} cannot be read: {error}"
                raise ValueError(text) from error


NO_ACCESS = Access()
"""Plain text, and no token."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and what proves a client to it."""

    target: str
    access: Access = NO_ACCESS

    def client(self, **options: Any) -> Client:
        """Return a client of it, with more options of its own."""
        return Client(self.target, tls=self.access.tls, token=self.access.token, **options)


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags that `access_of` reads."""
    group = parser.add_argument_group("access to the server named by --target")
    add = group.add_argument
    add("--tls-ca", type=Path, metavar="FILE", help="TLS: PEM of the server's authorities")
    add(
        "--tls-cert", type=Path, metavar="FILE", help="mutual TLS: PEM of this client's certificate"
    )
    add("--tls-key", type=Path, metavar="FILE", help="mutual TLS: PEM of its private key")
    add("--token-file", type=Path, metavar="FILE", help="file with the tenant's token")
    add(
        "--allow-plaintext-token",
        action="store_true",
        help="send the token without TLS to another machine, where something below encrypts",
    )


def access_of(args: argparse.Namespace) -> Access:
    """Return what the flags of `add_access_flags` say."""
    return Access(
        args.tls_ca, args.tls_cert, args.tls_key, args.token_file, args.allow_plaintext_token
    )
