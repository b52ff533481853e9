"""A run: load points one after the other, each prepared, warmed up, measured, put away and checked."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack

from octavo_client import Client
from octavo_client.load.checks import CheckPool
from octavo_client.load.fleet import Fleet, cpu_shares
from octavo_client.load.histogram import Histogram
from octavo_client.load.janitor import Janitor, read_baseline
from octavo_client.load.pace import NS_PER_S, Span
from octavo_client.load.plan import split_point
from octavo_client.load.results import PointResult, RunResult, Settings, Status, View
from octavo_client.load.watch import Watch
from octavo_client.load.worker import Parcel

_POLL_S = 0.1
_START_DELAY_NS = NS_PER_S // 5
_LONGEST_NS = 24 * 3600 * NS_PER_S
_MOST_MOMENTS = 120
_MOST_ERRORS = 500
"""Unexpected ones; a load point with more is ended."""

_GRACE_S = 120.0


class Runner:
    """Runs a sweep.

    Args:
        settings: What to run.
        client: To the server, for what is not load.
        view: What shows it.
    """

    def __init__(self, settings: Settings, client: Client, view: View) -> None:
        self._settings = settings
        self._view = view
        self._stack = ExitStack()
        workload = settings.workload
        self._fleet = Fleet(workload, settings.num_processes, random.Random(workload.seed))
        self._stack.callback(self._fleet.close)
        self._janitor = Janitor(client, read_baseline(client))
        self._stack.callback(self._janitor.close)
        self._checks: CheckPool | None = None
        if workload.check:
            about = (workload.seed, workload.models, workload.dtype)
            self._checks = CheckPool(about, settings.num_checkers, is_eager=settings.checks_at_once)
            self._stack.callback(self._checks.close)

    def run(self) -> RunResult:
        """Run all load points; Ctrl-C ends the run early, with what there is."""
        watched_id = self._settings.watched_id
        result = RunResult(watch=None if watched_id is None else Watch(watched_id))
        with self._stack:
            try:
                for point_idx in range(len(self._settings.points)):
                    self._run_point(point_idx, result)
                    if result.faults:
                        break
            except KeyboardInterrupt:
                result.is_interrupted = True
            self._put_away(result)
        return result

    def _run_point(self, point_idx: int, run: RunResult) -> None:
        point = self._settings.points[point_idx]
        result = PointResult(point)
        run.points.append(result)
        if self._checks is not None:
            self._checks.reset()
            result.checks = self._checks.counts
        one = PointRun(self._settings, self._fleet, result, self._checks)
        try:
            for status in one.phases(point_idx):
                self._view.show(status)
                if run.watch is not None:
                    run.watch.look()
                if (killed := one.killed_sessions()) is not None:
                    self._janitor.close_soon(killed)
            result.is_complete = not one.faults
        finally:
            one.wind_up()
            run.faults += one.faults
            self._view.end_point(result)

    def _put_away(self, result: RunResult) -> None:
        """Close what was left open, and see that the server is as before."""
        is_alone = not self._settings.is_shared
        if is_alone:
            result.num_left_open = len(self._janitor.left_open())
        result.faults += self._janitor.finish(sweep=is_alone)
        is_cut = self._settings.workload.chaos & {"kill", "cancel"}
        if is_alone and result.num_left_open and not is_cut:
            result.faults.append(f"{result.num_left_open} sessions were left open")
        if is_alone:
            differences = self._janitor.differences()
            result.was_restored = not differences
            result.faults += differences


class PointRun:
    """One load point under way.

    Args:
        settings: Of the run.
        fleet: The processes.
        result: What it gives, filled in as parcels come.
        checks: Where answers are checked, if they are.
    """

    def __init__(
        self, settings: Settings, fleet: Fleet, result: PointResult, checks: CheckPool | None
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._result = result
        self._checks = checks
        self._recent: list[tuple[int, Histogram]] = []
        self._killed: list[set[str]] = []
        self._span: Span | None = None
        self._next_kill_ns = 0
        self.faults: list[str] = []
        if settings.duration_s is not None:
            result.moment_s = max(0.5, settings.duration_s / _MOST_MOMENTS)

    def phases(self, point_idx: int) -> Iterator[Status]:
        """Run it; yields its state ten times a second."""
        for phase, done in self._steps(point_idx):
            recent_s, recent = self._latest()
            yield Status(
                phase,
                done,
                self._result,
                point_idx,
                len(self._settings.points),
                recent,
                recent_s,
                0 if self._checks is None else self._checks.num_waiting,
            )

    def killed_sessions(self) -> set[str] | None:
        """Return what a killed process left behind, once for each."""
        return self._killed.pop() if self._killed else None

    def wind_up(self) -> None:
        """End what still runs, when the load point was ended early."""
        if self._fleet.is_finished:
            return
        self._fleet.stop()
        deadline = time.monotonic() + _GRACE_S
        while not self._fleet.is_finished and time.monotonic() < deadline:
            self._receive()
        self._sum_up()

    def _steps(self, point_idx: int) -> Iterator[tuple[str, float]]:
        settings = self._settings
        shares = split_point(
            self._result.point, point_idx, settings.num_processes, settings.max_steps
        )
        self._fleet.prepare(shares)
        while not self._fleet.is_ready:
            self._receive()
            num_open = self._result.tally.num_opened
            yield f"opening sessions: {num_open}", 0.0
        self._span = span = self._make_span()
        self._fleet.start(span)
        while not self._fleet.is_finished and self._is_in_time(span):
            self._receive()
            self._maybe_kill(span)
            if self._result.tally.faults.total() > _MOST_ERRORS:
                self._fleet.stop()
            yield self._phase(span)
        self._sum_up()
        while self._checks is not None and not self._checks.finish_some(_POLL_S):
            num_sampled = self._result.tally.num_sampled
            yield "checking answers", self._result.checks.num_checked / max(num_sampled, 1)

    def _sum_up(self) -> None:
        span = self._span
        if span is None:
            return
        self._result.elapsed_s = self._elapsed_s(span)
        end_ns = max(self._result.tally.last_ns, span.measure_ns)
        self._result.cpu_shares = cpu_shares(self._fleet.cpu, span.measure_ns, end_ns)

    def _make_span(self) -> Span:
        settings = self._settings
        start_ns = time.monotonic_ns() + _START_DELAY_NS
        measure_ns = start_ns + int(settings.warm_up_s * NS_PER_S)
        lasts_ns = _LONGEST_NS if settings.duration_s is None else settings.duration_s * NS_PER_S
        return Span(start_ns, measure_ns, measure_ns + int(lasts_ns))

    def _is_in_time(self, span: Span) -> bool:
        late_s = (time.monotonic_ns() - span.end_ns) / NS_PER_S
        if late_s < _GRACE_S + self._settings.workload.timeout_s:
            return True
        self.faults.append(f"the processes did not end within {late_s:.0f} s after the load point")
        return False

    def _phase(self, span: Span) -> tuple[str, float]:
        now = time.monotonic_ns()
        if now < span.measure_ns:
            return "warming up", 0.0
        by_steps = self._result.tally.num_steps / (self._settings.max_steps or float("inf"))
        by_time = (now - span.measure_ns) / (span.end_ns - span.measure_ns)
        done = max(by_steps, by_time)
        return ("measuring", done) if done < 1 else ("closing sessions", 1.0)

    def _receive(self) -> None:
        for parcel in self._fleet.receive(_POLL_S):
            self._take(parcel)
        self.faults += self._fleet.lost()
        if self._checks is not None:
            self._checks.collect()

    def _take(self, parcel: Parcel) -> None:
        tally = parcel.page.tally
        self._result.tally.merge(tally)
        if self._checks is not None and parcel.page.samples:
            self._checks.add(parcel.page.samples)
        if self._span is None or not tally.latency.num_values:
            return
        moment = int((parcel.at_ns - self._span.start_ns) / NS_PER_S / self._result.moment_s)
        self._result.moments.setdefault(moment, Histogram()).merge(tally.latency)
        self._recent.append((parcel.at_ns, tally.latency))

    def _latest(self, recent_s: float = 2.0) -> tuple[float, Histogram]:
        since = time.monotonic_ns() - int(recent_s * NS_PER_S)
        self._recent = [(at, latency) for at, latency in self._recent if at >= since]
        merged = Histogram()
        for _, latency in self._recent:
            merged.merge(latency)
        return recent_s, merged

    def _maybe_kill(self, span: Span) -> None:
        now = time.monotonic_ns()
        if "kill" not in self._settings.workload.chaos or not span.measure_ns <= now < span.end_ns:
            return
        if self._next_kill_ns == 0:
            self._next_kill_ns = span.measure_ns
        if now < self._next_kill_ns:
            return
        left_behind, parcels = self._fleet.kill_one()
        for parcel in parcels:
            self._take(parcel)
        if left_behind:
            self._result.tally.chaos["kill"] += 1
            self._killed.append(left_behind)
            self._next_kill_ns = now + int(self._settings.kill_every_s * NS_PER_S)

    def _elapsed_s(self, span: Span) -> float:
        last_ns = self._result.tally.last_ns
        if self._settings.max_steps is None:
            last_ns = max(last_ns, min(span.end_ns, time.monotonic_ns()))
        return max(last_ns - span.measure_ns, 0) / NS_PER_S


def run(settings: Settings, client: Client, view: View) -> RunResult:
    """Run a sweep; see Runner."""
    return Runner(settings, client, view).run()
