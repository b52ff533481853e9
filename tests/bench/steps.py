"""The append kernel, and the whole step: what it costs beside its kernels."""

from __future__ import annotations

from functools import partial

from tests.bench.bench_library import OCTAVO
from tests.bench.checks import check_appended, checked_entries, error_ratio
from tests.bench.contest import Contestant, compete
from tests.bench.decode import CheckError
from tests.bench.pool import Pool, Rotation, draw_steps, rotating
from tests.bench.results import AppendRow, StepRow, figures_of
from tests.bench.setting import Setting
from tests.bench.shapes import FP16_BYTES, LLAMA, Case, Workload, num_copies, uniform
from tests.bench.stats import summarize

DECODE_STEP = Case(LLAMA, uniform(64, 4096))
NEW_TOKENS = Case(LLAMA, Workload("64 contexts", (32,) * 64))
PROMPT = Case(LLAMA, uniform(1, 32768))

_NUM_CHECKED_ROWS = 5
_APPEND_BYTES = 2 << 30
_KERNEL_LAUNCHES = 8
_WARM_STEPS = 5


def measure_append(setting: Setting, case: Case, num_tokens: int) -> None:
    """Measure the append kernel over the last `num_tokens` tokens of each of a case's contexts."""
    total = len(case.workload.lengths) * num_tokens
    moved = total * case.heads.append_token_bytes
    pool_bytes = min(_APPEND_BYTES, int(0.1 * setting.device.memory_bytes))
    by_memory = max(1, pool_bytes // case.cache_bytes)
    copies = min(num_copies(moved, setting.device.l2_bytes, pool_bytes), by_memory)
    pool = Pool(setting.device, case.heads, case.block_size, copies * case.num_blocks)
    label = f"{total} tokens into {case.workload.name} {case.heads.label}"
    steps = draw_steps(case, pool, copies, num_tokens=num_tokens, appends=True, attends=False)
    with rotating(setting.kernels, pool, steps) as rotation:
        _check_append(setting, rotation, total, label)
        contestant = Contestant(
            "append", "int8", moved, partial(rotation.launch, kernel=OCTAVO), in_graph=True
        )
        entrants = compete(setting.device, [contestant], setting.num_rounds)
    figure = figures_of(entrants, {})[0]
    setting.results.append.append(AppendRow(label, total, figure))
    setting.progress.say(f"append, {label}: {figure.us.median:.2f} us, {figure.gb_per_s:.0f} GB/s")
    setting.device.release()


def measure_step(setting: Setting, case: Case = DECODE_STEP) -> None:
    """Measure a step that appends one token to each context and attends, three ways in turn."""
    pool = Pool(setting.device, case.heads, case.block_size, case.num_blocks)
    steps = draw_steps(case, pool, 1, appends=True)
    with rotating(setting.kernels, pool, steps) as rotation:
        _check_step(setting, rotation)
        host = setting.kernels.make_host(steps[0].struct(pool), 0)
        try:
            setting.results.step = _time_step(setting, case, rotation, host)
        finally:
            setting.kernels.free_host(host)
    row = setting.results.step
    setting.progress.say(
        f"step of {row.label}: kernels {row.kernels.median:.1f} us, from pinned to pinned "
        f"+ {row.overhead.median:.1f} us, host copies + {row.host_copies.median:.1f} us"
    )
    setting.device.release()


def _check_append(setting: Setting, rotation: Rotation, total: int, label: str) -> None:
    """Hold rows from all over the append against the oracle."""
    rotation.launch(0, 1, OCTAVO)
    setting.device.synchronize()
    rows = sorted(
        {idx * (total - 1) // (_NUM_CHECKED_ROWS - 1) for idx in range(_NUM_CHECKED_ROWS)}
    )
    reason = check_appended(rotation.pool, rotation.host_steps[0], rows)
    if reason is not None:
        setting.skip(f"check of append, {label}", reason)


def _check_step(setting: Setting, rotation: Rotation) -> None:
    """Hold the step's answer against attention over the cache, which has its tokens by then."""
    out = rotation.answer(0, OCTAVO)
    step = rotation.host_steps[0]
    setting.device.synchronize()
    reason = check_appended(rotation.pool, step, range(len(step.kv_lens)))
    if reason is not None:
        setting.skip("check of the step's append", reason)
    worst = error_ratio(rotation.pool, step, out, checked_entries(step.kv_lens))
    if worst > 1:
        raise CheckError(f"the step has {worst:.3g} times the error that it may have")


def _time_step(setting: Setting, case: Case, rotation: Rotation, host: int) -> StepRow:
    """Take a sample of each way in each round."""
    device, library, resident = setting.device, setting.kernels, rotation.residents[0]
    launches = partial(rotation.launch, 0, _KERNEL_LAUNCHES, OCTAVO)
    kernels: list[float] = []
    pinned: list[float] = []
    whole: list[float] = []
    for round_idx in range(-_WARM_STEPS, 2 * setting.num_rounds):
        samples = (
            device.time_us(launches) / _KERNEL_LAUNCHES,
            library.run_resident(resident, device.stream()),
            library.run_host(host),
        )
        if round_idx >= 0:
            for sample, kept in zip(samples, (kernels, pinned, whole), strict=True):
                kept.append(sample)
    return StepRow(
        f"{case.workload.name} {case.heads.label}",
        *_copied_bytes(case),
        summarize(kernels),
        summarize(pinned),
        summarize(whole),
        summarize([x - y for x, y in zip(pinned, kernels, strict=True)]),
        summarize([x - y for x, y in zip(whole, pinned, strict=True)]),
    )


def _copied_bytes(case: Case) -> tuple[int, int]:
    """Return the bytes of q, k and v, and of out."""
    heads = case.heads
    row_bytes = len(case.workload.lengths) * heads.head_dim * FP16_BYTES
    return (heads.num_q_heads + 2 * heads.num_kv_heads) * row_bytes, heads.num_q_heads * row_bytes
