"""The command `octavo-load`."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from types import FrameType

from rich.console import Console

from octavo_client import OctavoError, Retry, ServerInfo
from octavo_client.access import Endpoint, access_of
from octavo_client.load.arguments import UsageError, make_parser, settings_of
from octavo_client.load.page import render
from octavo_client.load.plots import one_plot, plots
from octavo_client.load.record import describe, save_text, write_csv
from octavo_client.load.results import RunResult, Settings
from octavo_client.load.run import run
from octavo_client.load.table import print_report
from octavo_client.load.view import live_view

RETRY = Retry(max_attempts=4)
"""Gives up within seconds: a server that is not there should not look like one that is slow."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

PLAIN_WIDTH = 180
"""Columns where there is no terminal: the tables' lines stay whole."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load test and return its exit code.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0 when every answer that was checked was right and nothing unexpected happened, 1 when not or when the load test
        cannot run, 2 for mistakes in the arguments, 130 when it was ended early and nothing was wrong until then.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if args.html or args.plot:
        importlib.import_module("matplotlib")  # rather now than after the run
    try:
        with _ending_on_sigterm(), _server(args, console) as target:
            return _run(args, arguments, console, target)
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except OctavoError as error:
        return _fail(f"the server at {args.target or 'loopback'}: {error}", EXIT_FAILED)
    except OSError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _run(args: argparse.Namespace, arguments: Sequence[str], console: Console, target: str) -> int:
    endpoint = _endpoint(args, target)
    with endpoint.client(retry=RETRY) as client:
        info = client.server_info()
        settings = settings_of(args, target, info)
        console.print(
            f"octavo-server {info.version} at {target}: {info.backend_description}", markup=False
        )
        with live_view(console) as view:
            result = run(settings, client, view)
    print_report(console, result)
    _save(args, ["octavo-load", *arguments], settings, info, result)
    status = _verdict(result)
    if status == 0 and result.is_interrupted:
        return _fail("interrupted", EXIT_INTERRUPTED)
    return status


def _endpoint(args: argparse.Namespace, target: str) -> Endpoint:
    access = access_of(args)
    try:
        access.check(target)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Endpoint(target, access)


def _save(
    args: argparse.Namespace,
    command: Sequence[str],
    settings: Settings,
    info: ServerInfo,
    result: RunResult,
) -> None:
    record = describe(settings, info, result, command)
    if args.json:
        save_text(args.json, json.dumps(record, indent=1) + "\n")
    if args.csv:
        text = StringIO(newline="")
        write_csv(result, text)
        save_text(args.csv, text.getvalue())
    if args.html:
        save_text(args.html, render(record, result, plots(result.points)))
    if args.plot:
        save_text(args.plot, one_plot(result.points))


def _verdict(result: RunResult) -> int:
    num_checked = sum(point.checks.num_checked for point in result.points)
    if result.num_wrong:
        return _fail(f"{result.num_wrong} of {num_checked} answers are wrong", EXIT_FAILED)
    if result.all_faults:
        return _fail("something unexpected happened, see above", EXIT_FAILED)
    return 0


def _fail(text: str, code: int) -> int:
    print(f"octavo-load: {text}", file=sys.stderr)
    return code


@contextmanager
def _server(args: argparse.Namespace, console: Console) -> Iterator[str]:
    """Yield the address of the server; start and end one where the arguments say so."""
    if args.target:
        yield args.target
        return
    # The server needs the same packages, so whoever starts one has them.
    from octavo_client.demo.local_server import ServerStartError, local_server  # noqa: PLC0415

    console.print("starting octavo-server")
    try:
        with local_server(shlex.split(args.start_server), lambda _: None) as target:
            yield target
    except ServerStartError as error:
        raise OSError(str(error)) from error


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C: sessions are closed, and what was measured is reported."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
