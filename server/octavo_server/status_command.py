"""The command `octavo-server status`: shows in a terminal what a running server tells of itself."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo_client import Client, ServerStats

EXIT_NO_ANSWER = 1
EXIT_USAGE = 2
CLEAR = "\x1b[H\x1b[J"
"""Moves a terminal's cursor home and clears what is below."""


def add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `octavo-server`."""
    status = commands.add_parser(
        "status", help="show what a running server does", allow_abbrev=False
    )
    status.add_argument(
        "--target", required=True, metavar="HOST:PORT", help="the server, also unix:PATH"
    )
    status.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="show it again every so often, with what happened in between, until Ctrl-C",
    )
    status.add_argument(
        "--json", action="store_true", help="print one JSON object, in a line of its own"
    )
    _add_access_flags(status)
    status.set_defaults(run=_run)


def _add_access_flags(status: argparse.ArgumentParser) -> None:
    # The flags of octavo_client.access once more: that module brings gRPC, for which no other command is to wait.
    for flag, text in (
        ("--tls-ca", "TLS: PEM of the server's authorities"),
        ("--tls-cert", "mutual TLS: PEM of this client's certificate"),
        ("--tls-key", "mutual TLS: PEM of its private key"),
        ("--token-file", "file with the tenant's token"),
    ):
        status.add_argument(flag, type=Path, metavar="FILE", help=text)
    status.add_argument(
        "--allow-plaintext-token",
        action="store_true",
        help="send the token without TLS to another machine, where something below encrypts",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected seconds from 0.1 to 86400")
    return seconds


def _run(args: argparse.Namespace) -> int:
    # Imported late, like the server's own modules: they bring gRPC.
    from octavo_client.access import Endpoint, access_of  # noqa: PLC0415

    access = access_of(args)
    try:
        access.check(args.target)
    except ValueError as error:
        print(f"octavo-server: {error}", file=sys.stderr)
        return EXIT_USAGE
    with Endpoint(args.target, access).client() as client:
        if args.watch is None:
            return _show(client, args, None)[0]
        return _watch(client, args)


def _watch(client: Client, args: argparse.Namespace) -> int:
    before: ServerStats | None = None
    try:
        while True:
            _, before = _show(client, args, before)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 0


def _show(
    client: Client, args: argparse.Namespace, before: ServerStats | None
) -> tuple[int, ServerStats | None]:
    """Print one sample; return the exit code that it is worth, and the sample."""
    from octavo_client import OctavoError  # noqa: PLC0415
    from octavo_server import status_view  # noqa: PLC0415

    try:
        info, stats = client.server_info(), client.server_stats()
    except OctavoError as error:
        print(f"octavo-server: no status of {args.target}: {error}", file=sys.stderr)
        return EXIT_NO_ANSWER, before
    span = status_view.interval(stats, before)
    if args.json:
        text = json.dumps(status_view.as_json(info, span))
    else:
        clear = CLEAR if args.watch is not None and sys.stdout.isatty() else ""
        text = clear + status_view.render(args.target, info, span)
    print(text, flush=True)
    return 0, stats
