"""The command `octavo-demo`: text, speed and quality of a real model whose KV cache is on a server."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console
from safetensors import SafetensorError
from threadpoolctl import threadpool_limits

from octavo_client import Client, ConnectionLost, Model, OctavoError, Retry
from octavo_client.access import NO_ACCESS, Endpoint, access_of, add_access_flags
from octavo_client.demo.display import show_phase, show_texts, show_waiting, text_panels
from octavo_client.demo.local_server import ServerStartError, local_server, model_flag
from octavo_client.demo.model import (
    DEFAULT_WEIGHTS,
    ModelConfig,
    TinyLlama,
    decode_text,
    encode_text,
)
from octavo_client.demo.orchestrator import MODEL_NAME, Orchestrator
from octavo_client.demo.quality import Quality, QualityPlan, measure_quality
from octavo_client.demo.report import CacheUse, Speed, measure_table
from octavo_client.demo.sampling import Sampler
from octavo_client.demo.served_model import differences

DEFAULT_PROMPTS = (
    "In the beginning",
    "And the king said unto ",
    "The word of the LORD came ",
    "Blessed is the man that ",
)

NUM_TEXTS = 4
"""Texts that the quality is measured on, side by side."""

RETRY = Retry(max_attempts=4)
"""Gives up within seconds: a server that is not there should not look like one that is slow."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

PLAIN_WIDTH = 110
"""Columns where there is no terminal: the table's lines stay whole."""


class DemoError(Exception):
    """The demo cannot run; the text says why, and what to do."""


class UsageError(DemoError):
    """An argument that cannot be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0 when the quality is as it must be, 1 when it is not or the demo cannot run, 2 for mistakes in the
        arguments, 130 when interrupted. Raises SystemExit when told to end by a signal.
    """
    args = make_parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        # One thread for BLAS: the matrices are small, and threads that wait for each other by spinning take the
        # cores from the server beside them.
        with _ending_on_signals(), threadpool_limits(1, user_api="blas"):
            return _run(args, console)
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except (DemoError, ServerStartError, OctavoError) as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _fail(text: str, code: int) -> int:
    print(f"octavo-demo: {text}", file=sys.stderr)
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="octavo-demo",
        description="Decode a small real model whose KV cache and attention are on an Octavo server: "
        "text of several sessions at once, then speed, cache size and quality in one table.",
        epilog="Exit code 1: perplexity rose by more than 0.5%, agreement was under 99%, or it could not run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="a session's prompt; repeat it for more")
    add("--target", metavar="HOST:PORT", help="a running server; without it, one is started here")
    add(
        "--backend", help="backend of the server that is started here: auto, cpu, cuda or reference"
    )
    add("--tokens", type=int, default=240, metavar="N", help="tokens per session (%(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 = greedy (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn (%(default)s)")
    add(
        "--quality-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens to compare with exact attention, 0 = none (%(default)s)",
    )
    add_access_flags(parser)
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, metavar="FILE", help="of another model")
    return parser


def _run(args: argparse.Namespace, console: Console) -> int:
    model = _load(args.weights)
    prompts = tuple(args.prompt or DEFAULT_PROMPTS)
    plan = quality_plan(args, model.config)
    _check(args, prompts, model.config)
    phases = (
        # Nothing is computed for the last new token, so no K and V of it are held.
        [len(prompt.encode()) + args.tokens - 1 for prompt in prompts],
        [plan.text_len] * plan.num_texts,
    )
    num_seqs = max(map(len, phases))
    with (
        _server(args, console, model_flag(MODEL_NAME, model.config, num_seqs)) as target,
        Endpoint(target, access_of(args)).client(retry=RETRY) as client,
    ):
        served = _connect(client, target, model.config, phases, console)
        orchestrate = functools.partial(Orchestrator, client, model)
        speed, cache = _generate(args, console, orchestrate, prompts, served)
        quality = _measure(console, orchestrate, model, plan) if args.quality_tokens else None
    console.print(measure_table(f"{MODEL_NAME} through Octavo", speed, cache, quality))
    return _verdict(quality)


def _load(weights: Path) -> TinyLlama:
    try:
        return TinyLlama.load(weights)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DemoError(f"cannot load the weights {weights}: {error}") from error


