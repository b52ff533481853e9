"""Certificates of the tests' own authorities, and the files that hold them."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import trustme

NAMES = ("localhost", "127.0.0.1")


class Authority:
    """An authority whose certificate is a file; it issues certificates into folders."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._authority = trustme.CA(organization_name=name)
        self.path = folder / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.path))

    def issue(self, folder: Path, *names: str) -> Files:
        """Write a certificate for names, and its key, into a folder, over those that were there."""
        folder.mkdir(exist_ok=True)
        files = Files(folder)
        issued = self._authority.issue_cert(*(names or NAMES))
        files.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        files.key.write_bytes(issued.private_key_pem.bytes())
        return files


class Files:
    """A certificate and its key."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"

    @property
    def settings(self) -> dict[str, Any]:
        """What the server's config says of them."""
        return {"tls_cert": str(self.cert), "tls_key": str(self.key)}


def shown_certificate(address: str) -> str:
    """Return the certificate, in PEM, that a server shows in a handshake; who signed it is not asked."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        der = wrapped.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der)
