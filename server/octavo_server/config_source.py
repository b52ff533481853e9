"""Readers of the configuration: a YAML file and flags become values with their places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from octavo_server.config_schema import flag_of

MODELS_KEY = "models"
# YAML 1.1 wants a dot and a sign in 1e-3; people write it without.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
_SCALARS = yaml.constructor.SafeConstructor()
_TYPED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}

_Located = tuple["Where", yaml.Node]


@dataclass(frozen=True, slots=True, order=True)
class Where:
    """Where a value was written: a file's line, or a flag."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(slots=True)
class Report:
    """The mistakes found so far.

    Attributes:
        mistakes: Each with its place.
        quotes: Whether the text of one may quote values that stand where none should; they may be secret.
    """

    mistakes: list[tuple[Where, str]] = field(default_factory=list)
    quotes: bool = True

    def add(self, where: Where, text: str) -> None:
        """Record one mistake."""
        self.mistakes.append((where, text))

    def add_of_key(self, where: Where, name: str, text: str) -> None:
        """Record one mistake of a key, and name the key where its place does not."""
        self.add(where, text if where.source == flag_of(name) else f"{name}: {text}")

    def lines(self) -> tuple[str, ...]:
        """Return the mistakes in the order of the file's lines, each behind its place."""
        return tuple(f"{where}: {text}" for where, text in sorted(self.mistakes))


@dataclass(frozen=True, slots=True)
class Entry:
    """One value as written; `is_flag` values are text still."""

    value: object
    where: Where
    is_flag: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping of keys to values; `base_dir` is what relative paths start from."""

    where: Where
    entries: dict[str, Entry]
    base_dir: Path


@dataclass(frozen=True, slots=True)
class Source:
    """What one file, or all flags, say: the server's section and, where given, the models."""

    server: Section
    models: tuple[Section, ...] | None = None


def read_flags(settings: Mapping[str, str], models: Sequence[str], report: Report) -> Source:
    """Read flags: texts by key of the server, and one `name=...,num_layers=...` text a model."""
    entries = {
        name: Entry(text, Where(flag_of(name)), is_flag=True) for name, text in settings.items()
    }
    sections = tuple(
        _read_model_flag(Where(f"--model #{idx}"), text, report)
        for idx, text in enumerate(models, start=1)
    )
    return Source(Section(Where("flags"), entries, Path()), sections or None)


def _read_model_flag(where: Where, text: str, report: Report) -> Section:
    entries: dict[str, Entry] = {}
    for part in _COMMA_OUTSIDE_BRACKETS.split(text):
        name, has_value, value = (piece.strip() for piece in part.partition("="))
        if not has_value:
            report.add(where, f"{part.strip()!r} is no key=value; expected name=...,num_layers=...")
        elif name in entries:
            report.add(where, f"{name}: given twice; expected once")
        else:
            entries[name] = Entry(value, where, is_flag=True)
    return Section(where, entries, Path())


