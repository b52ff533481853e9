"""A file of tenants that tests write and change, and the tokens that are in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo_server import auth
from octavo_server.tokens import draw_token, hash_token


class TenantsFile:
    """A file of tenants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokens: dict[str, list[str]] = {}
        self._limits: dict[str, dict[str, int]] = {}

    def add(self, name: str, **limits: int) -> str:
        """Give a tenant, who may be new, one more token; returns it."""
        token = draw_token()
        self._tokens.setdefault(name, []).append(token)
        self._limits.setdefault(name, {}).update(limits)
        self.write()
        return token

    def remove(self, token: str) -> None:
        """Take a token out of the file."""
        for tokens in self._tokens.values():
            if token in tokens:
                tokens.remove(token)
        self.write()

    def write(self) -> None:
        """Write the file as it is meant to be, in place."""
        lines = ["tenants:" if self._tokens else "tenants: []"]
        for name, tokens in self._tokens.items():
            hashes = ", ".join(hash_token(token).hex() for token in tokens)
            lines += [f"  - name: {name}", f"    token_sha256: [{hashes}]"]
            lines += [f"    {key}: {value}" for key, value in self._limits[name].items()]
        self.path.write_text("\n".join(lines) + "\n")

    @property
    def settings(self) -> dict[str, Any]:
        """What the server's config says of it."""
        return {"tenants": str(self.path)}


def authorization(token: str) -> tuple[tuple[str, str]]:
    """Return the metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers look at their files of tenants more often than tests can tell."""
    monkeypatch.setattr(auth, "LOOK_S", 0.02)
