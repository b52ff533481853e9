"""One process of the load test: lanes on threads, and a thread that sends what they noted.

Commands come over a pipe, and parcels go back over it; a broken pipe means that the process that reports is gone, and
so this one ends.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe

from octavo_client._errors import OctavoError
from octavo_client.load.book import Book, Page
from octavo_client.load.chaos import Chaos, SlowReader
from octavo_client.load.checks import Sample, host_row
from octavo_client.load.connection import Connection
from octavo_client.load.content import Rows, draw_rows, session_key
from octavo_client.load.lane import Lane
from octavo_client.load.pace import ClosedPace, OpenPace, Pace, Span
from octavo_client.load.plan import Share, Workload
from octavo_client.load.source import Rig, SessionSource, timeouts

REPORT_INTERVAL_S = 0.25
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Prepare:
    """Command: open the sessions of a share."""

    share: Share


@dataclass(frozen=True, slots=True)
class Start:
    """Command: run the share."""

    span: Span


@dataclass(frozen=True, slots=True)
class Stop:
    """Command: end early."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What was noted since the parcel before.

    Attributes:
        at_ns: When it was packed.
        cpu_s: CPU time of the process so far.
        page: What was noted.
        is_ready: Whether the sessions are open.
        is_finished: Whether the share is done and its sessions are closed.
    """

    at_ns: int
    cpu_s: float
    page: Page = field(default_factory=Page)
    is_ready: bool = False
    is_finished: bool = False


Command = Prepare | Start | Stop


def serve(pipe: Pipe, workload: Workload) -> None:
    """Run shares of load points until the pipe ends; the main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reports tells when to stop
    rows = {
        name: draw_rows(workload.seed, m, workload.dtype) for name, m in workload.models.items()
    }
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            command = pipe.recv()
            if isinstance(command, Prepare):
                _Worker(pipe, workload, command.share, rows).run()


class _Worker:
    """One share in this process."""

    def __init__(
        self, pipe: Pipe, workload: Workload, share: Share, rows: Mapping[str, Rows]
    ) -> None:
        self._pipe = pipe
        self._book = Book(workload.expected)
        seed = session_key(workload.seed, share.process_idx, share.generation, -2)
        chaos = Chaos(workload.chaos, workload.chaos_rate, seed)
        self._stopping = threading.Event()
        self._rig = Rig(workload, share, rows, self._book, chaos, time.monotonic_ns, self._stopping)
        num_streams = -(-share.num_lanes // workload.steps_per_stream)
        self._connections = [
            Connection(workload.endpoint, timeouts(workload)) for _ in range(num_streams)
        ]
        self._lanes = [
            Lane(self._rig, idx, self._connections[idx // workload.steps_per_stream])
            for idx in range(share.num_lanes)
        ]
        self._is_done = threading.Event()
        self._send_lock = threading.Lock()

    def run(self) -> None:
        """Open sessions, wait for the start, run, close; report all along."""
        reporter = threading.Thread(target=self._report, name="load-reporter")
        reporter.start()
        try:
            self._run_all([lane.set_up for lane in self._lanes], poll=True)
            self._send(is_ready=True)
            span = self._wait_for_start()
            # What is there stays: a collection in the middle would be timed, and looks at all of it in vain.
            gc.freeze()
            if span is not None:
                self._run_lanes(span)
        finally:
            self._run_all([lane.close for lane in self._lanes], poll=False)
            for connection in self._connections:
                connection.close()
            self._is_done.set()
            reporter.join()
        self._send(is_finished=True)

    def _run_lanes(self, span: Span) -> None:
        pace = self._pace(span)
        jobs: list[Callable[[], None]] = [lambda lane=lane: lane.run(pace) for lane in self._lanes]  # type: ignore[misc]
        if self._rig.chaos.has("slow"):
            jobs.append(lambda: self._read_slowly(pace))
        self._run_all(jobs, poll=True)
        if isinstance(pace, OpenPace):
            with self._book.lock:
                self._book.page.tally.num_unsent += pace.num_unsent

    def _pace(self, span: Span) -> Pace:
        share = self._rig.share
        span = replace(span, max_steps=share.max_steps)
        if share.rate is None:
            return ClosedPace(span, time.monotonic_ns)
        seed = session_key(
            self._rig.workload.seed, share.point_idx, share.process_idx, share.generation
        )
        return OpenPace(span, share.rate, seed, time.monotonic_ns, self._stopping.wait)

    # ---- Threads and the pipe -------------------------------------------------------------------

    def _run_all(self, jobs: list[Callable[[], None]], *, poll: bool) -> None:
        """Run jobs at once, each in a thread, while commands are obeyed."""
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            while poll and any(thread.is_alive() for thread in threads):
                if self._pipe.poll(_POLL_S):
                    self._obey(self._pipe.recv())
        except (EOFError, OSError):
            self._stopping.set()
            raise
        finally:
            for thread in threads:
                thread.join()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:
            self._book.fault(f"the load test failed: {traceback.format_exc()}")

    def _obey(self, command: Command) -> None:
        if isinstance(command, Stop):
            self._stopping.set()

    def _wait_for_start(self) -> Span | None:
        command = Stop() if self._stopping.is_set() else self._pipe.recv()
        self._obey(command)
        return command.span if isinstance(command, Start) else None

    def _report(self) -> None:
        while not self._is_done.wait(REPORT_INTERVAL_S):
            try:
                self._send()
            except OSError:
                self._stopping.set()
                return

    def _send(self, *, is_ready: bool = False, is_finished: bool = False) -> None:
        page = self._book.turn()
        parcel = Parcel(time.monotonic_ns(), time.process_time(), page, is_ready, is_finished)
        with self._send_lock:
            self._pipe.send(parcel)

    # ---- Chaos ----------------------------------------------------------------------------------

    def _read_slowly(self, pace: Pace) -> None:
        """Keep a slow reader at work; its answers are checked too."""
        connection = Connection(self._rig.workload.endpoint, timeouts(self._rig.workload))
        reader = SlowReader(self._rig.workload.endpoint, self._stopping)
        source = SessionSource(self._rig, self._rig.share.num_lanes, connection)
        try:
            while not pace.is_over() and not self._stopping.is_set():
                self._read_slowly_once(reader, source)
        finally:
            reader.close()
            connection.close()

    def _read_slowly_once(self, reader: SlowReader, source: SessionSource) -> None:
        model = self._rig.workload.mix.names[0]
        try:
            member = source.open(model, is_first=False)
        except OctavoError as error:
            self._book.error(error)
            self._stopping.wait(0.2)
            return
        walk, rows = member.walks[0], self._rig.rows[model]
        try:
            for position, out in reader.run(
                member.session, member.position, lambda position: rows.step([walk], [position])
            ):
                sample = Sample(model, member.key, 0, position, host_row(out, 0))
                with self._book.lock:
                    self._book.page.samples.append(sample)
                    self._book.page.tally.num_sampled += 1
            self._book.chaos("slow")
        except OctavoError as error:
            self._book.error(error)
        finally:
            source.close(member)
