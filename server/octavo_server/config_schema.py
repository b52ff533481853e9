"""The vocabulary of the configuration: what a key accepts, and how a field declares one.

A key is a dataclass field made by `setting` or `required`. The YAML reader, the command line and
`--help` all walk `keys_of(the dataclass)`, so a key is declared once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

UNIT_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|[KMGT]iB)")
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Kind:
    """What a key accepts.

    Attributes:
        expected: Completes "expected ...".
        parse: Returns the parsed value, or raises ValueError.
        is_text: Whether a flag's text is the value itself rather than YAML.
        show: Writes a parsed value the way a user would write it.
        is_secret: Whether a mistake must not quote what was given.
    """

    expected: str
    parse: Callable[[object], Any]
    is_text: bool = False
    show: Callable[[Any], str] = str
    is_secret: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a section, as its dataclass field declares it."""

    name: str
    kind: Kind
    help: str
    default: object
    is_required: bool

    @property
    def flag(self) -> str:
        """The key as a command-line flag."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """Return a key as a command-line flag."""
    return "--" + name.replace("_", "-")


def setting(default: Any, kind: Kind, text: str) -> Any:
    """Declare a dataclass field as an optional key; `text` is its help."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text})


def required(kind: Kind, text: str) -> Any:
    """Declare a dataclass field as a key that must be given; `text` is its help."""
    return dataclasses.field(metadata={"kind": kind, "help": text})


def keys_of(section: type) -> tuple[Key, ...]:
    """Return the keys that a dataclass declares, in order."""
    return tuple(
        Key(
            field.name,
            field.metadata["kind"],
            field.metadata["help"],
            field.default,
            field.default is dataclasses.MISSING,
        )
        for field in dataclasses.fields(section)
        if "kind" in field.metadata
    )


def show(value: object) -> str:
    """Return a value as an error message quotes it."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def integer(low: int, high: int, *, multiple_of: int = 1) -> Kind:
    """Accept a whole number of [low, high]; a boolean is none."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if not low <= value <= high or value % multiple_of:
            raise ValueError
        return value

    what = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
    return Kind(f"{what} from {low} to {high}", parse)


def number(low: float, high: float, *, or_zero: bool = False) -> Kind:
    """Accept a finite number of [low, high], and 0 with `or_zero`."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not (low <= value <= high or (or_zero and value == 0)):
            raise ValueError
        return float(value)

    return Kind(f"{'0 or ' if or_zero else ''}a number from {low:g} to {high:g}", parse)


def boolean() -> Kind:
    """Accept true and false."""

    def parse(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Kind("true or false", parse, show=lambda value: str(value).lower())


def text(expected: str, pattern: str) -> Kind:
    """Accept a string that `pattern` matches as a whole."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Kind(expected, parse, is_text=True)


def address() -> Kind:
    """Accept "host:port", also "[::1]:9464", or nothing."""
    return text(
        'an address such as "127.0.0.1:9464", or nothing', r"((\[[^\s\]]+\]|[^\s:]+):\d{1,5})?"
    )


def one_of(*choices: object) -> Kind:
    """Accept one of a few values, all of one type."""

    def parse(value: object) -> object:
        if type(value) is not type(choices[0]) or value not in choices:
            raise ValueError
        return value

    listed = ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}"
    return Kind(listed, parse, is_text=isinstance(choices[0], str))


def size_bytes(value: str) -> int | None:
    """Return the bytes that a text such as "64MiB" stands for, None when it is no such text."""
    match = _SIZE.fullmatch(value.strip())
    return int(float(match[1]) * UNIT_BYTES[match[2]]) if match else None


def show_bytes(num_bytes: int) -> str:
    """Return bytes in the largest binary unit that divides them."""
    unit = max(
        (unit for unit, factor in UNIT_BYTES.items() if num_bytes % factor == 0),
        key=UNIT_BYTES.__getitem__,
    )
    return f"{num_bytes // UNIT_BYTES[unit]}{unit}"


def byte_size(low: int, high: int) -> Kind:
    """Accept a number of bytes of [low, high], bare or with a binary unit."""

    def parse(value: object) -> int:
        num_bytes = size_bytes(value) if isinstance(value, str) else value
        if isinstance(num_bytes, bool) or not isinstance(num_bytes, int):
            raise ValueError
        if not low <= num_bytes <= high:
            raise ValueError
        return num_bytes

    expected = f'bytes, or a size such as "64MiB", from {show_bytes(low)} to {show_bytes(high)}'
    return Kind(expected, parse, show=show_bytes)


def per_layer(kind: Kind) -> Kind:
    """Accept one value for all layers, or a list with one value a layer, which becomes a tuple."""

    def parse(value: object) -> Any:
        if isinstance(value, list):
            return tuple(kind.parse(item) for item in value)
        return kind.parse(value)

    return Kind(f"{kind.expected}, or a list of one a layer", parse)
