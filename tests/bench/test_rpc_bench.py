"""The wire's benchmark: its contestants do what they say, and its goals judge what was found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.goals import Goal
from tests.bench.rpc import step_path
from tests.bench.rpc.__main__ import figures_table, goals
from tests.bench.rpc.figures import (
    BESIDE_PYTRITON,
    ECHO,
    ECHO_ASYNCIO,
    FEW,
    MANY,
    OCTAVO,
    OCTAVO_CPU,
    OVER_SHARED,
    OVER_TCP,
    OVER_UNIX,
    PYTRITON,
    Rig,
    Row,
    batching,
    latency,
    rig,
    same_machine,
    throughput,
    upload,
    with_attention,
)
from tests.bench.rpc.pytriton_peer import (
    Program,
    UnavailableError,
    environment,
    install,
    last_error,
)
from tests.bench.rpc.streams import step_bytes

WAIT_S = 120
"""Longer than an interpreter and its imports take on a busy machine."""


@pytest.fixture(scope="module")
def servers() -> Iterator[Rig]:
    """Return all servers, measured as briefly as can be."""
    with rig(is_quick=True) as quick:
        quick.num_rounds, quick.num_calls, quick.seconds = 2, 10, 0.05
        yield quick


@pytest.mark.parametrize("num_sessions", [1, 64])
def test_every_contestant_has_a_figure_each_round(servers: Rig, num_sessions: int) -> None:
    for row in latency(servers, num_sessions):
        assert set(row.rounds) == {ECHO, ECHO_ASYNCIO, OCTAVO}
        assert all(len(samples) == 2 for samples in row.rounds.values())
        assert all(sample > 0 for samples in row.rounds.values() for sample in samples)


@pytest.mark.parametrize("num_sessions", [1, 64])
def test_every_way_on_one_machine_has_a_figure_each_round(servers: Rig, num_sessions: int) -> None:
    row = same_machine(servers, num_sessions)
    assert set(row.rounds) == {OVER_TCP, OVER_UNIX, OVER_SHARED}
    assert all(len(samples) == 2 and min(samples) > 0 for samples in row.rounds.values())


def test_rates_of_several_streams_and_of_an_upload(servers: Rig) -> None:
    for row in (throughput(servers, 2), upload(servers)):
        assert all(sample > 0 for samples in row.rounds.values() for sample in samples)


def test_steps_with_attention_and_launches_are_counted(servers: Rig) -> None:
    assert len(with_attention(servers, 1, 64).rounds[OCTAVO_CPU]) == 2
    launches = batching(servers).rounds[OCTAVO_CPU]
    assert all(0 < share <= 1 for share in launches)


def test_a_step_has_the_bytes_that_the_echo_sends() -> None:
    assert step_bytes(1) == (12_288, 8_192)
    assert step_bytes(64) == (786_432, 524_288)


def rows(*, slow: float) -> list[Row]:
    """Return made-up figures: Octavo takes `slow` times as long as the better echo."""
    labels = [
        *(f"one stream, 1 session a step, {p}" for p in ("p50", "p99")),
        *(f"one stream, 64 sessions a step, {p}" for p in ("p50", "p99")),
    ]
    times = {ECHO: [100.0, 220.0], ECHO_ASYNCIO: [110.0, 200.0], OCTAVO: [100 * slow, 200 * slow]}
    rates = {name: [1e4 / value for value in values] for name, values in times.items()}
    return [
        *(Row(label, "us", times) for label in labels),
        Row("8 streams of one session", "steps/s", rates),
        Row("upload of a prompt of 8,192 tokens", "GB/s", rates),
        Row("server CPU time of a step of 64 sessions", "us", {FEW: [10.0], MANY: [10 * slow]}),
        Row(
            "one machine, 64 sessions a step, p50",
            "us",
            {OVER_TCP: [100.0], OVER_UNIX: [100.0], OVER_SHARED: [45.0 * slow]},
        ),
        Row("launches a step, of many", "launches", {OCTAVO_CPU: [slow / 11]}),
        Row(BESIDE_PYTRITON, "us", {PYTRITON: [900.0, 950.0], OCTAVO: [100 * slow] * 2}),
    ]


def verdicts(slow: float) -> list[str]:
    """Return the verdicts on made-up figures, without those that were not measured."""
    found: list[Goal] = goals(rows(slow=slow))
    return [goal.verdict for goal in found if goal.verdict != "not measured"]


def test_goals_are_judged_against_the_better_echo_of_each_round() -> None:
    assert set(verdicts(1.0)) == {"met"}
    assert set(verdicts(2.0)) == {"missed"}
    assert len(verdicts(1.0)) == 9


def test_the_table_has_a_line_for_each_contestant() -> None:
    lines = figures_table(rows(slow=1.0))
    assert len(lines) == 1 + sum(len(row.rounds) for row in rows(slow=1.0))


def test_a_peer_that_is_not_there_is_skipped_with_the_reason() -> None:
    found = [row for row in rows(slow=1.0) if row.label != BESIDE_PYTRITON]
    found.append(Row(BESIDE_PYTRITON, "us", {}, skipped="no such wheel"))
    (goal,) = (goal for goal in goals(found) if "PyTriton" in goal.name)
    assert (goal.found, goal.verdict) == ("skipped: no such wheel", "not measured")
    assert figures_table(found)[-1].endswith("no such wheel")


def test_pytriton_that_cannot_be_installed_says_why(tmp_path: Path) -> None:
    nothing = tmp_path / "no-such-distribution"
    with pytest.raises(
        UnavailableError, match=r"cannot be installed: ERROR: .*no-such-distribution"
    ):
        install(tmp_path / "venv", f"{nothing}.whl")
    assert not (tmp_path / "venv" / "installed").exists()


def test_a_program_that_ends_or_hangs_says_why() -> None:
    python = Path(sys.executable)
    with pytest.raises(UnavailableError, match=r"No module named tests\.bench\.rpc\.none"):
        Program(python, "none").read(WAIT_S)
    ended = Program(python, "none")
    ended.wait()
    with pytest.raises(UnavailableError, match=r"No module named"):
        ended.ask("1")
    hanging = Program(python, "serve", "echo")
    hanging.read(WAIT_S)
    with pytest.raises(UnavailableError, match=r"no answer in 0.01 s"):
        hanging.read(0.01)


def test_the_line_that_tells_is_found() -> None:
    log = "a\nAttributeError: no such thing\n\nAt:\n  model.py(454): initialize\n;\n"
    assert last_error(log) == "AttributeError: no such thing"
    assert last_error("only this\n") == "only this"
    assert last_error("") == ""


def test_programs_find_the_interpreter_s_own_library() -> None:
    found = environment({"PYTHONPATH": "elsewhere", "LD_LIBRARY_PATH": "/before", "HOME": "/h"})
    assert "PYTHONPATH" not in found
    assert found["HOME"] == "/h"
    assert found["LD_LIBRARY_PATH"].endswith("/before")


def test_the_path_of_a_step_has_all_its_stages() -> None:
    whole_us, client, server = step_path.measure(20)
    assert list(client) == [stage.label for stage in step_path.CLIENT]
    assert list(server) == [stage.label for stage in step_path.SERVER]
    assert min(*client.values(), *server.values()) > 0
    # The wait holds the server's stages; what a call has beside its stages is small.
    assert sum(client.values()) < 1.5 * whole_us
    assert step_path.table(whole_us, client, server)[-1].split()[-1] == f"{whole_us:.1f}"
