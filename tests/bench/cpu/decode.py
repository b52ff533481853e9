"""Decoding one token of each session: Octavo beside its peers, all checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from octavo_server.backends.host_memory import free_host_bytes
from tests.bench.cpu.cases import estimated_s
from tests.bench.cpu.draws import PEER_TOLERANCE, Draw, draw_case, relative_error, worst_ratio
from tests.bench.cpu.ggml_peer import GGML_F16, GGML_Q8_0, ggml_racers
from tests.bench.cpu.octavo import octavo_racer
from tests.bench.cpu.openvino_peer import OPENVINO, openvino_racer
from tests.bench.cpu.racers import Racer
from tests.bench.cpu.results import Entry, Row
from tests.bench.cpu.setting import Setting
from tests.bench.cpu.torch_peers import INT8_IN_PLACE, INT8_WAY, TORCH_FLOAT, torch_racers
from tests.bench.shapes import Case

MEMORY_RATIO = 30
"""Memory that a case with all its peers takes, in terms of Octavo's cache."""


def measure_case(setting: Setting, case: Case) -> None:
    """Draw, check, time; whatever is in the way is recorded."""
    reason = _obstacle(setting, case)
    if reason is not None:
        setting.skip(case.label, reason)
        return
    checked = list(_checked(setting, draw_case(case)))
    if checked:
        entries = [entry for _, entry in checked]
        blocks = setting.race([racer.contestant for racer, _ in checked])
        setting.add(Row(case.label, entries, blocks, case.workload.num_tokens, case))


def _obstacle(setting: Setting, case: Case) -> str | None:
    if not setting.progress.has(estimated_s(case)):
        return "no time left"
    wanted = MEMORY_RATIO * case.cache_bytes
    if wanted > free_host_bytes():
        return f"takes some {wanted >> 20} MiB of memory, {free_host_bytes() >> 20} MiB are free"
    return None


def _checked(setting: Setting, draw: Draw) -> Iterator[tuple[Racer, Entry]]:
    """Return the racers whose answers are right, Octavo first; none where its own is wrong."""
    ours = octavo_racer(setting.backend, draw, setting.llc_bytes)
    of_bound = max(worst_ratio(ours.answer(copy), draw.exact) for copy in range(ours.num_copies))
    if setting.is_wrong(draw.case.label, of_bound):
        return
    yield ours, entry_of(ours, error_of(ours, draw), of_bound)
    for racer in _peers(setting, draw) if setting.with_peers else ():
        error = error_of(racer, draw)
        if error <= PEER_TOLERANCE:
            yield racer, entry_of(racer, error)
        else:
            setting.skip(racer.contestant.name, f"wrong in {draw.case.label}: error {error:.2g}")


def error_of(racer: Racer, draw: Draw) -> float:
    """Return the largest error of a racer's copies."""
    errors = (relative_error(racer.answer(copy), draw.exact) for copy in range(racer.num_copies))
    return max(errors)


def entry_of(racer: Racer, error: float | None, of_bound: float | None = None) -> Entry:
    """Return a racer's entry."""
    one = racer.contestant
    return Entry(one.name, one.dtype, one.launch_bytes, racer.num_copies, error, of_bound)


def _peers(setting: Setting, draw: Draw) -> Iterator[Racer]:
    threads, llc = setting.num_threads, setting.llc_bytes
    yield from _racers_or_skip(
        setting, (*TORCH_FLOAT, INT8_WAY, INT8_IN_PLACE), lambda: torch_racers(draw, llc)
    )
    yield from _racers_or_skip(setting, (OPENVINO,), lambda: [openvino_racer(draw, threads, llc)])
    yield from _racers_or_skip(
        setting, (GGML_F16, GGML_Q8_0), lambda: ggml_racers(draw, threads, llc)
    )


def _racers_or_skip(
    setting: Setting, names: Sequence[str], make: Callable[[], list[Racer]]
) -> list[Racer]:
    """Return racers that were checked to answer at all, nothing where they cannot be had."""
    try:
        racers = make()
        for racer in racers:
            racer.answer(0)
    except Exception as error:  # whatever a peer raises, the others are measured
        for name in names:
            setting.skip(name, f"{error}" or type(error).__name__)
        return []
    return racers
