"""The server's side of TLS: credentials from PEM files, read again at every handshake.

Comparing what the files hold, rather than when they were written, finds every change: files written in place, files
renamed over others, and the symbolic link over a whole folder that Kubernetes swaps when a secret changes.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from octavo_server.backends.base import UnsupportedError

log = logging.getLogger(__name__)

MAX_READS = 5
"""Times that the files are read until two reads agree: between two of them a swap of all three may have come."""


class _Pems(NamedTuple):
    """What the files hold. Never logged: one of them is the private key."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


class TlsFiles:
    """A server's certificate, its key and, for mutual TLS, the authorities of its clients' certificates.

    Files that change are taken up at the next handshake, without a restart; connections that are there stay. New files
    that are not good leave the old credentials in place, and are logged once.

    Args:
        cert: PEM file of the server's certificate, followed by those between it and its authority.
        key: PEM file of its private key, without a passphrase.
        client_ca: PEM file of the authorities of clients; None = clients need no certificate.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._lock = threading.Lock()
        self._seen: _Pems | None = None
        self._complaint = ""

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files.

        Raises:
            UnsupportedError: The files cannot be used as they are now; the text says which, and why.
        """
        try:
            pems = self._read()
            self._check(pems)
        except ValueError as error:
            raise UnsupportedError(f"TLS: {error}") from None
        self._seen = pems
        fetch: Any = self._fetch  # the stubs forget that it may return None
        return grpc.dynamic_ssl_server_credentials(
            _configuration(pems), fetch, require_client_authentication=bool(self._client_ca)
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what is new at a handshake; None to go on with what there is."""
        with self._lock:
            try:
                pems = self._read()
                if pems == self._seen:
                    return None
                # Also when they are not good: they are looked at again when they change again.
                self._seen = pems
                self._check(pems)
            except ValueError as error:
                self._complain(str(error))
                return None
            self._complaint = ""
            log.info("TLS: took up the new files %s and %s", self._cert, self._key)
            return _configuration(pems)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            log.error("TLS: %s; the credentials from before stay in use", complaint)
        self._complaint = complaint

    def _read(self) -> _Pems:
        """Read all files as they are together."""
        pems = self._read_once()
        for _ in range(MAX_READS if pems != self._seen else 0):
            before, pems = pems, self._read_once()
            if pems == before:
                break
        return pems

    def _read_once(self) -> _Pems:
        client_ca = _read("tls_client_ca", self._client_ca) if self._client_ca else None
        return _Pems(_read("tls_cert", self._cert), _read("tls_key", self._key), client_ca)

    def _check(self, pems: _Pems) -> None:
        _check_certificates("tls_cert", self._cert, pems.cert)
        self._check_key(pems)
        if self._client_ca and pems.client_ca is not None:
            _check_certificates("tls_client_ca", self._client_ca, pems.client_ca)

    def _check_key(self, pems: _Pems) -> None:
        wants_passphrase = False

        def passphrase() -> str:
            nonlocal wants_passphrase
            wants_passphrase = True
            return ""

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            with _in_memory(pems.cert) as cert_path, _in_memory(pems.key) as key_path:
                context.load_cert_chain(cert_path, key_path, passphrase)
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None)
            if wants_passphrase:
                why = "needs a passphrase; expected a key without one"
            elif reason == "KEY_VALUES_MISMATCH":
                why = (
                    f"is not the key of tls_cert {self._cert}; expected the two to belong together"
                )
            else:
                why = "is no private key in PEM; expected -----BEGIN PRIVATE KEY----- and so on"
            raise ValueError(f"tls_key {self._key} {why}") from None


def _configuration(pems: _Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(pems.key, pems.cert)], root_certificates=pems.client_ca
    )


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = f"cannot be read: {error.strerror}; expected a PEM file"
        raise ValueError(f"{name} {path} {why}") from None


def _check_certificates(name: str, path: Path, pem: bytes) -> None:
    # A file cut off between two certificates looks whole; one cut off within does not.
    is_whole = pem.count(b"-----BEGIN ") == pem.count(b"-----END ") > 0
    try:
        if is_whole:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=pem.decode("ascii"))
            return
    except (ssl.SSLError, ValueError):
        pass
    why = "holds no whole certificates in PEM; expected -----BEGIN CERTIFICATE----- and so on"
    raise ValueError(f"{name} {path} {why}")


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """Yield the path of a file that is in memory alone, for OpenSSL reads these only from files."""
    fd = os.memfd_create("octavo-tls")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
