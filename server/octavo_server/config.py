"""The server's configuration: YAML and flags become frozen values; all mistakes are listed at once.

`ServerConfig` and `ModelKeys` declare the keys; nothing else lists them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from octavo_server.config_schema import (
    Key,
    Kind,
    boolean,
    byte_size,
    flag_of,
    integer,
    keys_of,
    number,
    one_of,
    per_layer,
    required,
    setting,
    show,
    show_bytes,
    size_bytes,
    text,
)
from octavo_server.config_source import (
    MODELS_KEY,
    Entry,
    Report,
    Section,
    Source,
    Where,
    flag_value,
    read_file,
    read_flags,
)
from octavo_server.model import BLOCK_SIZES, MAX_HEAD_DIM, ModelSpec, default_sm_scale

T = TypeVar("T")

MAX_TOKENS = 2**30
"""Most tokens of a context or a window, so that positions stay within int32."""
NO_HOST = "none"
"""The host of a server that listens on its Unix socket alone."""

_MAX_HEADS = 1024
_LOG_LEVELS = ("debug", "info", "warning", "error")
_BACKENDS = ("auto", "cpu", "cuda", "reference")


class ConfigError(Exception):
    """A configuration that cannot be served.

    Attributes:
        mistakes: Every mistake, as "place: key: what is wrong; what is expected".
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class MemorySize:
    """The size of a pool: bytes, or a fraction of what is free when it is allocated."""

    bytes: int | None = None
    fraction: float | None = None

    def resolve(self, free_bytes: int) -> int:
        """Return the size in bytes while `free_bytes` are free."""
        if self.bytes is not None:
            return self.bytes
        return int(free_bytes * (self.fraction or 0.0))


def _memory() -> Kind:
    def parse(value: object) -> MemorySize:
        if isinstance(value, str):
            percent = value.strip().removesuffix("%")
            if percent != value.strip():
                return _fraction(float(percent) / 100)
            num_bytes = size_bytes(value)
            if not num_bytes:
                raise ValueError
            return MemorySize(bytes=num_bytes)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        return _fraction(float(value))

    expected = 'a size such as "4GiB", or a share of the free memory such as "50%" or 0.5'
    return Kind(expected, parse, show=_show_memory)


def _fraction(fraction: float) -> MemorySize:
    if not 0.0 < fraction <= 1.0:
        raise ValueError
    return MemorySize(fraction=fraction)


def _show_memory(size: MemorySize) -> str:
    return f"{size.fraction:.0%}" if size.bytes is None else show_bytes(size.bytes)


DEFAULT_MEMORY = MemorySize(fraction=0.5)
"""The size of the pools, all together, of the models that give neither num_blocks nor memory."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model to serve and the size of its pool: exactly one of num_blocks and memory is given."""

    spec: ModelSpec
    num_blocks: int | None = None
    memory: MemorySize | None = None


