"""Threads under ThreadSanitizer, in short; `make test-tsan` takes longer. Planted faults show that it would see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sanitizers import thread_drills
from tests.sanitizers.toolchain import NoSanitizerError

NUM_ROUNDS = 5
RACE = Path(__file__).parent / "planted" / "race.cpp"


@pytest.fixture(autouse=True)
def _needs_thread_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where ThreadSanitizer is not, or does not start."""
    try:
        thread_drills.run(thread_drills.build([RACE]))
    except NoSanitizerError as error:
        pytest.skip(str(error))


def test_the_pool_and_the_launchers_do_not_race() -> None:
    program = thread_drills.build(thread_drills.drill_sources())
    done = thread_drills.run(program, str(NUM_ROUNDS))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "every drill went well\n"


def test_a_planted_race_is_found() -> None:
    done = thread_drills.run(thread_drills.build([RACE]))
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
