"""The header of a session's file: what it says, and its one form.

It is the header of a safetensors file. `__metadata__` has these texts:

- format, version: "octavo-session", "1".
- model: JSON of its name, its shape and its attention options, all that answers depend on; of sinks their SHA-256.
- lengths: JSON [num_layers].
- last_appends: JSON [num_layers] of [start_pos, num_tokens, step_key], or null where there is none to replay.
- options: JSON of the session's own.
- identity: JSON of its names, in snapshots only; a session that is opened from anything else gets new ones.

A reader takes a header apart, puts it together again, and refuses what is not the same to the byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from octavo_server.model import ModelSpec
from octavo_server.session import AppendRecord, SessionOptions

FORMAT = "octavo-session"
VERSION = "1"

FIELDS = ("k_codes", "k_scales", "v_codes", "v_scales")
"""Tensors of a layer, in the order of the file."""

CHECKSUM_BYTES = 32
_MAX_NUMBER = 2**32 - 1
_MAX_KEY = 2**64 - 1
_MAX_SIZE = 1024
"""Most layers, heads or elements of a head that any model has."""


class InvalidSessionFileError(Exception):
    """The bytes are no session of this format, are damaged, or are of another model; the text is the cause."""


class SessionIdentity(NamedTuple):
    """By what names a session is known."""

    session_id: str
    handle: int
    tenant: str
    request_id: str


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What two models must have in common for one to go on with the other's cache.

    Attributes:
        num_layers: As in ModelSpec, like the others.
        num_q_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Elements of one head.
        sm_scale: [num_layers], rounded to float32, with which kernels work.
        window: [num_layers].
        soft_cap: [num_layers], rounded to float32.
        sinks_sha256: Of the sinks' float32 bytes, in hex; empty without sinks.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: tuple[float, ...]
    window: tuple[int, ...]
    soft_cap: tuple[float, ...]
    sinks_sha256: str


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What a header says.

    Attributes:
        model: Name of the model.
        key: Its shape and attention options.
        lengths: [num_layers] tokens.
        last_appends: [num_layers] what can be replayed.
        options: Of the session.
        identity: In snapshots only.
    """

    model: str
    key: ModelKey
    lengths: tuple[int, ...]
    last_appends: tuple[AppendRecord | None, ...]
    options: SessionOptions
    identity: SessionIdentity | None = None


def model_key(spec: ModelSpec) -> ModelKey:
    """Return what a model's sessions can be opened by."""
    sinks = b"" if spec.sinks is None else np.ascontiguousarray(spec.sinks, "<f4").tobytes()
    return ModelKey(
        spec.num_layers,
        spec.num_q_heads,
        spec.num_kv_heads,
        spec.head_dim,
        tuple(float(np.float32(value)) for value in spec.sm_scale),
        tuple(spec.window),
        tuple(float(np.float32(value)) for value in spec.soft_cap),
        hashlib.sha256(sinks).hexdigest() if sinks else "",
    )


def check_key(key: ModelKey, spec: ModelSpec) -> None:
    """Check that a model can go on with a session.

    Raises:
        InvalidSessionFileError: It is of another shape, or attends otherwise.
    """
    expected = model_key(spec)
    for name, value in asdict(key).items():
        if value != getattr(expected, name):
            refuse(f"its {name} is not that of model {spec.name!r}", value)


