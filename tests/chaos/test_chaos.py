"""The short form of `make chaos`: nearly every kind of fault once or twice, in less than a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.form import FULL, SHORT

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_nothing_is_lost_unsaid_nothing_leaks_and_no_answer_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "chaos.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--form", "short", "--output", str(output)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    record = json.loads(output.read_text())
    assert record["faults"] == SHORT.faults
    assert set(record["recovery_s"]) == set(SHORT.faults)
    assert record["checks"]["num_checked"] >= SHORT.min_answers
    assert record["num_sessions_said_lost"] > 0


def test_the_full_form_is_as_large_as_promised() -> None:
    assert FULL.heads == (32, 8, 128)
    assert FULL.num_clients >= 8
    assert FULL.num_sessions >= 200
    assert 4000 <= FULL.prompt_tokens.most <= FULL.max_context
    assert FULL.num_faults >= 200
    assert FULL.min_answers >= 20_000
    assert set(FULL.faults) - set(SHORT.faults) == {"server killed while restoring"}
