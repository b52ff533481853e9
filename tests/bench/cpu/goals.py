"""What the cpu backend is to reach, as ratios in one run, and whether it did.

Only blocks whose limits before and after agree are judged. Memory has two modes: a goal of a case is judged in each
mode that was seen, and "not seen" in the other. A verdict is on the median.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.cpu.append import APPEND, MEMCPY
from tests.bench.cpu.call import CALL, EMPTY
from tests.bench.cpu.cases import GOAL_CASES
from tests.bench.cpu.causal import CAUSAL, SDPA_FOLDED, SDPA_GQA
from tests.bench.cpu.ggml_peer import GGML_Q8_0
from tests.bench.cpu.memory import Mode
from tests.bench.cpu.openvino_peer import OPENVINO
from tests.bench.cpu.race import Block, difference, fraction, ratio, steady
from tests.bench.cpu.results import Results, Row
from tests.bench.cpu.torch_peers import INT8_WAY, TORCH_FLOAT
from tests.bench.goals import Goal, Verdict
from tests.bench.shapes import Case
from tests.bench.stats import Summary

MAX_CALL_US = 15.0
MIN_APPEND_FRACTION = 0.60
MIN_CAUSAL_RATIO = 1.0


@dataclass(frozen=True, slots=True)
class Peer:
    """One or more contestants that Octavo is to beat.

    Attributes:
        label: What they are called together.
        names: Contestants; the fastest of them counts.
    """

    label: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The goals of one case.

    Attributes:
        case: The case.
        fractions: Least fraction of the read bandwidth in each mode.
        times: How many times as fast as each peer.
    """

    case: Case
    fractions: Mapping[Mode, float]
    times: tuple[tuple[Peer, float], ...]


_OPENVINO, _GGML = Peer("OpenVINO u8", (OPENVINO,)), Peer("ggml Q8_0", (GGML_Q8_0,))
_TORCH, _INT8 = Peer("torch's best", TORCH_FLOAT), Peer("torch's INT8 way", (INT8_WAY,))
_LLAMA_TIMES = ((_OPENVINO, 5.0), (_GGML, 8.0), (_TORCH, 3.0), (_INT8, 20.0))


def _target(
    case: Case, narrow: float, wide: float, times: tuple[tuple[Peer, float], ...]
) -> Target:
    return Target(case, {"narrow": narrow, "wide": wide}, times)


TARGETS = (
    *(_target(case, 0.80, 0.50, _LLAMA_TIMES) for case in GOAL_CASES[:3]),
    _target(GOAL_CASES[3], 0.65, 0.35, ((_OPENVINO, 5.0), (_TORCH, 2.5))),
    _target(GOAL_CASES[4], 0.85, 0.70, ((_OPENVINO, 3.0),)),
    _target(GOAL_CASES[5], 0.50, 0.25, ((_OPENVINO, 4.0), (_TORCH, 2.2))),
)


def goals(results: Results) -> list[Goal]:
    """Hold the results against the goals."""
    return [
        *(goal for target in TARGETS for goal in _case_goals(results, target)),
        _call(results),
        _append(results),
        _causal(results),
    ]


# ---- Decoding -----------------------------------------------------------------------------------


def _case_goals(results: Results, target: Target) -> Iterator[Goal]:
    row = results.row(target.case.label)
    name = f"{target.case.workload.name} {target.case.heads.label}"
    for mode, least in target.fractions.items():
        found = None if row is None else _fraction(row, mode)
        words = "" if found is None else _share(found)
        verdict = _verdict(row, found, least=least)
        yield Goal(f"{name}, of read bandwidth, {mode}", f"{least:.0%}", words, verdict)
    for peer, least in target.times:
        yield from _peer_goals(results, row, f"{name}, against {peer.label}", peer, least)


def _peer_goals(
    results: Results, row: Row | None, name: str, peer: Peer, least: float
) -> Iterator[Goal]:
    """Judge a ratio in each mode that occurred; one line where none did or the peer was not there."""
    if row is None or not any(row.entry(one) for one in peer.names):
        reason = next(filter(None, map(results.reason, peer.names)), "")
        yield Goal(name, f"{least:g}x", reason, "not measured")
        return
    for mode in row.modes():
        fastest, found = _against(row, peer.names, steady(row.blocks, mode))
        words = _times(found, fastest if len(peer.names) > 1 else None)
        yield Goal(f"{name}, {mode}", f"{least:g}x", words, _verdict(row, found, least=least))
    if not row.modes():
        yield Goal(name, f"{least:g}x", "", "not seen")


def _fraction(row: Row, mode: Mode) -> Summary | None:
    if mode not in row.modes():
        return None
    return fraction(steady(row.blocks, mode), row.ours.name, row.ours.launch_bytes)


def _against(
    row: Row, names: Sequence[str], blocks: Sequence[Block]
) -> tuple[str | None, Summary | None]:
    """Return the fastest of some contestants and how many times as long as Octavo it took."""
    fastest = row.fastest(names, blocks)
    return fastest, None if fastest is None else ratio(blocks, fastest, row.ours.name)


# ---- The rest -----------------------------------------------------------------------------------


def _call(results: Results) -> Goal:
    row = results.row(CALL)
    found = None if row is None else difference(steady(row.blocks), row.ours.name, EMPTY)
    return Goal(
        f"{CALL}: a step, over the same call with empty kernels",
        f"+ {MAX_CALL_US:.0f} us or less",
        "" if found is None else f"+ {found.median:.1f} us ({found.p10:.1f} to {found.p90:.1f})",
        _verdict(row, found, most=MAX_CALL_US),
    )


def _append(results: Results) -> Goal:
    """Judge rates of equal bytes: the ratio of the rates is that of the times."""
    row = results.row(APPEND)
    found = None if row is None else ratio(steady(row.blocks), MEMCPY, row.ours.name)
    return Goal(
        f"{APPEND}: bytes read and written per second, of a memcpy's",
        f"{MIN_APPEND_FRACTION:.0%}",
        "" if found is None else _share(found),
        _verdict(row, found, least=MIN_APPEND_FRACTION),
    )


def _causal(results: Results) -> Goal:
    row = results.row(CAUSAL)
    names = SDPA_FOLDED, SDPA_GQA
    fastest, found = (None, None) if row is None else _against(row, names, steady(row.blocks))
    return Goal(
        f"{CAUSAL}, against torch SDPA in FP32",
        f"{MIN_CAUSAL_RATIO:g}x",
        _times(found, fastest),
        _verdict(row, found, least=MIN_CAUSAL_RATIO),
    )


def _verdict(
    row: Row | None, found: Summary | None, *, least: float = -math.inf, most: float = math.inf
) -> Verdict:
    """Judge a median; "not seen" where the race was run and no block of the kind counts."""
    if row is None:
        return "not measured"
    if found is None:
        return "not seen"
    return "met" if least <= found.median <= most else "missed"


def _share(found: Summary) -> str:
    return f"{found.median:.0%} ({found.p10:.0%} to {found.p90:.0%}, n={found.num_samples})"


def _times(found: Summary | None, name: str | None) -> str:
    if found is None:
        return ""
    words = f"{found.median:.2f}x ({found.p10:.2f} to {found.p90:.2f}, n={found.num_samples})"
    return words if name is None else f"{words}, {name}"
