"""The CPU benchmark's measurements, each once over a few tokens: what is right is timed, what is wrong is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from octavo_server.backends.cpu import CpuBackend
from tests.bench.cpu import __main__ as command
from tests.bench.cpu import append, call, causal
from tests.bench.cpu.append import APPEND, measure_append
from tests.bench.cpu.call import CALL, emptied, measure_call
from tests.bench.cpu.causal import CAUSAL, SDPA_FOLDED, SDPA_GQA, measure_causal
from tests.bench.cpu.decode import measure_case
from tests.bench.cpu.draws import PEER_TOLERANCE, draw_case, relative_error, worst_ratio
from tests.bench.cpu.ggml_peer import GGML_F16, GGML_Q8_0, ggml_racers
from tests.bench.cpu.memory import STRATEGIES, Memory, random_bytes
from tests.bench.cpu.octavo import OCTAVO, Sessions, octavo_racer
from tests.bench.cpu.openvino_peer import OPENVINO, openvino_racer
from tests.bench.cpu.race import Plan
from tests.bench.cpu.racers import PeerError, copies_of, racer
from tests.bench.cpu.setting import Setting
from tests.bench.cpu.torch_peers import INT8_WAY, TORCH_FLOAT, torch_racers
from tests.bench.setting import Progress
from tests.bench.shapes import Case, Heads, uniform

TINY = Case(Heads(4, 2, 64), uniform(2, 96))


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(2, 1 << 20)


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    return CpuBackend(num_threads=2)


@pytest.fixture
def setting(backend: CpuBackend, memory: Memory) -> Setting:
    return Setting(backend, memory, 1 << 10, Progress(60.0), Plan(1, 1, 2), with_peers=False)


# ---- Memory -------------------------------------------------------------------------------------


def test_every_strategy_reads_every_byte(memory: Memory) -> None:
    expected = int(memory.buffer.view(np.uint64).sum())
    sums = [memory.checksum(idx, threads) for idx in range(len(STRATEGIES)) for threads in (1, 2)]
    assert sums == [expected] * len(sums)


def test_limit_is_that_of_the_fastest(memory: Memory) -> None:
    found = memory.limit()
    assert found.strategy in STRATEGIES
    assert 0.01 < found.one_thread_gb_per_s < 10_000
    assert 0.01 < found.read_gb_per_s < 10_000


def test_copy_copies_all(memory: Memory) -> None:
    source, target = random_bytes(1001), np.zeros(1001, np.uint8)
    memory.copy(target, source)
    np.testing.assert_array_equal(target, source)


# ---- Answers ------------------------------------------------------------------------------------


def test_octavo_answers_right_from_every_copy(backend: CpuBackend) -> None:
    tokens = draw_case(TINY)
    ours = octavo_racer(backend, tokens, llc_bytes=1 << 20)
    assert ours.num_copies == copies_of(TINY.cache_bytes, 1 << 20) > 10
    assert max(worst_ratio(ours.answer(copy), tokens.exact) for copy in range(ours.num_copies)) < 1
    other = replace(tokens, q=tokens.q[::-1])
    assert worst_ratio(octavo_racer(backend, other, 1).answer(0), tokens.exact) > 1


def test_torch_answers_right(backend: CpuBackend) -> None:
    tokens = draw_case(TINY)
    racers = torch_racers(tokens, llc_bytes=1 << 10)
    assert {*TORCH_FLOAT, INT8_WAY} < {one.contestant.name for one in racers}
    for one in racers:
        for copy in range(one.num_copies):
            assert relative_error(one.answer(copy), tokens.exact) < PEER_TOLERANCE


@pytest.mark.parametrize("names", [(OPENVINO,), (GGML_F16, GGML_Q8_0)])
def test_foreign_peers_answer_right_or_say_why_not(names: tuple[str, ...]) -> None:
    tokens = draw_case(TINY)
    try:
        is_openvino = names == (OPENVINO,)
        racers = [openvino_racer(tokens, 2, 1)] if is_openvino else ggml_racers(tokens, 2, 1)
    except PeerError as error:
        pytest.skip(str(error))
    assert tuple(one.contestant.name for one in racers) == names
    for one in racers:
        for copy in range(one.num_copies):
            assert relative_error(one.answer(copy), tokens.exact) < PEER_TOLERANCE


def test_errors_see_what_is_no_number() -> None:
    tokens = draw_case(TINY)
    broken = tokens.q.copy()
    broken[0, 0, 0] = np.nan
    assert relative_error(broken, tokens.exact) == worst_ratio(broken, tokens.exact) == np.inf


# ---- Runs ---------------------------------------------------------------------------------------


def test_an_emptied_launch_stores_and_attends_to_nothing(backend: CpuBackend) -> None:
    tokens = draw_case(TINY)
    sessions = Sessions(backend, TINY.heads, 2, 96)
    full = sessions.batch([0, 1], 95, 1, appends=True)
    batch = emptied(full)
    out = sessions.step(batch, tokens.q, (tokens.k[:, 95], tokens.v[:, 95]))
    assert not out.any()
    assert (batch.slot_mapping == -1).all()
    assert sessions.step(full, tokens.q, (tokens.k[:, 95], tokens.v[:, 95])).any()


def test_a_small_run_is_measured_and_saved(setting: Setting, tmp_path: Path) -> None:
    setting = replace(setting, with_peers=False)
    command.measure(setting, [TINY])
    command.finish(setting.results, tmp_path, setting.progress)
    saved = json.loads((tmp_path / "cpu.json").read_text())
    assert saved["failed"] == saved["skipped"] == []
    assert [row["label"] for row in saved["rows"]] == [TINY.label]
    assert saved["rows"][0]["contestants"][0]["of_bound"] < 1
    assert TINY.label in (tmp_path / "cpu.md").read_text()


def test_steps_are_measured(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "NUM_TOKENS", 64)
    shorten_causal(monkeypatch)
    steps = (measure_call, measure_append, measure_causal)
    command.measure(replace(setting, with_peers=True), [], steps)
    assert setting.results.failed == []
    assert [row.label for row in setting.results.rows] == [CALL, APPEND, CAUSAL]
    assert setting.results.rows[0].entries[0].of_bound is not None
    names = [entry.name for entry in setting.results.rows[2].entries]
    assert names == [OCTAVO, SDPA_FOLDED, SDPA_GQA]


def shorten_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the causal step one of 32 tokens on 64."""
    for name, num_tokens in (("NUM_CACHED", 64), ("NUM_NEW", 32), ("LENGTH", 96)):
        monkeypatch.setattr(causal, name, num_tokens)


