"""The processes that make the load, seen from the one that reports."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from octavo_client.load.pace import Span
from octavo_client.load.plan import Share, Workload
from octavo_client.load.worker import Command, Parcel, Prepare, Start, Stop, serve

_END_TIMEOUT_S = 20.0


@dataclass(slots=True, eq=False)
class Member:
    """One process.

    Attributes:
        process: It.
        pipe: To it.
        share: What it does of the load point; None = nothing.
        is_ready: Whether its sessions are open.
        is_finished: Whether its share is done.
        is_lost: Whether it ended by itself.
        open_ids: Sessions that it reported and did not report closed.
        cpu: (when, CPU seconds so far) of its parcels during the point.
    """

    process: BaseProcess
    pipe: Pipe
    share: Share | None = None
    is_ready: bool = False
    is_finished: bool = True
    is_lost: bool = False
    open_ids: set[str] = field(default_factory=set)
    cpu: list[tuple[int, float]] = field(default_factory=list)

    def take(self, parcel: Parcel) -> None:
        """Note a parcel."""
        self.is_ready |= parcel.is_ready
        self.is_finished |= parcel.is_finished
        self.open_ids.update(parcel.page.opened)
        self.open_ids.difference_update(parcel.page.closed)
        self.cpu.append((parcel.at_ns, parcel.cpu_s))


class Fleet:
    """All processes of a run; one caller at a time.

    Args:
        workload: What they do.
        num_processes: How many.
        rng: Chooses whom chaos kills.
    """

    def __init__(self, workload: Workload, num_processes: int, rng: random.Random) -> None:
        self._workload = workload
        self._rng = rng
        # Matrices are small here, and BLAS threads that spin would take cores from what is measured.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._context = get_context("spawn")
        self._members = [self._spawn() for _ in range(num_processes)]
        self._past_cpu: list[list[tuple[int, float]]] = []
        self._span: Span | None = None

    @property
    def active(self) -> list[Member]:
        """Processes with a share of the load point."""
        return [member for member in self._members if member.share is not None]

    @property
    def is_ready(self) -> bool:
        """Whether every process has its sessions open, or has ended."""
        return all(m.is_ready or m.is_lost for m in self.active)

    @property
    def is_finished(self) -> bool:
        """Whether every process has done its share, or has ended."""
        return all(m.is_finished or m.is_lost for m in self.active)

    @property
    def cpu(self) -> list[list[tuple[int, float]]]:
        """CPU time of each process of the load point, those that were killed too."""
        return [*self._past_cpu, *(member.cpu for member in self.active)]

    def prepare(self, shares: Sequence[Share]) -> None:
        """Begin a load point: open sessions."""
        self._span = None
        self._past_cpu = []
        for member in self._members:
            member.share = None
        for member, share in zip(self._members, shares, strict=False):
            self._give(member, share)

    def start(self, span: Span) -> None:
        """Run what was prepared."""
        self._span = span
        for member in self.active:
            _tell(member, Start(span))

    def stop(self) -> None:
        """End the load point early."""
        for member in self.active:
            _tell(member, Stop())

    def receive(self, timeout_s: float) -> list[Parcel]:
        """Return what has arrived after at most `timeout_s`."""
        by_pipe: dict[Any, Member] = {m.pipe: m for m in self._members if not m.is_lost}
        parcels = []
        for pipe in wait(list(by_pipe), timeout_s):
            member = by_pipe[pipe]
            try:
                parcel = member.pipe.recv()
            except Exception:  # the end of the pipe, or half a message of a process that was killed
                member.is_lost = True
                continue
            was_ready = member.is_ready
            member.take(parcel)
            if member.is_ready and not was_ready and self._span is not None:
                _tell(member, Start(self._span))
            parcels.append(parcel)
        return parcels

    def lost(self) -> list[str]:
        """Describe the processes that ended by themselves, once each; they do no more."""
        texts = []
        for member in self.active:
            if member.is_lost:
                member.process.join(_END_TIMEOUT_S)
                texts.append(
                    f"a process of the load test ended with exit code {member.process.exitcode}"
                )
                member.share = None
        return texts

    def kill_one(self) -> tuple[set[str], list[Parcel]]:
        """Kill a process at work and put another in its place.

        Returns:
            The sessions that it left behind as far as known, and its last parcels.
        """
        candidates = [
            idx
            for idx, m in enumerate(self._members)
            if m.share is not None and m.is_ready and not m.is_finished and not m.is_lost
        ]
        if not candidates:
            return set(), []
        idx = self._rng.choice(candidates)
        member = self._members[idx]
        member.process.kill()
        member.process.join()
        parcels = _rest(member)
        self._replace(idx)
        return member.open_ids, parcels

    def close(self) -> None:
        """End all processes."""
        for member in self._members:
            member.pipe.close()
        for member in self._members:
            member.process.join(_END_TIMEOUT_S)
            if member.process.exitcode is None:
                member.process.kill()
                member.process.join()

    def _spawn(self) -> Member:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self._workload), daemon=True)
        process.start()
        theirs.close()
        return Member(process, mine)

    def _replace(self, idx: int) -> None:
        old = self._members[idx]
        old.pipe.close()
        self._members[idx] = self._spawn()
        if old.share is not None:
            self._past_cpu.append(old.cpu)
            share = replace(old.share, generation=old.share.generation + 1)
            self._give(self._members[idx], share)

    def _give(self, member: Member, share: Share) -> None:
        member.share = share
        member.is_ready = member.is_finished = False
        member.cpu = []
        _tell(member, Prepare(share))


def _tell(member: Member, command: Command) -> None:
    with suppress(OSError):  # it has ended; `receive` will find out
        member.pipe.send(command)


def _rest(member: Member) -> list[Parcel]:
    """Return what a killed process had sent."""
    parcels: list[Parcel] = []
    with suppress(Exception):  # the end of the pipe, or half a message
        while member.pipe.poll():
            parcel = member.pipe.recv()
            member.take(parcel)
            parcels.append(parcel)
    return parcels


def cpu_shares(
    cpu: Sequence[Sequence[tuple[int, float]]], begin_ns: int, end_ns: int
) -> list[float]:
    """Return the cores that each process used between two times: 1 is what Python code can use at most."""
    shares = []
    for samples in cpu:
        within = [(at, cpu_s) for at, cpu_s in samples if begin_ns <= at <= end_ns]
        if len(within) >= 2 and within[-1][0] > within[0][0]:
            (first_ns, first_s), (last_ns, last_s) = within[0], within[-1]
            shares.append((last_s - first_s) * 1e9 / (last_ns - first_ns))
    return shares
