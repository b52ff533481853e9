"""Answers checked against the oracle, by processes of their own, so that nothing that is timed waits for it.

An answer is kept with the four numbers that its cache is made again from. The rows that sessions are made of are
quantised once, since the quantiser takes each row by itself; a check then costs one attention in float64.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo_client._types import Model
from octavo_client.load.content import Rows, draw_rows, walk_of
from octavo_client.oracle import (
    MAX_CHECKED_SCORE,
    AttentionOptions,
    attention,
    dequantize,
    error_ratios,
    quantize,
)

MAX_BACKLOG = 20_000
"""Answers that wait to be checked; those beyond are dropped, and counted."""

MAX_FAULTS = 20
"""Wrong answers that are told one by one; the others are counted."""

NICENESS = 15
"""Of the processes that check: what is timed goes before them."""

_CHUNK = 8


class Sample(NamedTuple):
    """An answer, and where its cache came from.

    Attributes:
        model: Name of the model.
        session_key: Of the session.
        layer: The layer.
        position: The query's position; the cache holds [0, position].
        out: [num_q_heads, head_dim], as answered.
    """

    model: str
    session_key: int
    layer: int
    position: int
    out: NDArray[Any]


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        error_ratio: Error over the bound of the worst head; over 1 is wrong.
        fault: What is wrong; empty when nothing is.
        is_bounded: Whether any head has scores that the bound is stated for.
    """

    error_ratio: float
    fault: str
    is_bounded: bool = True


class Checker:
    """Checks answers of some models.

    Args:
        seed: Of the workload.
        models: By name.
        dtype: Of the workload.
    """

    def __init__(self, seed: int, models: Mapping[str, Model], dtype: str) -> None:
        self._models = models
        self._rows = {name: draw_rows(seed, model, dtype) for name, model in models.items()}
        self._stored = {name: _quantized(rows) for name, rows in self._rows.items()}

    def check(self, sample: Sample) -> Finding:
        """Compare an answer with attention in float64 over the cache that it must have come from."""
        model, rows = self._models[sample.model], self._rows[sample.model]
        expected = (model.num_q_heads, model.head_dim)
        if sample.out.shape != expected or sample.out.dtype != rows.q.dtype:
            shape = f"{list(sample.out.shape)} {sample.out.dtype}"
            return self._wrong(
                sample, float("inf"), f"is {shape}, not {list(expected)} {rows.q.dtype}"
            )
        walk = walk_of(sample.session_key, sample.layer)
        indices = walk.kv_rows(0, sample.position + 1)
        k_codes, k_scales, v_codes, v_scales = (
            part[indices] for part in self._stored[sample.model]
        )
        exact = attention(
            rows.q[[walk.q_row(sample.position)]],
            dequantize(k_codes, k_scales),
            dequantize(v_codes, v_scales),
            _options(model, sample.layer),
            start_pos=sample.position,
        )
        ratio = float(error_ratios(sample.out[None], exact).max())
        if ratio > 1:
            return self._wrong(sample, ratio, f"has {ratio:.3g} times the error that it may have")
        return Finding(ratio, "", bool((exact.peak_score <= MAX_CHECKED_SCORE).any()))

    def _wrong(self, sample: Sample, ratio: float, text: str) -> Finding:
        where = f"layer {sample.layer}, position {sample.position}"
        return Finding(ratio, f"the answer of model {sample.model}, {where}, {text}")


def _quantized(rows: Rows) -> tuple[NDArray[Any], ...]:
    return (*quantize(rows.k), *quantize(rows.v))


def _options(model: Model, layer: int) -> AttentionOptions:
    return AttentionOptions(
        model.sm_scale[layer],
        model.window[layer],
        model.soft_cap[layer],
        None if model.sinks is None else model.sinks[layer],
    )


_checker: Checker | None = None


def _start_checker(niceness: int, seed: int, models: Mapping[str, Model], dtype: str) -> None:
    global _checker  # noqa: PLW0603 - a process of the pool has one
    os.nice(niceness)
    _checker = Checker(seed, models, dtype)


def _check_all(samples: Sequence[Sample]) -> list[Finding]:
    assert _checker is not None
    return [_checker.check(sample) for sample in samples]


