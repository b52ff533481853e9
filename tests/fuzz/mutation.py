"""Messages that were valid once: with changed fields, which parse, or changed bytes, most of which do not. Pure."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_MOST_RANDOM_BYTES = 300
_LARGEST_VARINT = b"\xff" * 9 + b"\x01"
_NUMBERS = (0, 1, 2, 3, 15, 16, 17, 100, 2**31 - 1, 2**31, 2**32 - 1)
_LARGE_NUMBERS = (2**32, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = ("", "x", "0", "9" * 30, "é" * 200, "\0", "x" * 5000)
_ENUMS = (0, 1, 2, 3, 77)
_MOST_REPEATS = 40

_EMPTY = {FieldDescriptor.TYPE_BYTES: b"", FieldDescriptor.TYPE_STRING: ""}
_SMALL_TYPES = (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32)


def mutated(message: Message, rng: random.Random) -> bytes:
    """Return a message with one to four changes of its fields, of its bytes, or random bytes instead."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randrange(_MOST_RANDOM_BYTES))
    if kind < 0.4:
        return mutated_bytes(message.SerializeToString(), rng)
    changed = type(message).FromString(message.SerializeToString())
    for _ in range(rng.randint(1, 4)):
        _change_field(changed, rng)
    return changed.SerializeToString()


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to four changes, most often one."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(data, rng)
    return data


def _change_field(message: Message, rng: random.Random) -> None:
    """Change one field, or one of a message inside."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_repeated(getattr(message, field.name), field, rng)
    elif field.message_type is not None:
        _change_field(getattr(message, field.name), rng)
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), rng))


def _change_repeated(values: Any, field: FieldDescriptor, rng: random.Random) -> None:
    """Add, change or remove an element, or repeat them all."""
    if field.message_type is not None:
        _change_field(values.add(), rng)
    elif not values or rng.random() < 0.3:
        values.append(_value(field, _EMPTY.get(field.type, 0), rng))
    elif rng.random() < 0.7:
        idx = rng.randrange(len(values))
        values[idx] = _value(field, values[idx], rng)
    elif rng.random() < 0.5:
        values.pop()
    else:
        values.extend(list(values) * rng.randrange(_MOST_REPEATS))


def _value(field: FieldDescriptor, value: Any, rng: random.Random) -> Any:
    """Return another value of a field."""
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutated_bytes(value, rng)
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice((*_TEXTS, value[:-1], value + "0"))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not value
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(_ENUMS)
    return rng.choice(_NUMBERS if field.type in _SMALL_TYPES else _NUMBERS + _LARGE_NUMBERS)


def _flip(message: bytes, rng: random.Random) -> bytes:
    """Flip a bit; most often one of the head, where tags and lengths are."""
    if not message:
        return message
    idx = rng.randrange(len(message) if rng.random() < 0.3 else min(len(message), 80))
    return message[:idx] + bytes([message[idx] ^ 1 << rng.randrange(8)]) + message[idx + 1 :]


def _cut_short(message: bytes, rng: random.Random) -> bytes:
    return message[: rng.randint(0, len(message))]


def _remove(message: bytes, rng: random.Random) -> bytes:
    start, end = _range(message, rng)
    return message[:start] + message[end:]


def _repeat(message: bytes, rng: random.Random) -> bytes:
    start, end = _range(message, rng)
    return message[:end] + message[start:end] + message[end:]


def _insert(message: bytes, rng: random.Random) -> bytes:
    start, _ = _range(message, rng)
    return message[:start] + rng.randbytes(rng.randint(1, 12)) + message[start:]


def _enlarge(message: bytes, rng: random.Random) -> bytes:
    """Put the largest number where a byte was."""
    start, _ = _range(message, rng)
    return message[:start] + _LARGEST_VARINT + message[start + 1 :]


def _lengthen(message: bytes, rng: random.Random) -> bytes:
    """Say a number of one byte in more bytes than it takes."""
    if not message:
        return message
    idx = rng.randrange(len(message))
    longer = bytes([message[idx] | 0x80]) + b"\x80" * rng.randrange(9) + b"\0"
    return message[:idx] + longer + message[idx + 1 :]


def _double(message: bytes, _rng: random.Random) -> bytes:
    """Say everything twice, which merges messages field by field."""
    return message + message


def _range(message: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randint(0, len(message))
    return start, min(start + rng.randint(0, 16), len(message))


_CHANGES = (
    _flip,
    _flip,
    _cut_short,
    _remove,
    _repeat,
    _insert,
    _enlarge,
    _lengthen,
    _lengthen,
    _double,
)
