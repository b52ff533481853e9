"""The CPU benchmark's rules, its goals, and what it says and saves: nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.bench.contest import MAX_LAUNCHES, Contestant
from tests.bench.cpu.append import APPEND, MEMCPY
from tests.bench.cpu.call import CALL, EMPTY
from tests.bench.cpu.cases import GOAL_CASES, SWEEP_CASES, is_in_sweep
from tests.bench.cpu.causal import CAUSAL, SDPA_FOLDED, SDPA_GQA
from tests.bench.cpu.ggml_peer import GGML_F16
from tests.bench.cpu.goals import MIN_CAUSAL_RATIO, TARGETS, goals
from tests.bench.cpu.machine import sysfs_bytes
from tests.bench.cpu.memory import STRATEGIES, Limit, Mode, mode_of
from tests.bench.cpu.octavo import OCTAVO
from tests.bench.cpu.openvino_peer import OPENVINO
from tests.bench.cpu.plot import FLOOR, draw, save_plot, series, spread
from tests.bench.cpu.race import (
    Block,
    Plan,
    difference,
    fraction,
    launches_for,
    race,
    ratio,
    steady,
    times,
)
from tests.bench.cpu.racers import copies_of, rotating
from tests.bench.cpu.report import as_markdown
from tests.bench.cpu.results import Entry, Results, Row, as_json, summary_line
from tests.bench.cpu.torch_peers import TORCH_FLOAT
from tests.bench.goals import Goal
from tests.bench.shapes import Case, Heads, uniform

TINY = Case(Heads(4, 2, 64), uniform(2, 96))


def limit(all_threads: float, one_thread: float = 40.0) -> Limit:
    """Return a limit, by default of a machine whose single thread reads 40 GB/s."""
    return Limit(all_threads, one_thread, STRATEGIES[0])


def block(before: float = 45.0, after: float | None = None, **samples: float) -> Block:
    """Return a block with one sample of each contestant."""
    return Block(
        limit(before),
        limit(before if after is None else after),
        {name: [us] for name, us in samples.items()},
    )


# ---- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("all_threads", "one_thread", "expected"),
    [
        (45, 40, "narrow"),
        (57.9, 40, "narrow"),
        (58.1, 40, "wide"),
        (75, 40, "wide"),
        (9, 9, "narrow"),
    ],
)
def test_mode(all_threads: float, one_thread: float, expected: Mode) -> None:
    assert mode_of(all_threads, one_thread) == limit(all_threads, one_thread).mode == expected


def test_sizes_of_sysfs() -> None:
    assert (sysfs_bytes("32768K\n"), sysfs_bytes("2M"), sysfs_bytes("512")) == (
        32 << 20,
        2 << 20,
        512,
    )


# ---- Races --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (50, 50, True),
        (50, 45, True),
        (45, 50, True),
        (50, 44.9, False),
        (44.9, 50, False),
        (45, 78, False),
    ],
)
def test_a_block_counts_where_limits_agree_within_10_percent(
    before: float, after: float, expected: bool
) -> None:
    assert block(before, after).is_steady == expected


def test_blocks_are_kept_by_mode() -> None:
    narrow, wide, flipped = block(45), block(75), block(45, 75)
    blocks = [narrow, wide, flipped]
    assert steady(blocks) == [narrow, wide]
    assert (steady(blocks, "narrow"), steady(blocks, "wide")) == ([narrow], [wide])


def test_statistics_are_of_pairs() -> None:
    blocks = [block(50, a=10.0, b=30.0), block(50, a=20.0, b=20.0), block(25, a=10.0, b=20.0)]
    found = ratio(blocks, "b", "a"), difference(blocks, "b", "a"), times(blocks, "b")
    assert [summary.median for summary in found if summary] == [2.0, 10.0, 20.0]
    share = fraction(blocks, "a", launch_bytes=250_000)
    assert share is not None
    assert (share.median, share.p10, share.p90) == (0.5, 0.25, 1.0)
    assert ratio(blocks, "b", "absent") is None
    assert fraction([], "a", 1) is difference([], "a", "b") is times([], "a") is None


def test_a_sample_lasts_long_enough() -> None:
    assert [launches_for(us) for us in (0.0, 80.0, 2000.0, 1e5)] == [MAX_LAUNCHES, 100, 4, 1]


class Track:
    """Contestants that record their turns, and limits that come from a list."""

    def __init__(self, limits: list[float]) -> None:
        self.turns: list[str] = []
        self._limits: Iterator[float] = iter(limits)

    def contestant(self, name: str) -> Contestant:
        """Return a contestant that takes a moment."""

        def launch(first: int, count: int) -> None:
            self.turns.append(name)
            torch.zeros(1)

        return Contestant(name, "int8", 1000, launch)

    def limit(self) -> Limit:
        """Return the next limit."""
        self.turns.append("limit")
        return limit(next(self._limits))


def test_contestants_take_turns_between_limits() -> None:
    track = Track([50.0] * 3)
    blocks = race([track.contestant(name) for name in "ab"], track.limit, Plan(2, 4, 9))
    timed = "".join(name[0] for name in track.turns if name == "limit" or name in "ab")
    assert timed.lstrip("ab") == "l" + 2 * ("aabb" * 2 + "l")  # each sample is warmed once
    assert [{name: len(us) for name, us in one.samples.items()} for one in blocks] == [
        {"a": 2, "b": 2}
    ] * 2


def test_a_race_ends_when_enough_blocks_count() -> None:
    track = Track([50.0, 80.0, 80.0, 50.0, 50.0, 0.0])
    blocks = race([track.contestant("a")], track.limit, Plan(1, 2, 9))
    assert [one.is_steady for one in blocks] == [False, True, False, True]


def test_a_race_ends_after_its_last_block_and_when_time_is_up() -> None:
    flipping = [50.0, 80.0] * 10
    runner = Track(flipping)
    assert len(race([runner.contestant("a")], runner.limit, Plan(1, 2, 5))) == 5
    runner = Track(flipping)
    assert len(race([runner.contestant("a")], runner.limit, Plan(1, 2, 5), lambda: False)) == 1


def test_launches_rotate_over_copies() -> None:
    used: list[int] = []
    rotating("x", "int8", 1, 3, used.append).launch(4, 5)
    assert used == [1, 2, 0, 1, 2]


def test_copies_exceed_the_cache() -> None:
    assert copies_of(68 << 20, 32 << 20) == 6
    assert copies_of(1 << 20, 32 << 20) == 384
    assert copies_of(3 << 30, 32 << 20) == 1


# ---- Goals --------------------------------------------------------------------------------------

MARGIN = 1.02


def row_of(target_idx: int, mode: Mode, margin: float) -> Row:
    """Return a case's race that meets each goal by a margin, and misses each with one under 1."""
    target = TARGETS[target_idx]
    read = {"narrow": 45.0, "wide": 75.0}[mode]
    us = target.case.cache_bytes / (target.fractions[mode] * margin * read * 1e3)
    samples = {OCTAVO: us}
    for peer, least in target.times:
        for place, name in enumerate(peer.names):
            samples[name] = us * least * margin * (1 + place)
    entries = [Entry(name, "int8", target.case.cache_bytes, 2, 0.001) for name in samples]
    entries[0] = replace(entries[0], of_bound=0.3)
    blocks = [block(read, **samples)] * 20
    return Row(target.case.label, entries, blocks, target.case.workload.num_tokens, target.case)


