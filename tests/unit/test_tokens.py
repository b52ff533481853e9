"""Bearer tokens: form, hash, and the look-up that compares with every hash."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from octavo_server import tokens
from octavo_server.tokens import MAX_TOKEN_LEN, MIN_TOKEN_LEN, Grant, TokenTable

TOKEN = "t" * MIN_TOKEN_LEN


def test_drawn_tokens_differ_and_carry_256_bits() -> None:
    drawn = {tokens.draw_token() for _ in range(100)}
    assert len(drawn) == 100
    for token in drawn:
        # 43 characters of 6 bits hold 32 bytes.
        assert len(token.removeprefix(tokens.TOKEN_PREFIX)) == 43
        assert tokens.read_authorization(f"Bearer {token}") == token


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer {TOKEN}=="])
def test_authorization_holds_a_token(value: str) -> None:
    assert tokens.read_authorization(value) == value[len("Bearer ") :]


def test_longest_token_is_taken() -> None:
    token = "x" * MAX_TOKEN_LEN
    assert tokens.read_authorization(f"Bearer {token}") == token


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "not `Bearer TOKEN`"),
        (TOKEN, "not `Bearer TOKEN`"),
        ("Bearer", "not `Bearer TOKEN`"),
        (f"Basic {TOKEN}", "not `Bearer TOKEN`"),
        (f"Bearer  {TOKEN}", "not `Bearer TOKEN`"),
        (f"Bearer {TOKEN} ", "not `Bearer TOKEN`"),
        (f"Bearer {TOKEN}\n", "not `Bearer TOKEN`"),
        (f"Bearer {TOKEN}é", "not `Bearer TOKEN`"),
        (f"Bearer {'١' * MIN_TOKEN_LEN}", "not `Bearer TOKEN`"),
        (f"Bearer {TOKEN}\0", "not `Bearer TOKEN`"),
        (f"Bearer {TOKEN[:-1]}", "fewer than"),
        (f"Bearer {'x' * (MAX_TOKEN_LEN + 1)}", "more than"),
    ],
)
def test_anything_else_is_refused_and_not_quoted(value: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        tokens.read_authorization(value)
    assert TOKEN[:-1] not in str(refused.value)


def test_hash_is_sha_256() -> None:
    assert tokens.hash_token(TOKEN) == hashlib.sha256(TOKEN.encode()).digest()


def test_look_up_compares_with_every_hash_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b", "c", "d"]
    grants = [Grant(tokens.hash_token(name * MIN_TOKEN_LEN), name) for name in names]
    table = TokenTable(grants)
    compared: list[bytes] = []

    def spy(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return compare(known, given)

    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", spy)
    for name in [*names, "e"]:
        compared.clear()
        found = table.find(name * MIN_TOKEN_LEN)
        assert (found.tenant if found else "e") == name
        assert compared == [grant.token_sha256 for grant in grants]


def test_a_grant_is_good_while_its_token_is_the_same_tenant_s() -> None:
    grant = Grant(tokens.hash_token(TOKEN), "a")
    assert grant in TokenTable([grant])
    assert grant not in TokenTable([Grant(grant.token_sha256, "b")])
    assert grant not in TokenTable()
