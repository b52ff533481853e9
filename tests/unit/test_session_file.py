"""The file of a session: what the official library reads, and that nothing but what was written is ever taken."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from octavo_server import session_file
from octavo_server.model import ModelSpec
from octavo_server.session import AppendRecord, SessionOptions
from octavo_server.session_file import SessionReader, write_session
from octavo_server.session_header import (
    FIELDS,
    InvalidSessionFileError,
    SavedSession,
    SessionIdentity,
    check_key,
    decode_header,
    encode_header,
    model_key,
)

SPEC = ModelSpec(
    name="tiny",
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    block_size=16,
    max_context=100,
    sm_scale=(0.3, 0.3, 0.25),
    window=(0, 8, 0),
    soft_cap=(0.0, 0.0, 30.1),
    sinks=np.arange(12, dtype=np.float32).reshape(3, 4),
)
SAVED = SavedSession(
    model="tiny",
    key=model_key(SPEC),
    lengths=(40, 0, 7),
    last_appends=(AppendRecord(38, 2, 2**64 - 1), None, AppendRecord(0, 7, 5)),
    options=SessionOptions(900.0, False, 64),
)


def drawn(saved: SavedSession) -> dict[str, NDArray[Any]]:
    """Draw the tensors of a session."""
    rng = np.random.default_rng(1)
    tensors: dict[str, NDArray[Any]] = {}
    for layer, length in enumerate(saved.lengths):
        heads = (length, saved.key.num_kv_heads)
        for field in FIELDS:
            tensors[f"layers.{layer}.{field}"] = (
                rng.random(heads).astype(np.float16)
                if field.endswith("scales")
                else rng.integers(-127, 128, (*heads, saved.key.head_dim), np.int8)
            )
    return tensors


def written(saved: SavedSession = SAVED, block_size: int = 16) -> bytes:
    """Write a session with drawn tensors."""
    tensors = drawn(saved)
    values = (
        tensors[f"layers.{piece.layer}.{piece.field}"][piece.start : piece.stop]
        for piece in session_file.pieces(saved, block_size)
    )
    return b"".join(write_session(saved, values))


def received(data: bytes, block_size: int = 16) -> dict[str, NDArray[Any]]:
    """Read a whole file for SPEC."""
    reader = SessionReader(io.BytesIO(data))
    saved = reader.header()
    check_key(saved.key, SPEC)
    parts: dict[str, list[NDArray[Any]]] = {}
    for piece, values in reader.pieces(saved, block_size):
        parts.setdefault(f"layers.{piece.layer}.{piece.field}", []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


DATA = written()

EXAMPLES = settings(deadline=None)


def sealed(data: bytes) -> bytes:
    """Give changed bytes the checksum that fits them."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def with_header(change: str, to: str) -> bytes:
    """Change a text of the header, and make length and checksum fit."""
    size = int.from_bytes(DATA[:8], "little")
    header = DATA[8 : 8 + size].decode()
    assert header.count(change) == 1, change
    text = header.replace(change, to).rstrip().encode()
    text += b" " * (-len(text) % 8)
    return sealed(len(text).to_bytes(8, "little") + text + DATA[8 + size :])


def test_the_official_library_reads_it() -> None:
    tensors = safetensors.numpy.load(DATA)
    checksum = tensors.pop("checksum")
    assert checksum.tobytes() == hashlib.sha256(DATA[:-32]).digest()
    expected = drawn(SAVED)
    assert sorted(tensors) == sorted(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


def test_what_was_written_is_read_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_file, "PIECE_BYTES", 300)
    for block_size in (16, 32):
        assert written(block_size=block_size) == DATA
        tensors = received(DATA, block_size)
        for name, value in drawn(SAVED).items():
            np.testing.assert_array_equal(tensors.get(name, value[:0]), value)


def test_pieces_are_bounded_and_begin_with_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_file, "PIECE_BYTES", 600)
    pieces = [piece for piece in session_file.pieces(SAVED, 16) if piece.layer == 0]
    assert [piece[1:] for piece in pieces] == [
        ("k_codes", 0, 32),
        ("k_codes", 32, 40),
        ("k_scales", 0, 40),
        ("v_codes", 0, 32),
        ("v_codes", 32, 40),
        ("v_scales", 0, 40),
    ]


@pytest.mark.parametrize("identity", [None, SessionIdentity("a-b", 2**64 - 1, "acme", "é\ud800")])
def test_a_header_says_all_that_it_was_given(identity: SessionIdentity | None) -> None:
    saved = dataclasses.replace(SAVED, identity=identity)
    data = encode_header(saved)
    assert len(data) % 8 == 0
    assert decode_header(data[8:]) == saved