@dataclass(slots=True)
class CheckCounts:
    """What came of the checks.

    Attributes:
        num_checked: Answers checked.
        num_wrong: Answers that missed the bound.
        num_unbounded: Answers checked for being finite only: all their scores are beyond what the bound is stated for.
        num_dropped: Answers that were not checked, because too many waited.
        most_waiting: Largest backlog.
        worst_ratio: Largest error over its bound.
        longest_context: Most cached tokens of a checked answer.
        faults: What was wrong, the first ones.
    """

    num_checked: int = 0
    num_wrong: int = 0
    num_unbounded: int = 0
    num_dropped: int = 0
    most_waiting: int = 0
    worst_ratio: float = 0.0
    longest_context: int = 0
    faults: list[str] = field(default_factory=list)


class CheckPool:
    """Checks answers in processes of its own; one caller at a time.

    Args:
        workload: Its seed, models and dtype.
        num_processes: How many processes.
        is_eager: Whether answers are checked as they come; False: once `finish` is called.
        niceness: Of the processes.
    """

    def __init__(
        self,
        workload: tuple[int, Mapping[str, Model], str],
        num_processes: int,
        *,
        is_eager: bool,
        niceness: int = NICENESS,
    ) -> None:
        self._executor = ProcessPoolExecutor(
            num_processes, get_context("spawn"), _start_checker, (niceness, *workload)
        )
        self._is_eager = is_eager
        self._waiting: deque[Sample] = deque()
        self._running: deque[tuple[int, Future[list[Finding]]]] = deque()
        self._counts = CheckCounts()

    @property
    def counts(self) -> CheckCounts:
        """What came of the checks since `reset`."""
        return self._counts

    @property
    def num_waiting(self) -> int:
        """Answers that are not checked yet."""
        return len(self._waiting) + sum(size for size, _ in self._running)

    def reset(self) -> None:
        """Count anew."""
        self._counts = CheckCounts()

    def add(self, samples: Sequence[Sample]) -> None:
        """Take answers to check."""
        room = max(MAX_BACKLOG - self.num_waiting, 0)
        self._counts.num_dropped += max(len(samples) - room, 0)
        self._waiting.extend(samples[:room])
        self._counts.most_waiting = max(self._counts.most_waiting, self.num_waiting)
        longest = max((sample.position + 1 for sample in samples[:room]), default=0)
        self._counts.longest_context = max(self._counts.longest_context, longest)
        if self._is_eager:
            self._submit()

    def collect(self) -> None:
        """Count the checks that are done."""
        while self._running and self._running[0][1].done():
            self._count(self._running.popleft()[1])

    def finish_some(self, timeout_s: float) -> bool:
        """Check what waits; return whether all is done, after at most `timeout_s`."""
        self._submit()
        if self._running:
            self._wait(self._running[0][1], timeout_s)
        self.collect()
        return not self._running

    def close(self) -> None:
        """End the processes; what still waits is not checked."""
        self._executor.shutdown(cancel_futures=True)

    def _wait(self, future: Future[list[Finding]], timeout_s: float) -> None:
        try:
            future.exception(timeout_s)
        except TimeoutError:
            return

    def _submit(self) -> None:
        while self._waiting:
            chunk = [self._waiting.popleft() for _ in range(min(_CHUNK, len(self._waiting)))]
            try:
                future = self._executor.submit(_check_all, chunk)
            except BrokenProcessPool as error:
                future = Future()
                future.set_exception(error)
            self._running.append((len(chunk), future))

    def _count(self, future: Future[list[Finding]]) -> None:
        error = future.exception()
        if error is not None:
            self._tell(f"the checker failed: {error!r}")
            return
        for finding in future.result():
            self._counts.num_checked += 1
            self._counts.num_unbounded += not finding.is_bounded
            self._counts.worst_ratio = max(self._counts.worst_ratio, finding.error_ratio)
            if finding.fault:
                self._counts.num_wrong += 1
                self._tell(finding.fault)

    def _tell(self, fault: str) -> None:
        if len(self._counts.faults) < MAX_FAULTS:
            self._counts.faults.append(fault)


def host_row(out: NDArray[Any], row: int) -> NDArray[Any]:
    """Return a copy of one row of an answer, so that the message behind it can go."""
    return np.array(out[row])