def step_row(label: str, **samples: float) -> Row:
    """Return a race that is no case."""
    entries = [Entry(name, "int8", 1000, 2) for name in samples]
    return Row(label, entries, [block(**samples)] * 20, 1)


def results(margin: float = MARGIN, mode: Mode = "narrow") -> Results:
    """Return results that meet every goal by a margin."""
    found = Results(machine={"num_threads": 2}, software={"commit": "abc"}, wall_s=400)
    found.rows = [row_of(idx, mode, margin) for idx in range(len(TARGETS))]
    found.rows += [
        step_row(CALL, **{OCTAVO: 50 + 15 / margin, EMPTY: 50.0}),
        step_row(APPEND, **{OCTAVO: 100.0, MEMCPY: 60.0 * margin}),
        step_row(CAUSAL, **{OCTAVO: 100.0, SDPA_FOLDED: 100 * margin, SDPA_GQA: 130.0}),
    ]
    return found


def verdicts(found: list[Goal], part: str = "") -> set[str]:
    """Return the verdicts of goals whose names have a part."""
    return {goal.verdict for goal in found if part in goal.name}


NUM_FRACTIONS, NUM_TIMES, NUM_STEPS = 12, 3 * 4 + 2 + 1 + 2, 3


def test_goals_that_are_met() -> None:
    found = goals(results())
    assert len(found) == NUM_FRACTIONS + NUM_TIMES + NUM_STEPS
    assert verdicts(found) == {"met", "not seen"}
    assert [goal.name[-4:] for goal in found if goal.verdict == "not seen"] == ["wide"] * 6