DEFAULT_MAX_QUEUED_STEPS = 1024
"""Sixteen steps of each of 64 streams. Of one session of an 8B model they hold 12 MiB, of 64 sessions 0.75 GiB; in a
longer queue they would only wait longer."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `octavo-server serve` runs: the server's keys, and its models."""

    host: str = setting(
        "127.0.0.1",
        text("an address", r"\S+"),
        "Address to listen on; none = no port, only unix_socket.",
    )
    port: int = setting(
        50051, integer(0, 65535), "Port to listen on; 0 takes a free one, and prints it."
    )
    unix_socket: str = setting(
        "",
        text("the path of a file, or nothing", r"[^\0]*"),
        "Unix socket to listen on as well, as unix:PATH; only the server's user may connect.",
    )
    backend: str = setting(
        "auto", one_of(*_BACKENDS), "What runs the kernels; auto takes the fastest that works here."
    )
    num_threads: int = setting(0, integer(0, 1024), "Threads of the kernels; 0 = one a core.")
    pin_threads: bool = setting(
        False, boolean(), "Bind each thread of the cpu kernels to a core of its own."
    )
    max_sessions: int = setting(1024, integer(1, 2**20), "Most open sessions.")
    max_streams: int = setting(64, integer(1, 4096), "Most Decode and Append streams at a time.")
    max_steps_in_flight: int = setting(
        32, integer(1, 4096), "Steps of one stream that are worked on before more are read."
    )
    max_queued_steps: int = setting(
        DEFAULT_MAX_QUEUED_STEPS,
        integer(1, 2**20),
        "Most steps that wait for their launch; one more is refused.",
    )
    max_unary_calls: int = setting(64, integer(1, 1024), "Most unary calls at a time.")
    max_message_bytes: int = setting(
        64 * 2**20, byte_size(64 * 2**10, 2047 * 2**20), "Largest message that a client may send."
    )
    shared_memory: bool = setting(
        False, boolean(), "Share memory with clients on this machine that ask for it."
    )
    shared_memory_bytes: int = setting(
        32 * 2**20, byte_size(2**20, 2**32), "Memory shared with each stream that asks for it."
    )
    drain_timeout_s: float = setting(
        30.0, number(0, 3600), "Seconds that accepted work has to finish after SIGTERM."
    )
    log_level: str = setting("info", one_of(*_LOG_LEVELS), "Least important logs to write.")
    models: tuple[ModelConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model, as written."""

    name: str = required(
        text("a name of letters, digits and . _ : / -", r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}"),
        "What clients call the model; unique.",
    )
    num_layers: int = required(integer(1, 1024), "Layers.")
    num_q_heads: int = required(integer(1, _MAX_HEADS), "Query heads, a multiple of num_kv_heads.")
    num_kv_heads: int = required(integer(1, _MAX_HEADS), "Key/value heads.")
    head_dim: int = required(integer(8, MAX_HEAD_DIM, multiple_of=8), "Elements of one head.")
    max_context: int = required(integer(1, MAX_TOKENS), "Most tokens of one session.")
    block_size: int = setting(32, one_of(*BLOCK_SIZES), "Tokens of one block.")
    num_blocks: int | None = setting(
        None, integer(1, 2**31 - 1), "Size of the pool in blocks; instead of memory."
    )
    memory: MemorySize | None = setting(  # noqa: RUF009 - makes a field, not a value
        None,
        _memory(),
        f"Size of the pool; models without it and num_blocks share {_show_memory(DEFAULT_MEMORY)}.",
    )
    sm_scale: float | tuple[float, ...] | None = setting(
        None, per_layer(number(1e-6, 1e6)), "Softmax scale; 1/sqrt(head_dim) without it."
    )
    window: int | tuple[int, ...] = setting(
        0,
        per_layer(integer(0, MAX_TOKENS)),
        "Sliding window in tokens, its own token included; 0 = none.",
    )
    soft_cap: float | tuple[float, ...] = setting(
        0.0, per_layer(number(1e-3, 1e6, or_zero=True)), "Soft cap of the scores; 0 = none."
    )
    sinks: str | None = setting(
        None,
        text("the path of a safetensors file", r".+"),
        "safetensors file with the sink logits: tensor `sinks`, or its only one, "
        "float32 [num_layers, num_q_heads]. The path starts from the YAML file's folder.",
    )
    deterministic: bool = setting(
        False, boolean(), "Answers are the same bits whatever the batch and the number of threads."
    )


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A section and those of its values that are good in themselves."""

    section: Section
    values: dict[str, Any]

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def where(self, name: str) -> Where:
        return self.section.entries[name].where


def load_config(
    path: Path | None, flags: Mapping[str, str] | None = None, models: Sequence[str] = ()
) -> ServerConfig:
    """Read the configuration; flags override the file.

    Args:
        path: A YAML file, or None when flags say it all.
        flags: Texts by key of the server: {"max_message_bytes": "64MiB"}.
        models: One `name=tiny,num_layers=4,...` text a model; given any, the file's models go.

    Raises:
        ConfigError: With every mistake of file and flags.
    """
    report = Report()
    sources = [read_flags(flags or {}, models, report)]
    file = read_file(path, report) if path else None
    if file:
        sources.insert(0, file)
    server: dict[str, Any] = {}
    for source in sources:
        server |= _parse(source.server, ServerConfig, report).values
    if server.get("host") == NO_HOST and not server.get("unix_socket"):
        where = next(s.server.entries["host"].where for s in sources if "host" in s.server.entries)
        report.add(where, f"host: got {NO_HOST!r} without a unix_socket; expected an address")
    parsed = [_parse_models(source, report) for source in sources]
    served = next((models for models in reversed(parsed) if models), [])
    if not served and not report.mistakes:
        report.add(
            Where(str(path or "flags")), f"{MODELS_KEY}: missing; expected at least one model"
        )
    if report.mistakes:
        raise ConfigError(report.lines())
    return ServerConfig(**server, models=_model_configs(served))


def _parse_models(source: Source, report: Report) -> list[_Parsed]:
    models = [_parse(section, ModelKeys, report) for section in source.models or ()]
    for model in models:
        for name, mistake in _cross_mistakes(model.values):
            report.add(model.where(name), f"{name}: {mistake}")
        if model.has("sinks", "num_layers", "num_q_heads"):
            _load_sinks(model, report)
    _check_names(models, report)
    return models


def _parse(section: Section, keys_class: type, report: Report) -> _Parsed:
    keys = {key.name: key for key in keys_of(keys_class)}
    values = {}
    for name, entry in section.entries.items():
        try:
            values[name] = _parse_entry(keys, name, entry)
        except ValueError as error:
            has_said_name = entry.where.source == flag_of(name)
            report.add(entry.where, str(error) if has_said_name else f"{name}: {error}")
    for key in keys.values():
        if key.is_required and key.name not in section.entries:
            report.add(section.where, f"{key.name}: missing; expected {key.kind.expected}")
    return _Parsed(section, values)


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
        raise ValueError(f"got {show(value)}; expected {kind.expected}") from None


def _unknown_key(name: str, keys: Mapping[str, Key]) -> str:
    close = difflib.get_close_matches(name, keys, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(keys)}"
    return f"unknown key; {hint}"


def _cross_mistakes(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, mistake) of the rules that join several keys, as far as those are known."""
    num_q_heads, num_kv_heads = values.get("num_q_heads"), values.get("num_kv_heads")
    if num_q_heads and num_kv_heads and num_q_heads % num_kv_heads:
        yield (
            "num_q_heads",
            f"got {num_q_heads}; expected a multiple of num_kv_heads {num_kv_heads}",
        )
    if "num_blocks" in values and "memory" in values:
        yield "memory", "given beside num_blocks; expected one of the two"
    num_layers = values.get("num_layers")
    for name in ("sm_scale", "window", "soft_cap"):
        value = values.get(name)
        if isinstance(value, tuple) and num_layers and len(value) != num_layers:
            yield name, f"got a list of {len(value)}; expected one value a layer, {num_layers}"


def _check_names(models: Sequence[_Parsed], report: Report) -> None:
    seen: dict[str, Where] = {}
    for model in models:
        if not model.has("name"):
            continue
        name, where = model.values["name"], model.where("name")
        first = seen.setdefault(name, where)
        if first is not where:
            report.add(where, f"name: got {name!r}, as at {first}; expected a name of its own")


def _load_sinks(model: _Parsed, report: Report) -> None:
    """Put the tensor where the path was."""
    path = model.section.base_dir / model.values["sinks"]
    shape = (model.values["num_layers"], model.values["num_q_heads"])
    try:
        model.values["sinks"] = read_sinks(path, shape)
    except ValueError as error:
        report.add(model.where("sinks"), f"sinks: {error}")


def read_sinks(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the sink logits of a safetensors file: its tensor `sinks`, or its only tensor.

    Args:
        path: The file.
        shape: (num_layers, num_q_heads).

    Raises:
        ValueError: The file holds no finite float32 tensor of that shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a safetensors file") from None
    sinks = next(iter(tensors.values())) if len(tensors) == 1 else tensors.get("sinks")
    if sinks is None:
        names = ", ".join(sorted(tensors)) or "none"
        raise ValueError(f"{path} holds the tensors {names}; expected one, or one called sinks")
    if sinks.dtype != np.float32 or sinks.shape != shape:
        got = f"{list(sinks.shape)} {sinks.dtype}"
        raise ValueError(f"{path} holds {got}; expected {list(shape)} float32")
    if not np.isfinite(sinks).all():
        raise ValueError(f"{path} holds NaN or infinity; expected finite logits")
    return sinks


def _model_configs(models: Sequence[_Parsed]) -> tuple[ModelConfig, ...]:
    """Return the models; those without a size share the default evenly."""
    num_unsized = sum(not ({"num_blocks", "memory"} & set(model.values)) for model in models)
    share = MemorySize(fraction=(DEFAULT_MEMORY.fraction or 0.0) / max(num_unsized, 1))
    return tuple(_model_config(model, share) for model in models)


def _model_config(model: _Parsed, default_memory: MemorySize) -> ModelConfig:
    keys = ModelKeys(**model.values)
    spec = ModelSpec(
        name=keys.name,
        num_layers=keys.num_layers,
        num_q_heads=keys.num_q_heads,
        num_kv_heads=keys.num_kv_heads,
        head_dim=keys.head_dim,
        block_size=keys.block_size,
        max_context=keys.max_context,
        sm_scale=_by_layer(keys.sm_scale or default_sm_scale(keys.head_dim), keys.num_layers),
        window=_by_layer(keys.window, keys.num_layers),
        soft_cap=_by_layer(keys.soft_cap, keys.num_layers),
        sinks=model.values.get("sinks"),
        deterministic=keys.deterministic,
    )
    memory = keys.memory or (None if keys.num_blocks else default_memory)
    return ModelConfig(spec, keys.num_blocks, memory)


def _by_layer(value: T | tuple[T, ...], num_layers: int) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,) * num_layers
