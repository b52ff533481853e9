"""What is fuzzed of files: sessions that clients import and servers restore, tenants, and the tokens of calls."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np

from octavo_server.config import ConfigError
from octavo_server.session import AppendRecord, SessionOptions
from octavo_server.session_file import SessionReader, pieces, write_session
from octavo_server.session_header import (
    InvalidSessionFileError,
    ModelKey,
    SavedSession,
    SessionIdentity,
)
from octavo_server.tenants_file import parse_tenants
from octavo_server.tokens import hash_token, read_authorization

_BLOCK_SIZE = 16
_KEY = ModelKey(2, 2, 1, 2, (0.5, 0.5), (0, 4), (0.0, 0.0), "")
_LENGTH_BYTES = 2


def fuzz_session_file(data: bytes) -> None:
    """A session's file: refused as one, or the very bytes that this format writes."""
    reader = SessionReader(BytesIO(data))
    try:
        saved = reader.header()
        if saved.key != _KEY:
            return  # as a server, which has no such model
        values = [part for _, part in reader.pieces(saved, _BLOCK_SIZE)]
    except InvalidSessionFileError:
        return
    assert b"".join(write_session(saved, values)) == data


def fuzz_session_header(data: bytes) -> None:
    """The same with a length and a checksum that fit, so that what lies behind them is reached."""
    split = int.from_bytes(data[:_LENGTH_BYTES], "little")
    text, body = data[_LENGTH_BYTES:][:split], data[_LENGTH_BYTES + split :]
    whole = len(text).to_bytes(8, "little") + text + body
    fuzz_session_file(whole + hashlib.sha256(whole).digest())


def fuzz_tenants(data: bytes) -> None:
    """A file of tenants: refused with its mistakes, or tenants within what the config allows."""
    try:
        tenants = parse_tenants(Path("tenants.yaml"), data)
    except ConfigError:
        return
    assert len({tenant.name for tenant in tenants}) == len(tenants)
    for tenant in tenants:
        assert all(len(token) == hashlib.sha256().digest_size for token in tenant.token_sha256)
        assert min(tenant.max_sessions, tenant.max_tokens, tenant.max_bytes) >= 0


def fuzz_authorization(data: bytes) -> None:
    """The metadata that carries a token: refused, or a token of the length that one has."""
    try:
        token = read_authorization(data.decode("latin-1"))
    except ValueError:
        return
    assert token.isascii()
    assert data == b"Bearer " + token.encode()


def session_file(length: int, *, has_identity: bool) -> bytes:
    """Return a valid file of a small session."""
    lengths = (length, length // 2)
    identity = (
        SessionIdentity("0123abcd-" + "0" * 32, 5, "acme", "request") if has_identity else None
    )
    last = AppendRecord(length - 1, 1, 77) if length else None
    options = SessionOptions(10.0, False, 8)
    saved = SavedSession("m", _KEY, lengths, (last, None), options, identity)
    rng = np.random.default_rng(1)
    values = [
        rng.random((piece.stop - piece.start, 1), np.float32).astype(np.float16)
        if piece.field.endswith("scales")
        else rng.integers(-127, 128, (piece.stop - piece.start, 1, 2), np.int8)
        for piece in pieces(saved, _BLOCK_SIZE)
    ]
    return b"".join(write_session(saved, values))


def header_input(file: bytes) -> bytes:
    """Return a file as `fuzz_session_header` takes it."""
    split = int.from_bytes(file[:8], "little")
    return split.to_bytes(_LENGTH_BYTES, "little") + file[8 : -hashlib.sha256().digest_size]


def tenants_file() -> bytes:
    """Return a valid file of tenants."""
    hashes = [hash_token(f"token-{idx}-of-a-tenant-{idx:032}").hex() for idx in range(3)]
    return (
        f"tenants:\n  - name: acme\n    token_sha256: [{hashes[0]}, {hashes[1]}]\n    max_sessions: 3\n"
        f"    max_bytes: 4GiB\n  - name: b\n    token_sha256: [{hashes[2]}]\n    max_tokens: 1000\n"
    ).encode()