def flag_value(text: str) -> object:
    """Return a flag's text as the value that YAML would read from it."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return text if node is None else _value_of(node)
    except (yaml.YAMLError, ValueError):
        return text


def read_file(path: Path, report: Report) -> Source | None:
    """Read a YAML file; None, and one mistake, where it cannot be read at all."""
    top = Where(str(path), 1)
    try:
        data = path.read_bytes()
    except OSError as error:
        report.add(Where(str(path)), f"cannot be read: {error.strerror}; expected a file")
        return None
    nodes = _read_top(data, top, "port: 50051", report)
    if nodes is None:
        return None
    where, models_node = nodes.pop(MODELS_KEY, (top, None))
    server = _read_section(top, nodes, path.parent, report)
    if models_node is None:
        return Source(server)
    models = _read_sections(where, MODELS_KEY, models_node, path.parent, report)
    return Source(server, tuple(models))


def read_list(path: Path, data: bytes, key: str, report: Report) -> list[Section]:
    """Read what a YAML file holds that has one key, with a list of sections.

    Args:
        path: Where it comes from.
        data: All of it.
        key: The key.
        report: Takes the mistakes.
    """
    top = Where(str(path), 1)
    nodes = _read_top(data, top, f"{key}:", report)
    if nodes is None:
        return []
    where, node = nodes.pop(key, (top, None))
    for name, (place, _) in nodes.items():
        report.add(place, f"{name}: unknown key; expected {key} alone")
    if node is None:
        report.add(where, f"{key}: missing; expected a list")
        return []
    return list(_read_sections(where, key, node, path.parent, report))


def _read_top(data: bytes, top: Where, example: str, report: Report) -> dict[str, _Located] | None:
    """Return the nodes of a file's keys; None, and one mistake, where it is no mapping."""
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        _report_syntax(error, top, report)
        return None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        got = _name_of(root, quotes=report.quotes)
        report.add(top, f"holds {got}; expected keys such as `{example}`")
        return None
    return _nodes_of(root, top, report)


def _report_syntax(error: Exception, top: Where, report: Report) -> None:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 0
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    report.add(Where(top.source, line), f"is not YAML: {problem}; expected `key: value` lines")


def _nodes_of(node: yaml.MappingNode, file: Where, report: Report) -> dict[str, _Located]:
    nodes: dict[str, _Located] = {}
    for key_node, value_node in node.value:
        where = _at(file, key_node)
        name = str(key_node.value)
        if not isinstance(key_node, yaml.ScalarNode):
            report.add(where, f"a key is {_name_of(key_node)}; expected a name")
        elif name in nodes:
            report.add(
                where, f"{name}: given again after line {nodes[name][0].line}; expected once"
            )
        else:
            nodes[name] = (where, value_node)
    return nodes


def _read_sections(
    where: Where, key: str, node: yaml.Node, base_dir: Path, report: Report
) -> Iterator[Section]:
    if not isinstance(node, yaml.SequenceNode):
        got = _name_of(node, quotes=report.quotes)
        report.add(where, f"{key}: got {got}; expected a list of {key}")
        return
    for item in node.value:
        place = _at(where, item)
        if isinstance(item, yaml.MappingNode):
            yield _read_section(place, _nodes_of(item, place, report), base_dir, report)
        else:
            got = _name_of(item, quotes=report.quotes)
            report.add(place, f"{key}: got {got}; expected keys such as `name: llama`")


def _read_section(
    where: Where, nodes: Mapping[str, _Located], base_dir: Path, report: Report
) -> Section:
    entries = {}
    for name, (place, node) in nodes.items():
        try:
            entries[name] = Entry(_value_of(node), place)
        except ValueError as error:
            got = error if report.quotes else "what is not shown here"
            report.add(place, f"{name}: got {got}; expected a plain value or a list of them")
    return Section(where, entries, base_dir)


def _value_of(node: yaml.Node) -> object:
    """Return a scalar or a list of scalars; ValueError for anything deeper."""
    if isinstance(node, yaml.SequenceNode):
        return [_scalar_of(item) for item in node.value]
    return _scalar_of(node)


def _scalar_of(node: yaml.Node) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(_name_of(node))
    if node.tag in _TYPED_TAGS:
        return _typed_scalar(node)
    if node.style is None and _EXPONENT.fullmatch(node.value):
        return float(node.value)
    return str(node.value)


def _typed_scalar(node: yaml.ScalarNode) -> object:
    try:
        return _SCALARS.construct_object(node)
    except (ValueError, KeyError):
        # Only an explicit tag gets here, or an int of thousands of digits.
        raise ValueError(f"{_name_of(node)} as {node.tag.rpartition(':')[2]}") from None


def _name_of(node: yaml.Node, *, quotes: bool = True) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"the value {node.value!r}" if quotes else "a value"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _at(file: Where, node: yaml.Node) -> Where:
    return Where(file.source, node.start_mark.line + 1)
