"""The arguments of `octavo-load`, and the settings that they and the server make."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from octavo_client import REASONS, Model, ServerInfo
from octavo_client.access import access_of, add_access_flags
from octavo_client.load.chaos import EXPECTED, KINDS, NUM_SLOW_STEPS
from octavo_client.load.content import DTYPES
from octavo_client.load.distribution import SpecError, parse_lengths, parse_mix
from octavo_client.load.plan import LoadPoint, Workload
from octavo_client.load.results import Settings

DEFAULT_EXPECTED = ("QUEUE_FULL", "OUT_OF_BLOCKS", "SESSION_LIMIT", "STREAM_LIMIT", "TENANT_LIMIT")
"""What a server that has too much to do says."""

_CLIENT_REASONS = ("STEP_TIMEOUT", "CALL_TIMEOUT", "CONNECTION_LOST", "CLIENT_CLOSED")
_DEFAULT_DURATION_S = 10.0

Value = TypeVar("Value")


class UsageError(Exception):
    """An argument that cannot be; the text says why."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="octavo-load",
        description="Put load on an Octavo server and check its answers: closed loop (steps in flight) or open loop "
        "(Poisson arrivals, latency from the moment due), swept; sessions come and go.",
        epilog="Lengths are numbers, ranges, or a mix of both: 64, 16-128, 64:0.9,1024-4096:0.1. Exit code 1: a wrong "
        "answer, an unexpected error, or something left on the server; 2: mistakes in the arguments; 130: interrupted.",
        allow_abbrev=False,
    )
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--target", metavar="HOST:PORT", help="a running server")
    server.add_argument(
        "--start-server",
        metavar="FLAGS",
        help="start one on loopback with these flags of `octavo-server serve`, as one argument",
    )
    add_access_flags(parser)
    _add_load(parser.add_argument_group("load"))
    _add_workload(parser.add_argument_group("workload"))
    _add_checks(parser.add_argument_group("checks and faults"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    loop = group.add_mutually_exclusive_group()
    several = "N[,N...]"
    loop.add_argument(
        "--concurrency", metavar=several, help="steps always in flight; several: a sweep (1)"
    )
    loop.add_argument(
        "--rate", metavar=several, help="steps that become due a second; several: a sweep"
    )
    add = group.add_argument
    add("--max-in-flight", type=int, default=64, metavar="N", help="with --rate (%(default)s)")
    add("--duration", type=float, metavar="S", help="measured seconds of each load (10)")
    add("--steps", type=int, metavar="N", help="measured steps of each load, instead of seconds")
    add("--warm-up", type=float, default=2.0, metavar="S", help="seconds before (%(default)s)")
    add("--processes", type=int, default=1, metavar="N", help="that make the load (%(default)s)")
    add(
        "--steps-per-stream",
        type=int,
        metavar="N",
        help="steps in flight that share a Decode stream (1; 8 with --rate)",
    )
    add("--timeout", type=float, default=30.0, metavar="S", help="of a step (%(default)s)")


def _add_workload(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model",
        action="append",
        metavar="NAME[=WEIGHT]",
        help="repeat it for a mix; all models of the server by default",
    )
    add("--prompt-tokens", default="128", metavar="LENGTHS", help="(%(default)s)")
    add("--output-tokens", default="32", metavar="LENGTHS", help="then close (%(default)s)")
    add("--sessions-per-step", default="1", metavar="LENGTHS", help="(%(default)s)")
    add("--sessions", type=int, metavar="N", help="open at once; as many as steps need by default")
    add("--layers", type=int, metavar="N", help="layers of a token, from the first on (all)")
    add("--dtype", choices=sorted(DTYPES), default="float16", help="of q, k and v (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn (%(default)s)")


def _add_checks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--check", type=float, default=0.02, metavar="SHARE", help="of the answers (%(default)s)")
    add(
        "--check-when",
        choices=("after", "during"),
        default="after",
        help="each load, or while it is made, which takes CPU time from it (%(default)s)",
    )
    add("--check-processes", type=int, default=1, metavar="N", help="(%(default)s)")
    add(
        "--expect",
        metavar="REASON[,REASON...]",
        help=f"errors to count and survive, or none ({','.join(DEFAULT_EXPECTED)})",
    )
    add(
        "--stage-times",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the steps ask what they cost on the server (%(default)s)",
    )
    add("--shared", action="store_true", help="others use the server: what it holds is not judged")
    add("--watch", type=int, metavar="PID", help="the server's process: its memory and threads")
    add("--chaos", metavar="KIND[,KIND...]", help=f"faults to inject: {', '.join(KINDS)}, or all")
    add("--chaos-rate", type=float, default=0.01, metavar="SHARE", help="of steps (%(default)s)")
    add("--kill-every", type=float, default=5.0, metavar="S", help="(%(default)s)")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--csv", type=Path, metavar="FILE", help="a line for each load")
    add("--json", type=Path, metavar="FILE", help="everything")
    add("--html", type=Path, metavar="FILE", help="a report with plots, which needs no network")
    add("--plot", type=Path, metavar="FILE", help="the plots alone, as SVG")


def settings_of(args: argparse.Namespace, target: str, info: ServerInfo) -> Settings:
    """Return what is to be run.

    Args:
        args: The arguments.
        target: The server's address.
        info: What it says of itself.

    Raises:
        UsageError: An argument cannot be, or does not fit the server.
    """
    try:
        workload = _workload(args, target, info)
        points = _points(args, workload)
    except SpecError as error:
        raise UsageError(str(error)) from None
    for name in workload.mix.names:
        _check_lengths(workload, workload.models[name])
    has_steps = args.steps is not None
    if args.duration is None and not has_steps:
        args.duration = _DEFAULT_DURATION_S
    if has_steps and "kill" in workload.chaos:
        raise UsageError("--chaos kill needs --duration: a killed process takes its count with it")
    return Settings(
        workload=workload,
        points=points,
        num_processes=_at_least("--processes", args.processes, 1),
        duration_s=None if args.duration is None else _positive("--duration", args.duration),
        warm_up_s=_at_least("--warm-up", args.warm_up, 0),
        max_steps=_at_least("--steps", args.steps, 1) if has_steps else None,
        num_checkers=_at_least("--check-processes", args.check_processes, 1),
        checks_at_once=args.check_when == "during",
        kill_every_s=_positive("--kill-every", args.kill_every),
        is_shared=args.shared,
        watched_id=args.watch,
    )


def _workload(args: argparse.Namespace, target: str, info: ServerInfo) -> Workload:
    mix = parse_mix(args.model or list(info.models))
    missing = [name for name in mix.names if name not in info.models]
    if missing:
        raise UsageError(f"the server has no model {missing[0]}, it has {', '.join(info.models)}")
    chaos = _chaos(args.chaos)
    default_depth = 8 if args.rate else 1
    return Workload(
        target=target,
        mix=mix,
        models={name: info.models[name] for name in mix.names},
        dtype=args.dtype,
        seed=_at_least("--seed", args.seed, 0),
        prompt_tokens=parse_lengths(args.prompt_tokens),
        output_tokens=parse_lengths(args.output_tokens),
        sessions_per_step=parse_lengths(args.sessions_per_step),
        layers=None if args.layers is None else _at_least("--layers", args.layers, 1),
        steps_per_stream=_at_least("--steps-per-stream", args.steps_per_stream or default_depth, 1),
        check=_share("--check", args.check),
        stage_times=_share("--stage-times", args.stage_times),
        timeout_s=_positive("--timeout", args.timeout),
        expected=_expected(args.expect, chaos),
        chaos=chaos,
        chaos_rate=_share("--chaos-rate", args.chaos_rate),
        access=access_of(args),
    )


def _points(args: argparse.Namespace, workload: Workload) -> tuple[LoadPoint, ...]:
    if args.rate:
        lanes = _at_least("--max-in-flight", args.max_in_flight, 1)
        rates = _numbers("--rate", args.rate, float)
        return tuple(
            LoadPoint("rate", rate, lanes, _num_groups(args, workload, lanes)) for rate in rates
        )
    counts = _numbers("--concurrency", args.concurrency or "1", int)
    return tuple(
        LoadPoint("concurrency", lanes, lanes, _num_groups(args, workload, lanes))
        for lanes in counts
    )


def _num_groups(args: argparse.Namespace, workload: Workload, num_lanes: int) -> int:
    """Return how many sets of sessions there are; --sessions is met as the mean of their sizes has it."""
    if args.sessions is None:
        return num_lanes
    sizes = workload.sessions_per_step
    means = [(span.low + span.high) / 2 for span in sizes.spans]
    mean = sum(m * w for m, w in zip(means, sizes.weights, strict=True)) / sum(sizes.weights)
    num_groups = int(args.sessions / mean + 0.5)
    if num_groups < num_lanes:
        least = f"{num_lanes * mean:g}"
        raise UsageError(
            f"--sessions must be at least {least}, so that {num_lanes} steps can be in flight, got {args.sessions}"
        )
    return num_groups


def _check_lengths(workload: Workload, model: Model) -> None:
    most_new = max(workload.output_tokens.most, NUM_SLOW_STEPS if "slow" in workload.chaos else 0)
    most = workload.prompt_tokens.most + most_new
    if most > model.max_context:
        raise UsageError(
            f"--prompt-tokens and --output-tokens must fit the {model.max_context} tokens of model {model.name} "
            f"together, they come to {most}"
        )


def _chaos(text: str | None) -> frozenset[str]:
    kinds = frozenset((text or "").split(",")) - {""}
    if kinds == {"all"}:
        return frozenset(KINDS)
    unknown = sorted(kinds - set(KINDS))
    if unknown:
        raise UsageError(f"--chaos has no kind {unknown[0]}, it has {', '.join(KINDS)}, and all")
    return kinds


def _expected(text: str | None, chaos: frozenset[str]) -> frozenset[str]:
    by_chaos = {reason for kind in chaos for reason in EXPECTED.get(kind, ())}
    if text is None:
        return frozenset(DEFAULT_EXPECTED) | by_chaos
    named = set() if text == "none" else set(text.split(","))
    unknown = sorted(named - set(REASONS) - set(_CLIENT_REASONS))
    if unknown:
        known = ", ".join([*REASONS, *_CLIENT_REASONS])
        raise UsageError(f"--expect has no reason {unknown[0]!r}, it has {known}")
    return frozenset(named | by_chaos)


def _numbers(name: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{name} must be numbers with commas between, got {text!r}") from None
    for number in numbers:
        _positive(name, number)  # type: ignore[arg-type]
    return numbers


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} must be more than 0, got {value}")
    return value


def _at_least(name: str, value: Value, least: int) -> Value:
    if not least <= value < float("inf"):  # type: ignore[operator]
        raise UsageError(f"{name} must be {least} or more, got {value}")
    return value


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UsageError(f"{name} must be from 0 to 1, got {value}")
    return value
