"""The decode kernel beside others, case by case, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch

from tests.bench import peers
from tests.bench.bench_library import OCTAVO, THREE_PASS
from tests.bench.checks import checked_entries, error_ratio
from tests.bench.contest import Contestant, compete
from tests.bench.pool import HostStep, Pool, Rotation, draw_steps, rotating
from tests.bench.results import (
    ORIGINAL,
    OURS,
    OURS_IN_GRAPH,
    DecodeRow,
    decode_row,
    figures_of,
)
from tests.bench.setting import Setting
from tests.bench.shapes import Case, num_copies

POOL_FRACTION, PEERS_FRACTION = 0.15, 0.15
"""Of the device's memory, for the pool and for the peers' caches."""

CASE_S, PEERS_S, FLEX_S = 6.0, 8.0, 45.0
"""What a case takes at most, what its peers take, and what compiling FlexAttention takes."""

IN_GRAPH_BYTES = 64 << 20
"""A launch that reads less is also timed in a graph: the host's part counts there."""


class CheckError(AssertionError):
    """A kernel's answer misses its bound: it is not worth timing."""


def measure_decode(setting: Setting, cases: Sequence[Case]) -> None:
    """Measure all cases; those of one pool have to follow each other."""
    for (heads, block_size), group in groupby(
        cases, key=lambda case: (case.heads, case.block_size)
    ):
        of_pool = list(group)
        setting.progress.say(f"filling the pool of {heads.label}, block_size {block_size}")
        with _pool(setting, of_pool) as pool:
            for case in of_pool:
                _try(setting, case, pool)


def _try(setting: Setting, case: Case, pool: Pool) -> None:
    """Measure a case if there is time; one that fails leaves the others as they are."""
    if not setting.progress.has(CASE_S):
        setting.skip(case.label, "no time left")
        return
    try:
        setting.results.decode.append(_measure(setting, case, pool))
    except (CheckError, torch.OutOfMemoryError) as error:
        setting.fail(case.label, str(error).partition("\n")[0])
    setting.device.release()


@contextmanager
def _pool(setting: Setting, cases: Sequence[Case]) -> Iterator[Pool]:
    """Make a pool that holds the copies of the largest case."""
    num_blocks = max(_num_copies(setting, case) * case.num_blocks for case in cases)
    yield Pool(setting.device, cases[0].heads, cases[0].block_size, num_blocks)
    setting.device.release()


def _num_copies(setting: Setting, case: Case) -> int:
    most_bytes = int(POOL_FRACTION * setting.device.memory_bytes)
    return num_copies(case.cache_bytes, setting.device.l2_bytes, most_bytes)


def _measure(setting: Setting, case: Case, pool: Pool) -> DecodeRow:
    steps = draw_steps(case, pool, _num_copies(setting, case))
    with rotating(setting.kernels, pool, steps) as rotation:
        worst_error = _check(case, rotation, OCTAVO)
        ours = partial(rotation.launch, kernel=OCTAVO)
        contestants = [Contestant(OURS, "int8", case.cache_bytes, ours)]
        if case.cache_bytes < IN_GRAPH_BYTES:
            contestants.append(
                Contestant(OURS_IN_GRAPH, "int8", case.cache_bytes, ours, in_graph=True)
            )
        if case.workload.is_short:
            _check(case, rotation, THREE_PASS)
            plain = partial(rotation.launch, kernel=THREE_PASS)
            contestants.append(Contestant(ORIGINAL, "int8", case.cache_bytes, plain))
        others, notes = _peers(setting, case, pool, steps)
        entrants = compete(setting.device, [*contestants, *others], setting.num_rounds)
        plan = rotation.residents[0].plan
    row = decode_row(case, len(steps), worst_error, plan, figures_of(entrants, notes))
    _tell(setting, row)
    return row


def _check(case: Case, rotation: Rotation, kernel: int) -> float:
    """Return the largest error over its bound in the first and the last of the rotating steps."""
    worst = 0.0
    for step_idx in {0, len(rotation.host_steps) - 1}:
        step = rotation.host_steps[step_idx]
        out = rotation.answer(step_idx, kernel)
        worst = max(worst, error_ratio(rotation.pool, step, out, checked_entries(step.kv_lens)))
    if worst > 1:
        name = ORIGINAL if kernel == THREE_PASS else OURS
        raise CheckError(f"{name} has {worst:.3g} times the error that it may have in {case.label}")
    return worst


def _peers(
    setting: Setting, case: Case, pool: Pool, steps: list[HostStep]
) -> tuple[list[Contestant], dict[str, str]]:
    """Return the peers that can take part, and what is to be noted of them."""
    wanted = _affordable(setting, case)
    most_bytes = int(PEERS_FRACTION * setting.device.memory_bytes)
    copies = min(len(steps), num_copies(case.bf16_bytes, setting.device.l2_bytes, most_bytes))
    if not wanted:
        return [], {}
    cache = peers.gather(pool, steps[:copies])
    found, notes = [], {}
    for peer, contestant, note in peers.contestants(case, pool, steps, cache, wanted):
        if contestant is None:
            setting.skip(f"{peer.name}, {case.label}", note)
        else:
            found.append(contestant)
            notes[peer.name] = note
    return found, notes


def _affordable(setting: Setting, case: Case) -> list[peers.Peer]:
    """Return the peers that there is time for."""
    wanted = peers.peers_for(case, quick=setting.quick)
    if wanted and not setting.progress.has(CASE_S + PEERS_S):
        setting.skip(f"peers, {case.label}", "no time left")
        return []
    if peers.FLEX in wanted and not setting.progress.has(CASE_S + PEERS_S + FLEX_S):
        setting.skip(f"{peers.FLEX.name}, {case.label}", "no time left")
        wanted.remove(peers.FLEX)
    return wanted


def _tell(setting: Setting, row: DecodeRow) -> None:
    """Say a case's medians, and how the kernels' compare."""
    cells = []
    for figure in row.figures:
        ratio = "" if figure.speedup is None else f" ({figure.speedup.median:.2f}x)"
        cells.append(f"{figure.name} {figure.us.median:.2f} us{ratio}")
    setting.progress.say(
        f"{row.label}: error {row.worst_error:.2f} of its bound; {'; '.join(cells)}"
    )
