"""Who is who: mutual TLS for all, and three tenants."""

from __future__ import annotations

from pathlib import Path

from octavo_client.access import Access as Files
from tests.chaos.access import Access
from tests.chaos.form import BLOCK_SIZE, Form
from tests.rpc.certificates import Authority
from tests.rpc.tenants import TenantsFile

CLIENTS = "clients"
RIVAL = "rival"
"""Tries the sessions of the clients."""

HOSTILE = "hostile"
"""Sends anything; limits keep it from taking the pool."""

_MAX_HOSTILE_SESSIONS = 20
_SHARE_OF_HOSTILE_TOKENS = 8


class Identity:
    """Certificates and tokens of a run.

    Args:
        folder: Where their files go.
        form: Of the run.
    """

    def __init__(self, folder: Path, form: Form) -> None:
        authority = Authority(folder)
        self._ca = authority.path
        self._server = authority.issue(folder / "server")
        self._client = authority.issue(folder / "client", "client")
        self._tenants = TenantsFile(folder / "tenants.yaml")
        num_tokens = form.num_blocks * BLOCK_SIZE // _SHARE_OF_HOSTILE_TOKENS
        tokens = {
            CLIENTS: self._tenants.add(CLIENTS),
            RIVAL: self._tenants.add(RIVAL),
            HOSTILE: self._tenants.add(
                HOSTILE, max_sessions=_MAX_HOSTILE_SESSIONS, max_tokens=num_tokens
            ),
        }
        self._token_files = {name: folder / f"{name}.token" for name in tokens}
        for name, token in tokens.items():
            self._token_files[name].write_text(token)

    @property
    def flags(self) -> list[str]:
        """Of `octavo-server serve`."""
        values = {
            "tls-cert": self._server.cert,
            "tls-key": self._server.key,
            "tls-client-ca": self._ca,
            "tenants": self._tenants.path,
        }
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    def access(self, tenant: str, target: str) -> Access:
        """Return a tenant's way to a target."""
        files = Files(self._ca, self._client.cert, self._client.key, self._token_files[tenant])
        return Access(target, files)
