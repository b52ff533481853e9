"""The file of tenants: what it means, and every mistake at once, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo_server.config import ConfigError
from octavo_server.tenants_file import MAX_TOKENS_OF_TENANT, TenantKeys, grants_of, parse_tenants
from octavo_server.tokens import Grant, draw_token

PATH = Path("tenants.yaml")
A, B, C = "a1" * 32, "0" * 63 + "b", "C3" * 32


def parse(text: str) -> tuple[TenantKeys, ...]:
    return parse_tenants(PATH, text.encode())


def mistakes_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    return refused.value.mistakes


def test_file_names_tenants_their_tokens_and_limits() -> None:
    tenants = parse(
        f"""\
tenants:
  - name: acme
    token_sha256: [{A}, {C}]
    max_sessions: 100
    max_tokens: 1000000
    max_bytes: 4GiB
  - {{name: beta-2.x_y, token_sha256: [{B}]}}
  - {{name: shut.out, token_sha256: []}}
"""
    )
    assert tenants == (
        TenantKeys("acme", (bytes.fromhex(A), bytes.fromhex(C)), 100, 1_000_000, 4 * 2**30),
        TenantKeys("beta-2.x_y", (bytes.fromhex(B),)),
        TenantKeys("shut.out", ()),
    )
    assert list(grants_of(tenants)) == [
        Grant(bytes.fromhex(A), "acme"),
        Grant(bytes.fromhex(C), "acme"),
        Grant(bytes.fromhex(B), "beta-2.x_y"),
    ]


def test_no_tenants_are_allowed_when_said() -> None:
    assert parse("tenants: []") == ()


def test_all_mistakes_come_at_once_with_their_lines() -> None:
    hashes = (
        f"a list of at most {MAX_TOKENS_OF_TENANT} hashes of 64 hexadecimal digits, "
        "as `octavo-server token` prints them"
    )
    text = f"""\
tenants:
  - name: acme
    token_sha256: [{A}]
    max_session: 3
  - name: acme
    token_sha256: [{A.upper()}]
  - name: "no spaces"
    token_sha256: my-secret-token
    max_bytes: -1
  - max_tokens: 1
  - 7
other: 1
"""
    assert mistakes_of(text) == (
        "tenants.yaml:4: max_session: unknown key; did you mean max_sessions?",
        "tenants.yaml:5: name: got 'acme', as at tenants.yaml:2; expected one of its own",
        f"tenants.yaml:6: token_sha256: got {A}, as at tenants.yaml:3; expected one of its own",
        "tenants.yaml:7: name: got 'no spaces'; expected a name of letters, digits and . _ -",
        f"tenants.yaml:8: token_sha256: got what is not shown here; expected {hashes}",
        'tenants.yaml:9: max_bytes: got -1; expected bytes, or a size such as "64MiB", from 0TiB to 1024TiB',
        "tenants.yaml:10: name: missing; expected a name of letters, digits and . _ -",
        f"tenants.yaml:10: token_sha256: missing; expected {hashes}",
        "tenants.yaml:11: tenants: got a value; expected keys such as `name: llama`",
        "tenants.yaml:12: other: unknown key; expected tenants alone",
    )


@pytest.mark.parametrize(
    "value",
    ["octavo_a-token-itself", "[octavo_a-token-itself]", f"[{A}x]", f"[{A[:-1]}]", f"[{A}, 7]", A],
)
def test_what_stands_where_a_hash_should_is_refused_and_never_quoted(value: str) -> None:
    (mistake,) = mistakes_of(f"tenants: [{{name: a, token_sha256: {value}}}]")
    assert mistake.startswith("tenants.yaml:1: token_sha256: got what is not shown here; expected")


@pytest.mark.parametrize(
    "text",
    [
        "{token}",  # the file of the token in the place of the file of tenants
        "tenants: {token}",
        "tenants: [{token}]",
        "{token}: 1",
        "tenants: [{{name: a, token_sha256: [], {token}}}]",
        "tenants: [{{name: a, token_sha256: !!int {token}}}]",
        "tenants: [{{name: a, token_sha256: {{x: {token}}}}}]",
        "tenants: [{{name: {token} x, token_sha256: []}}]",
    ],
)
def test_a_token_is_quoted_nowhere(text: str) -> None:
    token = draw_token()
    mistakes = mistakes_of(text.format(token=token))
    assert mistakes
    assert token not in "".join(mistakes)


def test_a_secret_that_was_not_drawn_is_not_quoted_in_the_place_of_tenants() -> None:
    for text in ("a-secret", "tenants: a-secret", "tenants: [a-secret]"):
        assert "a-secret" not in "".join(mistakes_of(text))


def test_too_many_hashes_are_refused() -> None:
    hashes = ", ".join(f"{idx:064x}" for idx in range(1, MAX_TOKENS_OF_TENANT + 2))
    assert len(mistakes_of(f"tenants: [{{name: a, token_sha256: [{hashes}]}}]")) == 1


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "tenants.yaml:1: tenants: missing; expected a list"),
        ("{}", "tenants.yaml:1: tenants: missing; expected a list"),
        ("tenants:", "tenants.yaml:1: tenants: got a value; expected a list of tenants"),
        ("- a", "tenants.yaml:1: holds a list; expected keys such as `tenants:`"),
        ("tenants: [", "tenants.yaml:1: is not YAML: "),
        ("tenants: !!python/object/apply:os.system [ls]", "tenants.yaml:1: tenants: got "),
    ],
)
def test_file_of_another_form_is_one_mistake(text: str, mistake: str) -> None:
    (got,) = mistakes_of(text)
    assert got.startswith(mistake)
