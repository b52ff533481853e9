"""The command behind `make chaos`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from octavo_client.load.record import save_text
from tests.chaos.form import FORMS, FULL, Form
from tests.chaos.report import Origin, as_json, commit, table
from tests.chaos.results import Results
from tests.chaos.setting import chaos_run

_EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run chaos and return the exit code: 1 when anything went wrong or too little happened.

    Args:
        argv: Arguments without the program's name; those of the process by default.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(arguments)
    form = FORMS[args.form]
    kinds = {kind: n for kind, n in form.faults.items() if kind in (args.only or form.faults)}
    began_s = time.monotonic()
    origin = Origin(("tests.chaos", *arguments), commit())
    results = run_form(form, args.seed, kinds, lambda text: _say(began_s, text))
    failures = results.failures(form, sum(kinds.values()))
    record = as_json(form, args.seed, origin, results, failures)
    save_text(args.output, json.dumps(record, indent=1) + "\n")
    print(f"\n{table(results)}\n\nwritten to {args.output}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return _EXIT_FAILED if failures else 0


def run_form(form: Form, seed: int, kinds: dict[str, int], say: Callable[[str], None]) -> Results:
    """Run these faults in a folder of their own, which is removed afterwards."""
    # Each process has its own threads already; those of the matrix library would only fight for the cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it tells of each bit that was flipped
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is ended
    with (
        tempfile.TemporaryDirectory(prefix="octavo-chaos-") as folder,
        chaos_run(form, seed, Path(folder), say) as run,
    ):
        return run.run(kinds)


def _say(began_s: float, text: str) -> None:
    print(f"[{time.monotonic() - began_s:5.0f} s] {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make chaos CHAOS_ARGS=", description=__doc__)
    parser.add_argument("--form", choices=sorted(FORMS), default=FULL.name)
    parser.add_argument("--seed", type=int, default=1, help="of contents, faults and their order")
    parser.add_argument(
        "--only", action="append", choices=sorted(FULL.faults), help="a kind of fault; repeatable"
    )
    parser.add_argument("--output", type=Path, default=Path("build/chaos.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
