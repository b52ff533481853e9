"""The file of tenants: who may call, by the hashes of their tokens, and how much of the server each may hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo_server.config import ConfigError
from octavo_server.config_schema import (
    Kind,
    byte_size,
    integer,
    required,
    setting,
    text,
)
from octavo_server.config_section import Parsed, parse_section
from octavo_server.config_source import Report, Where, read_list
from octavo_server.tokens import Grant, hide_tokens

TENANTS_KEY = "tenants"
MAX_TOKENS_OF_TENANT = 64


def _hashes() -> Kind:
    hexadecimal = text("", r"[0-9A-Fa-f]{64}")

    def parse(value: object) -> tuple[bytes, ...]:
        if not isinstance(value, list) or len(value) > MAX_TOKENS_OF_TENANT:
            raise ValueError
        return tuple(bytes.fromhex(hexadecimal.parse(item)) for item in value)

    expected = (
        f"a list of at most {MAX_TOKENS_OF_TENANT} hashes of 64 hexadecimal digits, "
        "as `octavo-server token` prints them"
    )
    # What is there instead may be a token itself.
    return Kind(expected, parse, is_secret=True)


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """The keys of one tenant, as written; a limit of 0 is the server's default for tenants."""

    name: str = required(
        text("a name of letters, digits and . _ -", r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
        "What metrics and logs call the tenant; unique.",
    )
    token_sha256: tuple[bytes, ...] = required(
        _hashes(), "SHA-256 of each token that is the tenant's; none = it is shut out."
    )
    max_sessions: int = setting(0, integer(0, 2**20), "Most open sessions.")
    max_tokens: int = setting(0, integer(0, 2**40), "Most tokens that its blocks may hold.")
    max_bytes: int = setting(0, byte_size(0, 2**50), "Most bytes of its blocks.")


def parse_tenants(path: Path, data: bytes) -> tuple[TenantKeys, ...]:
    """Read what a file of tenants holds.

    Args:
        path: Where it comes from.
        data: All of it.

    Raises:
        ConfigError: With every mistake, by line. No mistake quotes what stands where a hash should, or a drawn token.
    """
    report = Report(quotes=False)
    sections = read_list(path, data, TENANTS_KEY, report)
    parsed = [parse_section(section, TenantKeys, report) for section in sections]
    _check_unique(parsed, report)
    if report.mistakes:
        raise ConfigError([hide_tokens(line) for line in report.lines()])
    return tuple(TenantKeys(**tenant.values) for tenant in parsed)


def grants_of(tenants: tuple[TenantKeys, ...]) -> Iterator[Grant]:
    """Yield the grants of tenants."""
    for tenant in tenants:
        for token_sha256 in tenant.token_sha256:
            yield Grant(token_sha256, tenant.name)


def _check_unique(tenants: list[Parsed], report: Report) -> None:
    seen: dict[Any, Where] = {}
    for tenant in tenants:
        if tenant.has("name"):
            name = tenant.values["name"]
            _check_first(name, f"name: got {name!r}", tenant.where("name"), seen, report)
        for token_sha256 in tenant.values.get("token_sha256", ()):
            what = f"token_sha256: got {token_sha256.hex()}"
            _check_first(token_sha256, what, tenant.where("token_sha256"), seen, report)


def _check_first(
    value: object, what: str, where: Where, seen: dict[Any, Where], report: Report
) -> None:
    if value in seen:
        report.add(where, f"{what}, as at {seen[value]}; expected one of its own")
    seen.setdefault(value, where)
