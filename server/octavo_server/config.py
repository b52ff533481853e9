"""Reads the configuration: YAML and flags become the values that config_keys declares; mistakes are listed at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from octavo_server.config_keys import (
    DEFAULT_MEMORY,
    MemorySize,
    ModelConfig,
    ModelKeys,
    ServerConfig,
)
from octavo_server.config_rules import server_mistakes
from octavo_server.config_section import Parsed, parse_section
from octavo_server.config_source import (
    MODELS_KEY,
    Report,
    Source,
    Where,
    read_file,
    read_flags,
)
from octavo_server.model import ModelSpec, default_sm_scale

T = TypeVar("T")


class ConfigError(Exception):
    """A configuration that cannot be served.

    Attributes:
        mistakes: Every mistake, as "place: key: what is wrong; what is expected".
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


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
        server |= parse_section(source.server, ServerConfig, report).values
    _check_server(server, sources, report)
    parsed = [_parse_models(source, report) for source in sources]
    served = next((models for models in reversed(parsed) if models), [])
    if not served and not report.mistakes:
        report.add(
            Where(str(path or "flags")), f"{MODELS_KEY}: missing; expected at least one model"
        )
    if report.mistakes:
        raise ConfigError(report.lines())
    return ServerConfig(**server, models=_model_configs(served))


def _check_server(values: Mapping[str, Any], sources: Sequence[Source], report: Report) -> None:
    for name, mistake in server_mistakes(values):
        where = next(
            s.server.entries[name].where for s in reversed(sources) if name in s.server.entries
        )
        report.add_of_key(where, name, mistake)


def _parse_models(source: Source, report: Report) -> list[Parsed]:
    models = [parse_section(section, ModelKeys, report) for section in source.models or ()]
    for model in models:
        for name, mistake in _cross_mistakes(model.values):
            report.add(model.where(name), f"{name}: {mistake}")
        if model.has("sinks", "num_layers", "num_q_heads"):
            _load_sinks(model, report)
    _check_names(models, report)
    return models


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


def _check_names(models: Sequence[Parsed], report: Report) -> None:
    seen: dict[str, Where] = {}
    for model in models:
        if not model.has("name"):
            continue
        name, where = model.values["name"], model.where("name")
        first = seen.setdefault(name, where)
        if first is not where:
            report.add(where, f"name: got {name!r}, as at {first}; expected a name of its own")


def _load_sinks(model: Parsed, report: Report) -> None:
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


def _model_configs(models: Sequence[Parsed]) -> tuple[ModelConfig, ...]:
    """Return the models; those without a size share the default evenly."""
    num_unsized = sum(not ({"num_blocks", "memory"} & set(model.values)) for model in models)
    share = MemorySize(fraction=(DEFAULT_MEMORY.fraction or 0.0) / max(num_unsized, 1))
    return tuple(_model_config(model, share) for model in models)


def _model_config(model: Parsed, default_memory: MemorySize) -> ModelConfig:
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