def test_a_wrong_step_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_causal(monkeypatch)
    right = Sessions.step
    monkeypatch.setattr(Sessions, "step", lambda *args: right(*args) * np.float16(1.1))
    command.measure(setting, [], [measure_call, measure_causal])
    assert [what for what, _ in setting.results.failed] == [CALL, CAUSAL]
    assert setting.results.rows == []


def test_torch_takes_part_where_peers_do(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = "absent"

    def no_peer(*_: object) -> list[object]:
        raise PeerError(absent)

    monkeypatch.setattr("tests.bench.cpu.decode.openvino_racer", no_peer)
    monkeypatch.setattr("tests.bench.cpu.decode.ggml_racers", no_peer)
    measure_case(replace(setting, with_peers=True), TINY)
    names = {entry.name for entry in setting.results.rows[0].entries}
    assert names > {OCTAVO, *TORCH_FLOAT}
    assert setting.results.skipped == [(name, absent) for name in (OPENVINO, GGML_F16, GGML_Q8_0)]


def test_a_wrong_peer_is_not_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.bench.cpu.decode.torch_racers",
        lambda tokens, _: [racer("wrong", "bf16", 1, 1, lambda _: np.ones(tokens.q.shape))],
    )
    monkeypatch.setattr("tests.bench.cpu.decode.openvino_racer", lambda *_: 1 / 0)
    monkeypatch.setattr("tests.bench.cpu.decode.ggml_racers", lambda *_: [])
    measure_case(replace(setting, with_peers=True), TINY)
    assert [entry.name for entry in setting.results.rows[0].entries] == [OCTAVO]
    assert [what for what, _ in setting.results.skipped] == ["wrong", OPENVINO]


def test_a_wrong_answer_of_octavo_fails(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sessions.attend
    monkeypatch.setattr(Sessions, "attend", lambda *args: right(*args) + np.float16(0.1))
    measure_case(setting, TINY)
    assert [what for what, _ in setting.results.failed] == [TINY.label]
    assert setting.results.rows == []


def test_wrong_bits_of_an_append_fail(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "NUM_TOKENS", 64)
    right = Sessions.append
    monkeypatch.setattr(Sessions, "append", lambda self, batch, k, v: right(self, batch, k, -v))
    measure_append(setting)
    assert setting.results.failed == [(APPEND, "stored bits differ from the oracle's")]


def test_the_exit_status_tells_of_a_failure(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "set_up", lambda *_, **__: setting)
    monkeypatch.setattr(command, "QUICK_CASES", (TINY,))
    for name in ("measure_call", "measure_append", "measure_causal"):
        monkeypatch.setattr(command, name, lambda _: None)
    arguments = ["--quick", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    setting.fail("something", "is wrong")
    assert command.main(arguments) == 1


def test_a_case_without_time_or_memory_is_skipped(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_case(replace(setting, progress=Progress(0.0)), TINY)
    monkeypatch.setattr("tests.bench.cpu.decode.free_host_bytes", lambda: 1 << 20)
    measure_case(setting, TINY)
    reasons = [reason for _, reason in setting.results.skipped]
    assert reasons[0] == "no time left"
    assert reasons[1].endswith("1 MiB are free")


def test_a_context_of_the_call_is_the_issues() -> None:
    assert (call.CONTEXT, append.NUM_TOKENS) == (128, 8192)
