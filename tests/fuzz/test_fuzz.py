"""The fuzz targets on their seeds, on changed seeds with a fixed draw, and for some seconds under the fuzzer itself."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import pytest

from octavo.v1 import tensor_fields
from octavo_server import service
from tests.fuzz.corpus import seeds, write_corpus
from tests.fuzz.targets import TARGETS, changed, run_target

NUM_CHANGED = 8_000
NUM_RUNS = 4_000
ROOT = Path(__file__).parents[2]


def inputs(targets: Collection[str] = tuple(TARGETS)) -> list[bytes]:
    names = list(TARGETS)
    return [bytes([names.index(name)]) + data for name, data in seeds() if name in targets]


def run_changed(*targets: str) -> None:
    """Run targets, all by default, on inputs that are one change away from their seeds."""
    rng = random.Random(1)
    first = inputs(targets or tuple(TARGETS))
    for _ in range(NUM_CHANGED):
        run_target(changed(rng.choice(first), rng))


def test_every_target_has_a_seed() -> None:
    assert {name for name, _ in seeds()} == set(TARGETS)


def test_targets_take_their_seeds() -> None:
    for data in (b"", *inputs()):
        run_target(data)


def test_only_refusals_leave_the_parsers() -> None:
    run_changed()


def test_a_lax_fast_parser_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_fields, "_MAX_SIZE_BITS", 63)
    with pytest.raises(Exception, match="Wire format was corrupt"):
        run_changed("append fields")


def test_a_lax_handler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_PAGE_SIZE", 2**31)
    with pytest.raises(AssertionError):
        run_changed("calls")


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no wheel for this Python")
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", list(TARGETS))
    flags = [f"-runs={NUM_RUNS}", "-seed=1", "-rss_limit_mb=1024", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *flags, str(tmp_path / "corpus")],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {NUM_RUNS} runs" in done.stderr