def quality_plan(args: argparse.Namespace, config: ModelConfig) -> QualityPlan:
    """Return the plan for --quality-tokens: its texts as long as they may be, a quarter of each token by token."""
    most = NUM_TEXTS * config.max_context
    if not 0 <= args.quality_tokens <= most:
        raise UsageError(f"--quality-tokens must be from 0 to {most}, got {args.quality_tokens}")
    text_len = -(-args.quality_tokens // NUM_TEXTS)
    return QualityPlan(NUM_TEXTS, text_len, num_single=-(-text_len // 4), seed=args.seed)


def _check(args: argparse.Namespace, prompts: Sequence[str], config: ModelConfig) -> None:
    if args.target and args.backend:
        raise UsageError(
            "--backend is for the server that is started here: leave out one of --target and --backend"
        )
    _utf8("--target", args.target or "")
    access = access_of(args)
    if access != NO_ACCESS and not args.target:
        raise UsageError("flags for TLS and tokens are for the server that --target names")
    try:
        access.check(args.target or "")
    except ValueError as error:
        raise UsageError(str(error)) from None
    most_tokens = config.max_context - 1
    if not 2 <= args.tokens <= most_tokens:
        raise UsageError(f"--tokens must be from 2 to {most_tokens}, got {args.tokens}")
    if args.seed < 0 or not 0 <= args.temperature < float("inf"):
        raise UsageError("--seed and --temperature must be 0 or more")
    for prompt in prompts:
        num_bytes = len(_utf8("a prompt", prompt))
        if not 0 < num_bytes <= config.max_context - args.tokens:
            raise UsageError(
                f"a prompt must have from 1 to {config.max_context - args.tokens} bytes, so that it fits the "
                f"model's context of {config.max_context} with --tokens {args.tokens}; got {num_bytes} bytes"
            )


def _utf8(what: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8 arrive as surrogates
        raise UsageError(f"{what} must be UTF-8, got {text!a}") from None


@contextmanager
def _server(args: argparse.Namespace, console: Console, model_text: str) -> Iterator[str]:
    """Yield the address of the server to use; start and end one where none was named."""
    if args.target:
        yield args.target
        return
    flags = ["--backend", args.backend or "auto", "--model", model_text]
    with ExitStack() as stack:
        with show_waiting(console, "starting octavo-server") as tell:
            target = stack.enter_context(local_server(flags, tell))
        yield target


def _connect(
    client: Client,
    target: str,
    config: ModelConfig,
    phases: Sequence[Sequence[int]],
    console: Console,
) -> Model:
    """Return the server's model, after checking that it is the demo's and has room for it."""
    try:
        info = client.server_info()
    except ConnectionLost as error:
        raise DemoError(f"no octavo-server answers at {target}: {error}") from error
    served = info.models.get(MODEL_NAME)
    num_seqs = max(map(len, phases))
    start = f"octavo-server serve --model {model_flag(MODEL_NAME, config, num_seqs)}"
    if served is None:
        names = ", ".join(info.models)
        raise DemoError(f"{target} must serve {MODEL_NAME}, it serves {names}; run: {start}")
    wanted = " and ".join(differences(served, config, phases))
    if wanted:
        raise DemoError(f"{MODEL_NAME} at {target} must have {wanted}; run: {start}")
    console.print(
        f"octavo-server {info.version} at {target}: {info.backend_description}", markup=False
    )
    return served


def _generate(
    args: argparse.Namespace,
    console: Console,
    orchestrate: Callable[[int], Orchestrator],
    prompts: Sequence[str],
    served: Model,
) -> tuple[Speed, CacheUse]:
    """Stream every prompt's continuation, and measure."""
    sampler = Sampler(args.temperature, seed=args.seed)
    with orchestrate(len(prompts)) as orchestrator:
        with show_phase(console, "uploading the prompts' K and V") as progress:
            logits = orchestrator.prefill([encode_text(prompt) for prompt in prompts], progress)
        drawn = []
        with show_texts(console, prompts, args.tokens) as show:
            started = time.perf_counter()
            for tokens in orchestrator.generate(logits, args.tokens, sampler):
                drawn.append(tokens)
                texts = [decode_text(text) for text in np.stack(drawn, axis=1)]
                show(len(drawn), texts)
            seconds = time.perf_counter() - started
        num_held = sum(session.lengths[0] for session in orchestrator.sessions)
        step_seconds = orchestrator.attention.step_seconds
    console.print(text_panels(prompts, texts))
    num_decoded = (args.tokens - 1) * len(prompts)  # the first ones come from the prompts' logits
    speed = Speed(len(prompts), num_decoded, seconds, step_seconds)
    return speed, CacheUse.of(served, num_held)


def _measure(
    console: Console,
    orchestrate: Callable[[int], Orchestrator],
    model: TinyLlama,
    plan: QualityPlan,
) -> Quality:
    with orchestrate(plan.num_texts) as orchestrator:
        show = functools.partial(show_phase, console)
        return measure_quality(model, orchestrator.attention, plan, show)


def _verdict(quality: Quality | None) -> int:
    faults = quality.faults() if quality else []
    if not faults:
        return 0
    return _fail(f"the quality is not what it must be: {'; '.join(faults)}", EXIT_FAILED)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Leave by an exception when told to end, so that the server that was started here ends too."""

    def end(signal_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal_number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