def test_goals_that_are_missed() -> None:
    found = goals(results(margin=0.98))
    assert verdicts(found) == {"missed", "not seen"}


def test_each_mode_has_goals_of_its_own() -> None:
    found = results(mode="wide")
    narrow = row_of(1, "narrow", 0.98)
    found.rows[1] = replace(found.rows[1], blocks=[*found.rows[1].blocks, *narrow.blocks])
    judged = [goal for goal in goals(found) if goal.name.startswith("8x4k")]
    assert verdicts(judged, "narrow") == {"missed"}
    assert verdicts(judged, "wide") == {"met"}
    assert len(judged) == 2 + 2 * 4


def test_blocks_that_do_not_count_are_not_judged() -> None:
    found = results()
    slow = block(45, 75, **dict.fromkeys(found.rows[1].blocks[0].samples, 1e9))
    found.rows[1] = replace(found.rows[1], blocks=[*found.rows[1].blocks, *[slow] * 50])
    assert verdicts(goals(found), "8x4k") == {"met", "not seen"}
    found.rows = [replace(row, blocks=[slow] * 9) for row in found.rows]
    assert verdicts(goals(found)) == {"not seen"}


def test_two_rounds_are_no_mode() -> None:
    found = results()
    few = [*row_of(1, "wide", 0.9).blocks[:2], *found.rows[1].blocks]
    found.rows[1] = replace(found.rows[1], blocks=few)
    assert verdicts(goals(found), "8x4k 32/8/128, of read bandwidth, wide") == {"not seen"}
    found.rows[1] = replace(found.rows[1], blocks=[few[0], *few])
    assert verdicts(goals(found), "8x4k 32/8/128, of read bandwidth, wide") == {"missed"}


def test_torchs_best_is_the_fastest_of_its_ways() -> None:
    best = next(goal for goal in goals(results()) if "torch's best" in goal.name)
    times_as_fast = f"{3 * MARGIN:.2f}"
    spread_words = f"({times_as_fast} to {times_as_fast}, n=20)"
    assert best.found == f"{times_as_fast}x {spread_words}, {TORCH_FLOAT[0]}"


def test_a_peer_that_was_not_there_is_not_measured() -> None:
    found = results()
    found.rows[0].entries[:] = [one for one in found.rows[0].entries if one.name != OPENVINO]
    found.skipped = [(OPENVINO, "openvino is not installed")]
    goal = next(goal for goal in goals(found) if goal.name == "1x32k 32/8/128, against OpenVINO u8")
    assert (goal.verdict, goal.found) == ("not measured", "openvino is not installed")


def test_goals_without_results() -> None:
    assert verdicts(goals(Results())) == {"not measured"}


def test_goals_are_those_of_the_issue() -> None:
    fractions = {(t.case.workload.name, t.case.heads.label): t.fractions for t in TARGETS}
    assert len(fractions) == len(GOAL_CASES)
    assert fractions["16x4k", "14/2/64"] == {"narrow": 0.50, "wide": 0.25}
    assert [least for _, least in TARGETS[1].times] == [5, 8, 3, 20]
    assert MIN_CAUSAL_RATIO == 1


def test_the_sweep_is_one_curve() -> None:
    curve = [case for case in (*GOAL_CASES, *SWEEP_CASES) if is_in_sweep(case)]
    lengths = sorted(case.workload.lengths[0] for case in curve)
    assert lengths == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert [case.workload.name for case in SWEEP_CASES[:3]] == ["8x256", "8x512", "8x1k"]


# ---- What is saved ------------------------------------------------------------------------------