def encode_header(saved: SavedSession) -> bytes:
    """Return the first bytes of a session's file: the header's length, and the header."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": _json({"name": saved.model, **asdict(saved.key)}),
        "lengths": _json(saved.lengths),
        "last_appends": _json(saved.last_appends),
        "options": _json(_encode_options(saved.options)),
    }
    if saved.identity is not None:
        metadata["identity"] = _json(saved.identity._asdict())
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors(saved):
        start, end = end, end + tensor_bytes(tensor)
        dtype = "F16" if tensor.field.endswith("scales") else "I8"
        name = f"layers.{tensor.layer}.{tensor.field}"
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    offsets = [end, end + CHECKSUM_BYTES]
    header["checksum"] = {"dtype": "U8", "shape": [CHECKSUM_BYTES], "data_offsets": offsets}
    text = _json(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def decode_header(text: bytes) -> SavedSession:
    """Return what a header says of its session; of the tensors it may say anything.

    Raises:
        InvalidSessionFileError: It is of another format or version, or says what cannot be.
    """
    header = _Fields(_parse(text), "the header")
    metadata = _Fields(header.value("__metadata__"), "__metadata__")
    if metadata.value("format") != FORMAT:
        refuse(f"its format is not {FORMAT!r}", metadata.value("format"))
    if metadata.value("version") != VERSION:
        refuse(f"its version is not {VERSION!r}", metadata.value("version"))
    model = _Fields(_parse(metadata.text("model")), "model")
    key = _decode_key(model)
    lengths = _integers(_parse(metadata.text("lengths")), "lengths", key.num_layers, _MAX_NUMBER)
    options = _Fields(_parse(metadata.text("options")), "options")
    return SavedSession(
        model=model.text("name"),
        key=key,
        lengths=lengths,
        last_appends=_decode_appends(_parse(metadata.text("last_appends")), lengths),
        options=SessionOptions(
            _lease_s(options.number("lease_ms", _MAX_KEY)),
            options.flag("closes_on_disconnect"),
            options.number("reserve_tokens", _MAX_NUMBER),
        ),
        identity=_decode_identity(metadata),
    )


class Tensor(NamedTuple):
    """One tensor of a file."""

    layer: int
    field: str
    shape: tuple[int, ...]


class _Fields:
    """The fields of a JSON object, each of the kind that is asked for."""

    def __init__(self, fields: object, name: str) -> None:
        if not isinstance(fields, dict):
            refuse(f"{name} is no JSON object")
        self._fields: Mapping[str, object] = fields
        self._name = name

    def has(self, key: str) -> bool:
        return key in self._fields

    def value(self, key: str) -> object:
        if key not in self._fields:
            refuse(f"{self._name} has no {key!r}")
        return self._fields[key]

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            refuse(f"{key} is no text", value)
        return value

    def number(self, key: str, largest: int) -> int:
        value = self.value(key)
        if type(value) is not int or not 0 <= value <= largest:
            refuse(f"{key} is no number up to {largest}", value)
        return value

    def size(self, key: str) -> int:
        return self.number(key, _MAX_SIZE) or refuse(f"{key} is 0")

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            refuse(f"{key} is neither true nor false", value)
        return value


def _decode_key(model: _Fields) -> ModelKey:
    num_layers = model.size("num_layers")
    return ModelKey(
        num_layers=num_layers,
        num_q_heads=model.size("num_q_heads"),
        num_kv_heads=model.size("num_kv_heads"),
        head_dim=model.size("head_dim"),
        sm_scale=_floats(model.value("sm_scale"), "sm_scale", num_layers),
        window=_integers(model.value("window"), "window", num_layers, _MAX_NUMBER),
        soft_cap=_floats(model.value("soft_cap"), "soft_cap", num_layers),
        sinks_sha256=model.text("sinks_sha256"),
    )


def _decode_appends(values: object, lengths: Sequence[int]) -> tuple[AppendRecord | None, ...]:
    return tuple(
        None if value is None else _decode_append(value, length)
        for value, length in zip(_list(values, "last_appends", len(lengths)), lengths, strict=True)
    )


def _decode_append(value: object, length: int) -> AppendRecord:
    record = AppendRecord(*_integers(value, "last_appends", 3, _MAX_KEY))
    if not record.num_tokens or record.start_pos + record.num_tokens != length:
        refuse(f"a last append does not end at its layer's length, {length}", value)
    return record


def _decode_identity(metadata: _Fields) -> SessionIdentity | None:
    if not metadata.has("identity"):
        return None
    identity = _Fields(_parse(metadata.text("identity")), "identity")
    return SessionIdentity(
        identity.text("session_id"),
        identity.number("handle", _MAX_KEY),
        identity.text("tenant"),
        identity.text("request_id"),
    )


def _encode_options(options: SessionOptions) -> dict[str, int]:
    return {
        "lease_ms": options.lease_ms,
        "closes_on_disconnect": options.closes_on_disconnect,
        "reserve_tokens": options.reserve_tokens,
    }


def _lease_s(lease_ms: int) -> float:
    if lease_ms == 0:
        refuse("lease_ms must be 1 or more", lease_ms)
    return lease_ms / 1000


def _integers(values: object, name: str, count: int, largest: int) -> tuple[int, ...]:
    numbers = _list(values, name, count)
    for value in numbers:
        if type(value) is not int or not 0 <= value <= largest:
            refuse(f"{name} has what is no number up to {largest}", value)
    return tuple(numbers)


def _floats(values: object, name: str, count: int) -> tuple[float, ...]:
    numbers = _list(values, name, count)
    for value in numbers:
        if not isinstance(value, float):
            refuse(f"{name} has what is no float", value)
    return tuple(numbers)


def _list(values: object, name: str, count: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != count:
        refuse(f"{name} is no list of {count}")
    return values


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _parse(text: str | bytes) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number too long, lists too deep
        refuse("its header is no JSON")
    return value


def tensors(saved: SavedSession) -> Iterator[Tensor]:
    """Yield the tensors of a file, in its order, without the checksum."""
    for layer, length in enumerate(saved.lengths):
        for field in FIELDS:
            yield Tensor(layer, field, (length, *row_shape(saved.key, field)))


def row_shape(key: ModelKey, field: str) -> tuple[int, ...]:
    """Return the shape of one token in a tensor."""
    heads = (key.num_kv_heads,)
    return heads if field.endswith("scales") else (*heads, key.head_dim)


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    num_bytes = 2 if tensor.field.endswith("scales") else 1
    for size in tensor.shape:
        num_bytes *= size
    return num_bytes


def refuse(cause: str, actual: object = None) -> NoReturn:
    """Refuse a file, with what was found where that helps."""
    raise InvalidSessionFileError(cause if actual is None else f"{cause}: {_shown(actual)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
