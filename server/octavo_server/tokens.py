"""Bearer tokens: drawn at random, kept as hashes, found in constant time. No I/O."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

NUM_TOKEN_BYTES = 32
MIN_TOKEN_LEN = 32
"""What is shorter cannot carry 128 random bits, as text, and might be guessed from its hash."""
MAX_TOKEN_LEN = 512

TOKEN_PREFIX = "octavo_"
"""So that people, and scanners for secrets, see what it is."""

# The characters of RFC 6750, section 2.1. Not \w or $, which let more pass.
_AUTHORIZATION = re.compile(r"[Bb]earer ([A-Za-z0-9\-._~+/]+=*)")

_DRAWN_TOKEN = re.compile(TOKEN_PREFIX + r"[A-Za-z0-9_-]{43}")


class Grant(NamedTuple):
    """A token that is good, by its hash, and whose it is."""

    token_sha256: bytes
    tenant: str


def draw_token() -> str:
    """Draw a token of 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(NUM_TOKEN_BYTES)


def hide_tokens(text: str) -> str:
    """Return a text without the tokens that were drawn here, wherever they stand in it."""
    return _DRAWN_TOKEN.sub("(a token)", text)


def hash_token(token: str) -> bytes:
    """Return a token's SHA-256, which is all that is kept of it.

    A plain hash, without salt or rounds: those slow down guessing, and nobody guesses 256 random bits. They are for
    passwords, which tokens must never be.
    """
    return hashlib.sha256(token.encode()).digest()


def read_authorization(value: str) -> str:
    """Return the token of an `authorization`.

    Raises:
        ValueError: It is not "Bearer TOKEN", or the token is too short or too long; the text never quotes it.
    """
    if len(value) > MAX_TOKEN_LEN + len("Bearer "):
        raise ValueError(f"the token has more than {MAX_TOKEN_LEN} characters")
    match = _AUTHORIZATION.fullmatch(value)
    if match is None:
        raise ValueError("authorization is not `Bearer TOKEN`")
    if len(match[1]) < MIN_TOKEN_LEN:
        raise ValueError(f"the token has fewer than {MIN_TOKEN_LEN} characters")
    return match[1]


class TokenTable:
    """The grants of all tenants.

    Args:
        grants: With a hash for each.
    """

    def __init__(self, grants: Iterable[Grant] = ()) -> None:
        self._grants = tuple(grants)
        self._known = frozenset(self._grants)

    def __contains__(self, grant: Grant) -> bool:
        """Whether a grant that was found once is good still."""
        return grant in self._known

    def find(self, token: str) -> Grant | None:
        """Return a token's grant, or None; in a time that says nothing of how much of which hash was met."""
        token_sha256 = hash_token(token)
        found: Grant | None = None
        # To the end, also past the one that is met: else the time would tell its place.
        for grant in self._grants:
            if hmac.compare_digest(grant.token_sha256, token_sha256):
                found = grant
        return found