@pytest.mark.parametrize(
    ("change", "to", "cause"),
    [
        ('"octavo-session"', '"octavo-sessions"', "format"),
        ('"version":"1"', '"version":"2"', "version"),
        ('"lengths":"[40,0,7]"', '"lengths":"[40,0]"', "lengths"),
        ('"lengths":"[40,0,7]"', '"lengths":"[40,0,4294967296]"', "lengths"),
        ('"lengths":"[40,0,7]"', '"lengths":"[40,false,7]"', "lengths"),
        ('"lengths":"[40,0,7]"', '"lengths":"[41,0,7]"', "last append"),
        ("[0,7,5]]", "[0,7,5]] ", "header"),
        ("[0,7,5]]", "[7,0,5]]", "last append"),
        ("[0,7,5]]", "[-1,8,5]]", "last_appends"),
        ("[0,7,5]]", "[0,7,18446744073709551616]]", "last_appends"),
        ("[0,7,5]]", "7]", "last_appends"),
        ('\\"num_kv_heads\\":2', '\\"num_kv_heads\\":0', "num_kv_heads"),
        ('\\"num_kv_heads\\":2', '\\"num_kv_heads\\":1', "header"),
        ('\\"num_layers\\":3', '\\"num_layers\\":1000000000', "num_layers"),
        ('\\"window\\":[0,8,0]', '\\"window\\":[0,9,0]', "window is not that of model 'tiny'"),
        ('\\"window\\":[0,8,0]', '\\"window\\":[0,8]', "window"),
        ('\\"num_q_heads\\":4', '\\"num_q_heads\\":6', "num_q_heads"),
        ('\\"lease_ms\\":900000', '\\"lease_ms\\":0', "lease_ms"),
        ('\\"closes_on_disconnect\\":false', '\\"closes_on_disconnect\\":0', "closes"),
        ('"layers.1.v_codes"', '"layers.1.w_codes"', "header"),
        ('"layers.0.k_codes":{"dtype":"I8"', '"layers.0.k_codes":{"dtype":"U8"', "header"),
        ('"format"', '"formal"', "format"),
        ('"options":"{', '"options":"{{', "JSON"),
    ],
)
def test_a_header_that_says_otherwise_is_refused(change: str, to: str, cause: str) -> None:
    with pytest.raises(InvalidSessionFileError, match=cause):
        received(with_header(change, to))


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("k_codes", b"\x80", "layers.0.k_codes holds the code -128"),
        ("v_scales", b"\x00\x7e", "layers.0.v_scales holds a scale that is negative"),
        ("v_scales", b"\x00\x7c", "scale"),
        ("k_scales", b"\x01\x80", "scale"),
    ],
)
def test_values_that_nothing_is_stored_as_are_refused(field: str, value: bytes, cause: str) -> None:
    size = int.from_bytes(DATA[:8], "little")
    start, _ = json.loads(DATA[8 : 8 + size])[f"layers.0.{field}"]["data_offsets"]
    at = 8 + size + start + 4
    with pytest.raises(InvalidSessionFileError, match=cause):
        received(sealed(DATA[:at] + value + DATA[at + len(value) :]))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "cut off"),
        (b"\xff" * 8, "header of at most 1 MiB"),
        (b"\x01" + bytes(7), "header of at most"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "JSON"),
        (safetensors.numpy.save({"a": np.zeros(3)}), "__metadata__"),
        (safetensors.numpy.save({"a": np.zeros(3)}, {"format": "pt"}), "format"),
        (DATA + b"\0", "after its end"),
        (DATA + DATA, "after its end"),
    ],
)
def test_foreign_bytes_are_refused(data: bytes, cause: str) -> None:
    with pytest.raises(InvalidSessionFileError, match=cause):
        received(data)


@EXAMPLES
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, change: int) -> None:
    changed = DATA[:at] + bytes([DATA[at] ^ change]) + DATA[at + 1 :]
    with pytest.raises(InvalidSessionFileError):
        received(changed)


@EXAMPLES
@given(st.data())
def test_any_cut_and_any_splice_is_noticed(data: st.DataObject) -> None:
    positions = st.integers(0, len(DATA))
    first, second = data.draw(positions), data.draw(positions)
    changed = DATA[:first] + data.draw(st.binary(max_size=8)) + DATA[second:]
    if changed != DATA:
        with pytest.raises(InvalidSessionFileError):
            received(changed)


@EXAMPLES
@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_refused_and_nothing_worse(garbage: bytes, has_length: bool) -> None:
    prefix = len(garbage).to_bytes(8, "little") if has_length else b""
    with pytest.raises(InvalidSessionFileError):
        received(prefix + garbage)