def test_json_has_samples_and_summaries_by_mode() -> None:
    found = results()
    found.skipped.append(("peer", "absent"))
    saved = json.loads(json.dumps(as_json(found, [goal.as_dict() for goal in goals(found)])))
    assert (saved["format"], saved["software"]["commit"], saved["wall_s"]) == (1, "abc", 400)
    assert saved["skipped"] == [{"what": "peer", "reason": "absent"}]
    row = saved["rows"][1]
    assert row["label"] == GOAL_CASES[1].label
    assert list(row["modes"]) == ["narrow"]
    narrow = row["modes"]["narrow"]
    assert narrow["read_gb_per_s"] == 45
    assert narrow["us"][OCTAVO]["num_samples"] == len(row["blocks"]) == 20
    assert narrow["fraction_of_read"][OCTAVO]["median"] == pytest.approx(0.8 * MARGIN, rel=1e-3)
    assert narrow["ours_times_as_fast"][OPENVINO]["median"] == pytest.approx(5 * MARGIN, rel=1e-3)
    assert row["blocks"][0]["before"] == {
        "read_gb_per_s": 45,
        "one_thread_gb_per_s": 40,
        "strategy": STRATEGIES[0],
    }
    assert row["blocks"][0]["counts"] is True


def test_markdown_tells_each_race() -> None:
    found = results()
    found.skipped.append(("peer", "absent"))
    text = as_markdown(found, goals(found), with_plot=True)
    assert "![Time against context](cpu-context.svg)" in text
    assert "- peer: absent" in text
    assert "## Failed" not in text
    case = text.split(f"### {GOAL_CASES[1].label}")[1].split("###")[0]
    assert "20 of 20 rounds count" in case
    assert "0.30 of its bound" in case
    assert "**Narrow.** Limit 45.0 GB/s" in case
    ours, peer = (line.split(" | ") for line in case.splitlines() if line.startswith("| O"))
    assert ours[0] == f"| {OCTAVO}"
    assert (ours[6], ours[7]) == ("82%", "-")
    assert (peer[0], peer[7]) == (f"| {OPENVINO}", "5.10x")
    assert "not seen" in as_markdown(found, goals(found), with_plot=False)


def test_a_row_without_blocks_that_count_says_so() -> None:
    lost = replace(results().rows[0], blocks=[block(45, 75)])
    assert summary_line(lost) == "no limits that agree"
    assert "Too few rounds whose limits agree." in as_markdown(
        Results(rows=[lost]), [], with_plot=False
    )


def sweep_results() -> Results:
    """Return a sweep in which Octavo takes twice as long as the floor."""
    found = results()
    found.rows = []
    for case in SWEEP_CASES:
        us = 2 * case.cache_bytes / 45e3
        samples = {OCTAVO: us, OPENVINO: 3 * us, GGML_F16: 3.01 * us}
        entries = [Entry(name, "int8", case.cache_bytes, 2) for name in samples]
        found.rows.insert(
            0, Row(case.label, entries, [block(45, **samples)] * 3, case.workload.num_tokens, case)
        )
    return found


def test_curves_rise_from_the_floor() -> None:
    floor, ours, *_ = series(sweep_results(), "narrow")
    assert (floor.name, ours.name) == (FLOOR, OCTAVO)
    assert [context for context, _ in floor.points] == [256, 512, 1024, 2048, 8192, 16384]
    slower = [y / x for (_, x), (_, y) in zip(floor.points, ours.points, strict=True)]
    assert slower == pytest.approx([2.0] * 6)
    assert series(sweep_results(), "wide") == [replace(floor, points=())]


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    assert spread([0.1, 0.5], 0.2) == [0.1, 0.5]
    assert spread([0.5, 0.5, 0.52], 0.1) == pytest.approx([0.40667, 0.50667, 0.60667], abs=1e-4)
    places = spread([0.1, 0.3, 0.31, 0.32, 0.41], 0.1)
    assert all(y - x > 0.0999 for x, y in pairwise(places))
    assert spread([], 0.1) == []


def test_the_same_results_are_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    assert [save_plot(sweep_results(), path, print) for path in paths] == [True, True]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(draw(sweep_results(), ["narrow"]).axes) == 1


def test_no_curve_without_contexts(tmp_path: Path) -> None:
    assert not save_plot(results(), tmp_path / "a.svg", print)
    assert list(tmp_path.iterdir()) == []
