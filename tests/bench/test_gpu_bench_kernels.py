"""The benchmark's kernels, and the whole of it in small, on the emulator; and nvcc takes its sources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo_client.oracle import AttentionOptions, attention, check, dequantize
from octavo_server.cuda_build import NVCC_FLAGS
from tests.bench import contest, gpu, peers, steps
from tests.bench.bandwidth import measure_bandwidth
from tests.bench.bench_library import (
    BENCH_SOURCES,
    INCLUDE_DIRS,
    OCTAVO,
    THREE_PASS,
    BenchError,
    BenchLibrary,
    HalfArray,
)
from tests.bench.checks import check_appended, error_ratio
from tests.bench.contest import Contestant, compete
from tests.bench.decode import measure_decode
from tests.bench.emulated import EmulatedDevice, emulated_library
from tests.bench.pool import HostStep, Pool, Rotation, draw_steps, rotating
from tests.bench.results import ORIGINAL, OURS, OURS_IN_GRAPH
from tests.bench.setting import Progress, Setting
from tests.bench.shapes import Case, Heads, Workload

GROUPED, PLAIN, WIDE = Heads(4, 2, 64), Heads(2, 2, 40), Heads(8, 1, 256)
CONTEXTS = Workload("three", (1, 31, 200))


@pytest.fixture(scope="module")
def library_path() -> Path:
    return emulated_library()


@pytest.fixture
def device(library_path: Path) -> Iterator[EmulatedDevice]:
    """Return the device, on which nothing went wrong in the end."""
    device = EmulatedDevice(library_path)
    yield device
    assert device.take_fault() == ""


@pytest.fixture
def library(library_path: Path) -> BenchLibrary:
    return BenchLibrary(library_path)


@pytest.fixture
def setting(
    device: EmulatedDevice, library: BenchLibrary, monkeypatch: pytest.MonkeyPatch
) -> Setting:
    """Return a setting in which one launch makes a sample."""
    monkeypatch.setattr(contest, "MAX_LAUNCHES", 1)
    monkeypatch.setattr(Setting, "num_rounds", 2)
    return Setting(device, library, Progress(1000.0))


def exact_check(pool: Pool, step: HostStep, out: HalfArray) -> None:
    """Hold an answer against the oracle of the client."""
    assert step.q is not None
    options = AttentionOptions(pool.heads.head_dim**-0.5)
    for entry, length in enumerate(step.kv_lens.tolist()):
        positions = np.arange(length)
        blocks = step.block_tables[entry, positions // pool.block_size]
        offsets = positions % pool.block_size
        k, v = (
            dequantize(codes.numpy()[blocks, :, offsets], scales.numpy()[blocks, :, offsets])
            for codes, scales in ((pool.k_codes, pool.k_scales), (pool.v_codes, pool.v_scales))
        )
        rows = slice(entry, entry + 1)
        check(out[rows], attention(step.q[rows], k, v, options, start_pos=length - 1))


@pytest.mark.parametrize("kernel", [OCTAVO, THREE_PASS])
@pytest.mark.parametrize("heads", [GROUPED, PLAIN, WIDE], ids=lambda heads: heads.label)
def test_decode_kernels(
    device: EmulatedDevice, library: BenchLibrary, heads: Heads, kernel: int
) -> None:
    case = Case(heads, CONTEXTS, 16)
    pool = Pool(device, heads, 16, 2 * case.num_blocks)
    host_steps = draw_steps(case, pool, 2)
    with rotating(library, pool, host_steps) as rotation:
        for step_idx, step in enumerate(host_steps):
            out = rotation.answer(step_idx, kernel)
            exact_check(pool, step, out)
            assert error_ratio(pool, step, out, range(3)) <= 1


def test_long_contexts_are_split_and_merged(device: EmulatedDevice, library: BenchLibrary) -> None:
    case = Case(Heads(2, 1, 64), Workload("long", (1100,)))
    pool = Pool(device, case.heads, case.block_size, case.num_blocks)
    with rotating(library, pool, draw_steps(case, pool, 1)) as rotation:
        assert rotation.residents[0].plan["num_partials"] > 1
        for _ in range(2):  # the counters are as they were
            exact_check(pool, rotation.host_steps[0], rotation.answer(0, OCTAVO))


def test_steps_of_a_rotation_share_no_block(device: EmulatedDevice) -> None:
    case = Case(GROUPED, CONTEXTS, 16)
    pool = Pool(device, GROUPED, 16, 3 * case.num_blocks)
    used = np.concatenate([step.block_tables.ravel() for step in draw_steps(case, pool, 3)])
    used = used[used >= 0]
    assert sorted(used.tolist()) == list(range(pool.num_blocks))
    assert used.tolist() != sorted(used.tolist())


def test_launches_go_round(device: EmulatedDevice, library: BenchLibrary) -> None:
    case = Case(GROUPED, Workload("one", (5,)), 16)
    pool = Pool(device, GROUPED, 16, 3 * case.num_blocks)
    with rotating(library, pool, draw_steps(case, pool, 3)) as rotation:
        for step_idx in range(3):
            rotation.answer(step_idx, OCTAVO)
        rotation.launch(4, 2, OCTAVO)
        outs = [np.zeros((1, 4, 64), np.float16) for _ in range(3)]
        for resident, out in zip(rotation.residents, outs, strict=True):
            library.take_out(resident, out, device.stream())
    assert [bool(np.isfinite(out).all()) for out in outs] == [False, True, True]


def test_the_three_pass_kernel_refuses_what_it_cannot_hold(
    device: EmulatedDevice, library: BenchLibrary
) -> None:
    case = Case(Heads(1, 1, 8), Workload("long", (4097,)), 128)
    pool = Pool(device, case.heads, 128, case.num_blocks)
    with (
        rotating(library, pool, draw_steps(case, pool, 1)) as rotation,
        pytest.raises(BenchError, match="three-pass kernel"),
    ):
        rotation.launch(0, 1, THREE_PASS)


def test_a_wrong_answer_is_not_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(rotation: Rotation, step_idx: int, kernel: int) -> HalfArray:
        q = rotation.host_steps[step_idx].q
        assert q is not None
        return q * np.float16(0.5)

    monkeypatch.setattr(Rotation, "answer", half)
    measure_decode(setting, [Case(GROUPED, CONTEXTS, 16)])
    assert setting.results.decode == []
    assert [what for what, _ in setting.results.failed] == ["three 4/2/64 block 16"]
    assert "times the error" in setting.results.failed[0][1]


def test_nan_is_an_error(device: EmulatedDevice) -> None:
    case = Case(GROUPED, CONTEXTS, 16)
    pool = Pool(device, GROUPED, 16, case.num_blocks)
    step = draw_steps(case, pool, 1)[0]
    assert step.q is not None
    assert error_ratio(pool, step, np.full_like(step.q, np.nan), [0]) == np.inf


def test_a_wrong_bit_of_an_append_is_seen(device: EmulatedDevice, library: BenchLibrary) -> None:
    case = Case(GROUPED, CONTEXTS, 16)
    pool = Pool(device, GROUPED, 16, case.num_blocks)
    host_steps = draw_steps(case, pool, 1, appends=True, attends=False)
    with rotating(library, pool, host_steps) as rotation:
        rotation.launch(0, 1, OCTAVO)
    assert check_appended(pool, host_steps[0], range(3)) is None
    block, offset = host_steps[0].block_tables[2, 199 // 16], 199 % 16
    pool.v_codes[block, 1, offset, 7] += 1
    with pytest.raises(AssertionError, match="codes of v differ in row 2"):
        check_appended(pool, host_steps[0], range(3))


def test_bandwidth(setting: Setting) -> None:
    found = measure_bandwidth(setting, num_bytes=1 << 15)
    assert found.read_gb_per_s.median > 0
    assert found.copy_gb_per_s.num_samples == 2


def test_measurements_in_small(setting: Setting) -> None:
    setting.results.bandwidth.append(measure_bandwidth(setting, num_bytes=1 << 14))
    measure_decode(setting, [Case(GROUPED, CONTEXTS, 16), Case(PLAIN, CONTEXTS)])
    steps.measure_append(setting, Case(GROUPED, Workload("four", (33,) * 4)), num_tokens=1)
    steps.measure_append(setting, Case(GROUPED, Workload("prompt", (70,))), num_tokens=70)
    steps.measure_step(setting, Case(GROUPED, Workload("three", (40,) * 3)))
    found = setting.results
    for row in found.decode:
        assert [figure.name for figure in row.figures] == [OURS, OURS_IN_GRAPH, ORIGINAL]
        assert 0 < row.worst_error <= 1
    assert [row.num_tokens for row in found.append] == [4, 70]
    assert found.step is not None
    assert found.step.in_bytes == 3 * (4 + 2 * 2) * 64 * 2
    assert (found.skipped, found.failed) == ([], [])


def test_no_time_is_a_reason(setting: Setting) -> None:
    setting.progress.limit_s = 0.0
    measure_decode(setting, [Case(GROUPED, CONTEXTS, 16)])
    assert setting.results.decode == []
    assert setting.results.skipped == [("three 4/2/64 block 16", "no time left")]


def test_finish_prints_and_saves(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_decode(setting, [Case(GROUPED, CONTEXTS, 16)])
    gpu.finish(setting.results, tmp_path / "gpu.json", setting.progress)
    assert (tmp_path / "gpu.json").exists()
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize("error", [None, RuntimeError("the device is lost")])
def test_what_was_found_is_saved_whatever_happens(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def measure(setting: Setting) -> None:
        setting.results.bandwidth.append(measure_bandwidth(setting, num_bytes=1 << 14))
        if error is not None:
            raise error

    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_set_up", lambda progress, arguments: setting)
    monkeypatch.setattr(gpu, "measure", measure)
    assert gpu.main() == (0 if error is None else 1)
    saved = json.loads(path.read_text())
    assert len(saved["bandwidth"]) == 1
    reasons = [failure["reason"] for failure in saved["failed"]]
    assert reasons == ([] if error is None else ["RuntimeError: the device is lost"])


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "nothing was measured" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_contestants_take_turns(device: EmulatedDevice) -> None:
    turns: list[str] = []
    names = ("a", "b")
    contestants = [
        Contestant(name, "int8", 1, lambda first, count, name=name: turns.append(f"{name}{count}"))  # type: ignore[misc]
        for name in names
    ]
    entrants = compete(device, contestants, num_rounds=3)
    assert [turn[0] for turn in turns[-6:]] == ["a", "b"] * 3
    assert [len(entrant.samples) for entrant in entrants] == [3, 3]


def test_torch_peers_answer_like_the_kernels(device: EmulatedDevice) -> None:
    case = Case(Heads(4, 2, 64), Workload("pair", (64, 64)))
    pool = Pool(device, case.heads, case.block_size, 2 * case.num_blocks)
    host_steps = draw_steps(case, pool, 2)
    cache = peers.gather(pool, host_steps)
    sdpa = [peers.SDPA[0], peers.SDPA[3]]
    for peer, contestant, note in peers.contestants(case, pool, host_steps, cache, sdpa):
        assert contestant is not None, (peer.name, note)
        assert contestant.launch_bytes == 2 * 64 * case.heads.bf16_token_bytes
        contestant.launch(1, 2)


def test_a_peer_that_fails_or_errs_is_left_out(device: EmulatedDevice) -> None:
    case = Case(Heads(4, 2, 64), Workload("pair", (64, 64)))
    pool = Pool(device, case.heads, case.block_size, case.num_blocks)
    host_steps = draw_steps(case, pool, 1)
    cache = peers.gather(pool, host_steps)
    wrong = peers.Peer(
        "wrong", "bf16", lambda case, cache: lambda idx: torch.ones_like(cache.q[idx])
    )
    absent = peers.FLASHINFER[0]
    found = list(peers.contestants(case, pool, host_steps, cache, [absent, wrong]))
    assert [contestant for _, contestant, _ in found] == [None, None]
    assert "flashinfer" in found[0][2]
    assert "relative error" in found[1][2]


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the benchmark's sources are not shown to be CUDA"
)
@pytest.mark.parametrize(
    "source",
    sorted(path for path in BENCH_SOURCES.iterdir() if path.suffix in (".cu", ".cpp")),
    ids=lambda path: path.name,
)
def test_nvcc_takes_the_sources(source: Path, tmp_path: Path) -> None:
    includes = [f"-I{folder}" for folder in INCLUDE_DIRS]
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Werror"]
    command = ["nvcc", *NVCC_FLAGS, "-arch=sm_90", *warnings, *includes, "-c", str(source)]
    subprocess.run([*command, "-o", "bench.o"], cwd=tmp_path, check=True)
