"""A client process: lanes on threads, and a thread that sends what they noted. It may be killed at any moment."""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from octavo_client import Client
from octavo_client.load.content import draw_rows
from tests.chaos.access import Access
from tests.chaos.form import DTYPE, MODEL, Form
from tests.chaos.lane import Lane, LaneSetting
from tests.chaos.notes import Notes

_REPORT_INTERVAL_S = 0.05
_BRAKE_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Orders:
    """What a client process is told.

    Attributes:
        form: Of the run.
        seed: Of the run.
        client_idx: Which client, from 0.
        generation: How many clients of this number were there before.
        access: Its way to the server.
    """

    form: Form
    seed: int
    client_idx: int
    generation: int
    access: Access


def work(pipe: Pipe, orders: Orders, brakes: Any) -> None:
    """Work until the pipe says stop, or ends; the main function of a process.

    Args:
        pipe: Pages go out, one message comes in: stop.
        orders: What to do.
        brakes: [num_clients] shared bytes; the client's own is not 0 while it has to wait.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run tells when to stop
    _Worker(pipe, orders, brakes).run()


class _Worker:
    def __init__(self, pipe: Pipe, orders: Orders, brakes: Any) -> None:
        self._pipe = pipe
        self._orders = orders
        self._brakes = brakes
        self._notes = Notes()
        self._stopping = threading.Event()
        self._is_done = threading.Event()

    def run(self) -> None:
        reporter = threading.Thread(target=self._report)
        listener = threading.Thread(target=self._listen, daemon=True)
        reporter.start()
        listener.start()
        try:
            with self._orders.access.client() as client:
                self._run_lanes(client)
        except Exception:
            self._notes.complain(f"a client failed: {traceback.format_exc()}")
        self._is_done.set()
        reporter.join()
        with contextlib.suppress(OSError):
            self._send(is_finished=True)

    def _run_lanes(self, client: Client) -> None:
        model = client.server_info().models[MODEL]
        rows = draw_rows(self._orders.seed, model, DTYPE)
        form, orders = self._orders.form, self._orders
        lanes = []
        for lane_idx in range(form.lanes_per_client):
            seed = (orders.seed, orders.client_idx, orders.generation, lane_idx)
            setting = LaneSetting(
                form, seed, orders.client_idx, client, rows, self._notes, self._may_send
            )
            num_sessions = len(range(lane_idx, form.sessions_per_client, form.lanes_per_client))
            lanes.append(Lane(setting, num_sessions))
        threads = [threading.Thread(target=self._guarded, args=(lane.run,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:
            self._notes.complain(f"a client failed: {traceback.format_exc()}")

    def _may_send(self) -> bool:
        while self._brakes[self._orders.client_idx] and not self._stopping.is_set():
            self._stopping.wait(_BRAKE_POLL_S)
        return not self._stopping.is_set()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._pipe.recv()
        self._stopping.set()

    def _report(self) -> None:
        while not self._is_done.wait(_REPORT_INTERVAL_S):
            try:
                self._send(is_finished=False)
            except OSError:
                self._stopping.set()
                return

    def _send(self, *, is_finished: bool) -> None:
        page = self._notes.turn()
        page.is_finished = is_finished
        self._pipe.send(page)
