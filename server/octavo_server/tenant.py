"""Tenants: whose sessions are whose, and how much of the server each may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from octavo_server import errors

ANONYMOUS = ""
"""The name of the only tenant of a server without a tenants file."""


class TenantLimits(NamedTuple):
    """The most that a tenant may hold; 0 = no limit of its own.

    Attributes:
        max_sessions: Open sessions.
        max_tokens: Tokens that the blocks of its sessions hold, full or not.
        max_bytes: Bytes of those blocks, of all layers.
    """

    max_sessions: int = 0
    max_tokens: int = 0
    max_bytes: int = 0


class TenantStats(NamedTuple):
    """What a tenant holds at one moment; the fields are those of its limits."""

    name: str
    num_sessions: int
    num_tokens: int
    num_bytes: int


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant, and what it holds. The engine changes it, under its lock."""

    name: str
    limits: TenantLimits = field(default_factory=TenantLimits)
    num_sessions: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def add_session(self) -> None:
        """Count a session that is opened.

        Raises:
            OctavoError: TENANT_LIMIT; nothing changed.
        """
        self._check("open sessions", self.num_sessions + 1, self.limits.max_sessions)
        self.num_sessions += 1

    def remove_session(self) -> None:
        """Count a session that is gone."""
        self.num_sessions -= 1

    def check_blocks(self, num_blocks: int, block_size: int, block_bytes: int) -> None:
        """Check that the tenant may have so many blocks more.

        Raises:
            OctavoError: TENANT_LIMIT.
        """
        num_tokens, num_bytes = num_blocks * block_size, num_blocks * block_bytes
        self._check("tokens in blocks", self.num_tokens + num_tokens, self.limits.max_tokens)
        self._check("bytes in blocks", self.num_bytes + num_bytes, self.limits.max_bytes)

    def add_blocks(self, num_blocks: int, block_size: int, block_bytes: int) -> None:
        """Count blocks that a session of the tenant took, or with a negative number gave back."""
        self.num_tokens += num_blocks * block_size
        self.num_bytes += num_blocks * block_bytes

    def stats(self) -> TenantStats:
        """Return what it holds."""
        return TenantStats(self.name, self.num_sessions, self.num_tokens, self.num_bytes)

    def _check(self, what: str, wanted: int, limit: int) -> None:
        if limit and wanted > limit:
            raise errors.tenant_limit(self.name, what, limit)


class Tenants:
    """All tenants that were ever named; thread-safe, for a name is only ever added.

    Args:
        default_limits: Limits of a tenant that has none of its own.
    """

    def __init__(self, default_limits: TenantLimits | None = None) -> None:
        self._default_limits = default_limits or TenantLimits()
        self._by_name: dict[str, Tenant] = {}

    def get(self, name: str) -> Tenant:
        """Return the tenant of a name; always the same object."""
        tenant = self._by_name.get(name)
        if tenant is None:
            tenant = self._by_name.setdefault(name, Tenant(name, self._default_limits))
        return tenant

    def set_limits(self, name: str, limits: TenantLimits) -> None:
        """Give a tenant limits of its own; each 0 among them is the default's."""
        merged = (own or default for own, default in zip(limits, self._default_limits, strict=True))
        self.get(name).limits = TenantLimits(*merged)

    def stats(self) -> tuple[TenantStats, ...]:
        """Return what each tenant holds, by name."""
        return tuple(tenant.stats() for _, tenant in sorted(self._by_name.items()))
