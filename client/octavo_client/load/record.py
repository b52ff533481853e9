"""A run as JSON and CSV."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from octavo_client import ServerInfo
from octavo_client._types import Model
from octavo_client.load.figures import figures_of, warnings_of
from octavo_client.load.histogram import Histogram, bucket_bounds
from octavo_client.load.results import PointResult, RunResult, Settings
from octavo_client.load.tally import Tally

FORMAT = 1
_PACKAGES = ("octavo", "grpcio", "numpy", "protobuf")
_NOT_COUNTS = ("last_ns",)


def describe(
    settings: Settings, info: ServerInfo, run: RunResult, command: Sequence[str]
) -> dict[str, Any]:
    """Return all that is known about a run, as JSON can hold it."""
    workload = settings.workload
    return {
        "format": FORMAT,
        "command": list(command),
        "seed": workload.seed,
        "versions": versions(),
        "server": {
            "target": workload.target,
            "version": info.version,
            "backend": info.backend,
            "backend_description": info.backend_description,
            "max_steps_in_flight": info.max_steps_in_flight,
        },
        "models": [_model(settings, model) for model in workload.models.values()],
        "workload": _workload(settings),
        "points": [_point(result) for result in run.points],
        "num_wrong": run.num_wrong,
        "faults": run.all_faults,
        "num_left_open": run.num_left_open,
        "server_process": [] if run.watch is None else [asdict(s) for s in run.watch.sights],
        "was_restored": run.was_restored,
        "is_interrupted": run.is_interrupted,
    }


def versions() -> dict[str, str]:
    """Return what made the load, by name."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_csv(run: RunResult, file: TextIO) -> None:
    """Write one line a load point."""
    rows = [_csv_row(result) for result in run.points]
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["kind", "value"])
    writer.writeheader()
    writer.writerows(rows)


def save_text(path: Path, text: str) -> None:
    """Write a file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _csv_row(result: PointResult) -> dict[str, Any]:
    figures = {
        key: "" if value is None else round(value, 3) for key, value in figures_of(result).items()
    }
    return {"kind": result.point.kind, "value": result.point.value, **figures}


def _model(settings: Settings, model: Model) -> dict[str, Any]:
    """Return a model with the shapes of a step's tensors, one row a session."""
    workload = settings.workload
    most = workload.sessions_per_step.most
    rows = "num_sessions" if workload.sessions_per_step.least != most else most
    q, kv = [rows, model.num_q_heads, model.head_dim], [rows, model.num_kv_heads, model.head_dim]
    shape = {each.name: getattr(model, each.name) for each in fields(model) if each.name != "sinks"}
    return {
        **{name: list(x) if isinstance(x, tuple) else x for name, x in shape.items()},
        "has_sinks": model.sinks is not None,
        "num_layers_used": workload.num_layers(model.name),
        "step": {"dtype": workload.dtype, "q": q, "k": kv, "v": kv, "out": q},
    }


def _workload(settings: Settings) -> dict[str, Any]:
    workload = settings.workload
    return {
        "models": dict(zip(workload.mix.names, workload.mix.weights, strict=True)),
        "dtype": workload.dtype,
        "prompt_tokens": str(workload.prompt_tokens),
        "output_tokens": str(workload.output_tokens),
        "sessions_per_step": str(workload.sessions_per_step),
        "steps_per_stream": workload.steps_per_stream,
        "check": workload.check,
        "stage_times": workload.stage_times,
        "timeout_s": workload.timeout_s,
        "expected": sorted(workload.expected),
        "chaos": sorted(workload.chaos),
        "chaos_rate": workload.chaos_rate,
        "num_processes": settings.num_processes,
        "duration_s": settings.duration_s,
        "warm_up_s": settings.warm_up_s,
        "max_steps": settings.max_steps,
        "checks_at_once": settings.checks_at_once,
    }


def _point(result: PointResult) -> dict[str, Any]:
    return {
        "kind": result.point.kind,
        "value": result.point.value,
        "num_lanes": result.point.num_lanes,
        "num_groups": result.point.num_groups,
        "elapsed_s": result.elapsed_s,
        "is_complete": result.is_complete,
        "figures": dict(figures_of(result)),
        "counts": _counts(result.tally),
        "latency_ns": _buckets(result.tally.latency),
        "lateness_ns": _buckets(result.tally.lateness),
        "prompt_ns": _buckets(result.tally.prompts),
        "over_time": [_moment(result, *item) for item in sorted(result.moments.items())],
        "cores_used": result.cpu_shares,
        "checks": asdict(result.checks),
        "warnings": warnings_of(result),
    }


def _counts(tally: Tally) -> Mapping[str, Any]:
    values = {each.name: getattr(tally, each.name) for each in fields(tally)}
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not isinstance(value, Histogram) and name not in _NOT_COUNTS
    }


def _buckets(histogram: Histogram) -> list[list[int]]:
    """Return [from, to, count] of each bucket."""
    return [[*bucket_bounds(b), count] for b, count in sorted(histogram.counts.items())]


def _moment(result: PointResult, moment: int, latency: Histogram) -> dict[str, float]:
    p50, p99 = latency.percentiles([50, 99])
    return {
        "at_s": moment * result.moment_s,
        "steps": latency.num_values,
        "p50_us": p50 / 1e3,
        "p99_us": p99 / 1e3,
    }
