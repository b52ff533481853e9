"""The benchmark's arithmetic, its goals and what it saves: no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.contest import MAX_LAUNCHES, Contestant, Entrant, launches_for
from tests.bench.device import is_h200
from tests.bench.goals import Goal, align, best_bf16, decode_table, goals, goals_table, step_table
from tests.bench.peers import FLEX, SDPA, peers_for
from tests.bench.results import (
    ORIGINAL,
    OURS,
    AppendRow,
    Bandwidth,
    Figure,
    Results,
    StepRow,
    as_json,
    decode_row,
    figures_of,
    save,
)
from tests.bench.shapes import (
    HEADS,
    LLAMA,
    WORKLOADS,
    Case,
    Heads,
    Workload,
    decode_cases,
    num_copies,
    ragged,
    uniform,
)
from tests.bench.stats import Summary, ratios, summarize

PLAN = {"num_items": 1}


# ---- Shapes -------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_issue() -> None:
    assert Heads(1, 1, 128).token_bytes == 260
    assert Heads(1, 1, 128).bf16_token_bytes == 512
    megabytes = {w.name: round(Case(LLAMA, w).cache_bytes / 1e6) for w in WORKLOADS}
    assert (megabytes["8x32k"], megabytes["64x8k"], megabytes["32x4k"]) == (545, 1091, 273)


def test_append_counts_what_it_reads_and_writes() -> None:
    assert Heads(1, 1, 128).append_token_bytes == 2 * (128 * 2 + 128 + 2)


def test_blocks_round_up_for_each_context() -> None:
    assert Case(LLAMA, Workload("x", (1, 32, 33))).num_blocks == 4
    assert Case(LLAMA, Workload("x", (1, 32, 33)), 16).num_blocks == 1 + 2 + 3


def test_ragged_lengths_are_seeded_and_hold_both_ends() -> None:
    lengths = ragged(64, 17, 32768, seed=20).lengths
    assert (
        lengths == ragged(64, 17, 32768, seed=20).lengths != ragged(64, 17, 32768, seed=21).lengths
    )
    assert (len(lengths), min(lengths), max(lengths)) == (64, 17, 32768)
    assert sum(length < 1024 for length in lengths) > 20


def test_cases_are_those_of_the_issue() -> None:
    cases = decode_cases(quick=False)
    assert len(cases) == len({case.label for case in cases}) == 4 * 7 + 3
    assert {case.heads.label for case in cases} == {"32/8/128", "64/8/128", "32/32/128", "14/2/64"}
    names = ["8x32k", "64x8k", "32x4k", "128x4k", "1x1k", "1x32k", "ragged"]
    assert [workload.name for workload in WORKLOADS] == names
    assert {case.block_size for case in cases} == {16, 32, 64, 128}


def test_cases_of_one_pool_follow_each_other() -> None:
    pools = [(case.heads, case.block_size) for case in decode_cases(quick=False)]
    runs = [pool for idx, pool in enumerate(pools) if idx == 0 or pools[idx - 1] != pool]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize(
    ("launch_bytes", "most_bytes", "expected"),
    [
        (1000, 10**9, 400),  # four times the cache
        (10**6, 10**9, 2),  # a launch is larger, and yet does not meet itself at once
        (10**6, 10**6, 1),  # no memory for two
        (10**6, 1, 1),
        (1, 10**9, 1024),
    ],
)
def test_num_copies(launch_bytes: int, most_bytes: int, expected: int) -> None:
    assert num_copies(launch_bytes, l2_bytes=100_000, most_bytes=most_bytes) == expected


@pytest.mark.parametrize("heads", HEADS)
def test_everything_fits_80_gb(heads: Heads) -> None:
    most = 0
    for workload in WORKLOADS:
        case = Case(heads, workload)
        share = int(0.15 * 80e9)
        pool = num_copies(case.cache_bytes, 60 << 20, share) * case.cache_bytes
        peers = num_copies(case.bf16_bytes, 60 << 20, share) * case.bf16_bytes
        most = max(most, pool + (5 * peers // 2 if peers_for(case, quick=False) else 0))
    assert most < 60e9


def test_peers_take_part_where_they_are_worth_it() -> None:
    by_name = {
        workload.name: peers_for(Case(LLAMA, workload), quick=False) for workload in WORKLOADS
    }
    assert FLEX in by_name["8x32k"]
    assert all(peer in by_name["1x1k"] for peer in SDPA)
    assert by_name["ragged"] == []
    assert FLEX not in peers_for(Case(HEADS[1], WORKLOADS[0]), quick=False)
    assert peers_for(Case(LLAMA, WORKLOADS[0], 64), quick=False) == []


# ---- Samples ------------------------------------------------------------------------------------


def test_summary_takes_samples_that_were_taken() -> None:
    assert summarize([5, 1, 4, 2, 3, 9, 8, 7, 6, 10]) == Summary(5.5, 1, 9, 10)
    assert summarize([3.0]) == Summary(3, 3, 3, 1)


def test_ratios_are_of_pairs() -> None:
    assert ratios([2, 8, 6], [1, 2, 3]).median == 2
    with pytest.raises(ValueError, match="zip"):
        ratios([1, 2], [1])


def test_a_sample_lasts_long_enough_and_not_too_long() -> None:
    assert [launches_for(us) for us in (0.0, 7.0, 150.0, 2000.0, 1e5)] == [
        MAX_LAUNCHES,
        286,
        14,
        1,
        1,
    ]


def entrant(name: str, *samples: float, launch_bytes: int = 1000, dtype: str = "int8") -> Entrant:
    """Return a contestant with its samples."""
    made = Entrant(Contestant(name, dtype, launch_bytes, lambda first, count: None), 1)
    made.samples.extend(samples)
    return made


def test_figures_compare_with_the_first() -> None:
    ours, peer = figures_of([entrant(OURS, 1, 2, 1), entrant("peer", 2, 2, 4)], {"peer": "error 0"})
    assert ours.speedup is None
    assert ours.gb_per_s == 1.0
    assert peer.speedup == Summary(2.0, 1.0, 4.0, 3)
    assert peer.note == "error 0"


# ---- Goals --------------------------------------------------------------------------------------


def figure(name: str, us: float, launch_bytes: int, ours_us: float, dtype: str = "int8") -> Figure:
    """Return a figure without spread."""
    entrants = [entrant(OURS, ours_us), entrant(name, us, launch_bytes=launch_bytes, dtype=dtype)]
    return figures_of(entrants if name != OURS else entrants[1:], {})[-1]


def results(device: str = "NVIDIA H200", *, factor: float = 1.0) -> Results:
    """Return results that meet every goal by a little; a factor over 1 makes the kernels slower."""
    found = Results(device={"name": device, "nominal_bytes_per_s": 4.8e12})
    found.bandwidth = [
        Bandwidth(summarize([x]), summarize([3800.0]), 1 << 32) for x in (4200.0, 4400.0)
    ]
    for workload in WORKLOADS:
        case = Case(LLAMA, workload)
        us = factor * (7.5 if workload.name == "1x1k" else case.cache_bytes / 3.9e6)
        figures = [figure(OURS, us, case.cache_bytes, us)]
        figures.append(figure("slow", 250 * us, case.bf16_bytes, us, "bf16"))
        figures.append(figure("fast", 1.75 * us / factor, case.bf16_bytes, us, "bf16"))
        if workload.is_short:
            figures.append(figure(ORIGINAL, 21 * us / factor, case.cache_bytes, us))
        found.decode.append(decode_row(case, 2, 0.3, PLAN, figures))
    one = summarize([100.0])
    overhead = summarize([38.0 * factor])
    found.step = StepRow("64x4k 32/8/128", 1, 1, one, one, one, overhead, one)
    found.append = [AppendRow("64 tokens", 64, figure("append", 5.0, 1000, 1.0))]
    found.skipped = [("FlashInfer BF16", "ModuleNotFoundError")]
    return found


def test_goals_that_are_met() -> None:
    assert {goal.verdict for goal in goals(results())} == {"met"}
    assert len(goals(results())) == 2 + 2 + 1 + 2 + 1


def test_goals_that_are_missed() -> None:
    assert {goal.verdict for goal in goals(results(factor=1.1))} == {"missed"}


def test_goals_are_for_one_device() -> None:
    found = goals(results("NVIDIA H100 80GB HBM3"))
    assert {goal.verdict for goal in found} == {"not measured"}
    assert all("on a NVIDIA H100" in goal.found for goal in found)


def test_goals_without_results() -> None:
    assert [goal.verdict for goal in goals(Results())] == ["not measured"] * 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H200", True), ("NVIDIA H200 NVL", True), ("NVIDIA GH200X", False)],
)
def test_h200(name: str, expected: bool) -> None:
    assert is_h200(name) == expected


def test_best_bf16_is_the_fastest() -> None:
    best = best_bf16(results().decode[0])
    assert best is not None
    assert best.name == "fast"
    ours = results().decode[0].figures[0]
    assert best_bf16(replace(results().decode[0], figures=[ours])) is None


# ---- What is printed and saved ------------------------------------------------------------------


def test_saved_json(tmp_path: Path) -> None:
    found, lines = results(), list[str]()
    path = tmp_path / "new" / "gpu.json"
    save(path, as_json(found, [goal.as_dict() for goal in goals(found)]), lines.append)
    saved = json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]
    assert lines == [f"saved {path}"]
    assert saved["format"] == 1
    row = saved["decode"][0]
    assert (row["heads"], row["workload"], row["num_tokens"]) == ("32/8/128", "8x32k", 8 * 32768)
    ours = row["figures"][0]
    assert set(ours["us"]) == {"median", "p10", "p90", "num_samples"}
    assert ours["fraction_of_nominal"] == pytest.approx(3.9 / 4.8)
    assert ours["fraction_of_read"] == pytest.approx(3.9 / 4.3)
    assert saved["append"][0]["figure"]["fraction_of_read"] is not None
    assert saved["skipped"] == [{"what": "FlashInfer BF16", "reason": "ModuleNotFoundError"}]
    assert saved["goals"][0]["verdict"] == "met"


def test_fractions_are_missing_where_limits_are() -> None:
    fractions = Results().fractions(results().decode[0].figures[0])
    assert set(fractions.values()) == {None}


def test_tables() -> None:
    found = results()
    head, *rows = decode_table(found)
    assert head.split()[0] == "case"
    assert len(rows) == len(WORKLOADS)
    assert "81.2%" in rows[0]
    assert rows[0].split()[-2:] == ["1.75x", "-"]
    assert rows[2].split()[-1] == "21.00x"
    assert len(step_table(found)) == 1 + 5
    assert goals_table([Goal("a", "b", "c", "met")])[1].split() == ["a", "b", "c", "met"]
    assert len(decode_table(Results())) == 1
    assert step_table(Results()) == []


def test_columns_line_up() -> None:
    assert align([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc  d"]


def test_a_case_is_told_apart_by_its_block_size() -> None:
    found = results()
    case = Case(LLAMA, uniform(8, 32768), 64)
    found.decode.insert(0, decode_row(case, 2, 0.3, PLAN, [figure(OURS, 1e6, 1, 1e6)]))
    assert found.row("8x32k", LLAMA.label) is found.decode[1]
    assert found.row("8x32k", LLAMA.label, 64) is found.decode[0]
