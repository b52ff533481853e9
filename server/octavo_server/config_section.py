"""Turns a section of the configuration into values, by the keys that its dataclass declares."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo_server.config_schema import Key, keys_of, show
from octavo_server.config_source import Entry, Report, Section, Where, flag_value


@dataclass(frozen=True, slots=True)
class Parsed:
    """A section and those of its values that are good in themselves."""

    section: Section
    values: dict[str, Any]

    def has(self, *names: str) -> bool:
        """Whether these keys were given, and well."""
        return all(name in self.values for name in names)

    def where(self, name: str) -> Where:
        """Return where a key stands."""
        return self.section.entries[name].where


def parse_section(section: Section, keys_class: type, report: Report) -> Parsed:
    """Parse every key of a section, and report those that are unknown, wrong or missing."""
    keys = {key.name: key for key in keys_of(keys_class)}
    values = {}
    for name, entry in section.entries.items():
        try:
            values[name] = _parse_entry(keys, name, entry)
        except ValueError as error:
            report.add_of_key(entry.where, name, str(error))
    for key in keys.values():
        if key.is_required and key.name not in section.entries:
            report.add(section.where, f"{key.name}: missing; expected {key.kind.expected}")
    return Parsed(section, values)


def _parse_entry(keys: Mapping[str, Key], name: str, entry: Entry) -> Any:
    if name not in keys:
        raise ValueError(_unknown_key(name, keys))
    kind = keys[name].kind
    value = entry.value
    if entry.is_flag and not kind.is_text:
        value = flag_value(str(value))
    try:
        return kind.parse(value)
    except ValueError:
        got = "what is not shown here" if kind.is_secret else show(value)
        raise ValueError(f"got {got}; expected {kind.expected}") from None


def _unknown_key(name: str, keys: Mapping[str, Key]) -> str:
    close = difflib.get_close_matches(name, keys, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(keys)}"
    return f"unknown key; {hint}"
