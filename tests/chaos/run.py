"""The run: starts everything, has threads inject faults, listens to clients, and counts."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from octavo_client import OctavoError
from octavo_client.load.checks import CheckPool
from octavo_client.load.fate import reason_of
from tests.chaos.faults import LANES, SERVER_FAULTS, Fault
from tests.chaos.faults.servers import KILLED, NO_SNAPSHOT
from tests.chaos.notes import Page
from tests.chaos.results import Results
from tests.chaos.rig import Rig
from tests.chaos.server import ServerFailure

_TICK_S = 0.02
_START = "start"
"""What clients recover from first; no fault."""

_START_TIMEOUT_S = 180.0
_SAY_EVERY_S = 5.0
_RECOVERY_TIMEOUT_S = 90.0
_CALM_BACKLOG = 1_500
"""Answers that wait to be checked, over which clients pause while nothing is to be recovered from."""

_FULL_BACKLOG = 6_000
"""Over which no further fault is injected."""

_GATHER_S = 0.2
"""Clients that paused work again for so long before a fault hits."""

_MOST_COMPLAINTS = 30
"""Shown one by one while the run goes on."""

_SETTLE_MARGIN_S = 20.0
_LAST_ANSWERS_TIMEOUT_S = 300.0

Say = Callable[[str], None]


class Run:
    """One run of chaos.

    Args:
        rig: Everything, started.
        checks: Checks the answers.
        say: Shows a line.
    """

    def __init__(self, rig: Rig, checks: CheckPool, say: Say) -> None:
        self._rig = rig
        self._checks = checks
        self._say = say
        self._results = Results()
        self._lock = threading.Lock()
        self._num_gathering = 0
        self._num_waiting = 0
        self._num_faults = self._num_complaints = 0
        self._said_s = self._began_s = time.monotonic()

    def run(self, kinds: Mapping[str, int]) -> Results:
        """Inject faults of these kinds and numbers, and return what came of them."""
        self._num_faults = sum(kinds.values())
        rng = random.Random(self._rig.seed)
        threads = [
            threading.Thread(target=self._inject_all, args=(faults, order_of(kinds, faults, rng)))
            for faults in LANES
        ]
        self._wait_for_clients()
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                self._tick()
            self._work_on()
        finally:
            self._rig.stopping.set()
            for thread in threads:
                thread.join()
        self._stop_clients()
        self._wait_for_leases()
        self._finish_checks()
        self._results.seconds = time.monotonic() - self._began_s
        recoveries = self._rig.recoveries.seconds()
        self._results.recoveries = {kind: recoveries.get(kind, []) for kind in self._results.faults}
        return self._results

    def _wait_for_clients(self) -> None:
        """Wait until every client has an answer: faults are for those that work."""
        blow = self._rig.strike(_START, self._rig.all_clients, time.monotonic_ns())
        deadline = time.monotonic() + _START_TIMEOUT_S
        while blow.waiting and not self._rig.stopping.is_set():
            self._tick()
            if time.monotonic() > deadline:
                self._rig.notes.complain(f"clients {sorted(blow.waiting)} never had an answer")
                self._rig.stopping.set()

    # ---- Faults ---------------------------------------------------------------------------------

    def _inject_all(self, faults: Mapping[str, Fault], kinds: Sequence[str]) -> None:
        rng = random.Random(f"{self._rig.seed} {sorted(faults)}")
        try:
            for idx, kind in enumerate(kinds):
                if faults is SERVER_FAULTS:
                    self._rig.will_keep_snapshots = NO_SNAPSHOT not in kinds[idx + 1 : idx + 2]
                self._rest(rng)
                if self._rig.stopping.is_set():
                    return
                self._inject(kind, faults[kind], rng)
        except ServerFailure as failure:
            self._rig.notes.complain(str(failure))
            self._rig.stopping.set()
        except Exception:
            self._rig.notes.complain(f"the run failed: {traceback.format_exc()}")
            self._rig.stopping.set()

    def _inject(self, kind: str, fault: Fault, rng: random.Random) -> None:
        self._gather()
        try:
            blow = fault(kind, self._rig, rng)
        except OctavoError as error:
            self._rig.notes.complain(f"{kind}: {reason_of(error)}: {error}")
            return
        with self._lock:
            self._results.faults[kind] += 1
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while blow is not None and blow.waiting and not self._rig.stopping.is_set():
            if time.monotonic() > deadline:
                clients = self._rig.recoveries.give_up(blow)
                self._rig.notes.complain(f"clients {clients} did not recover from: {kind}")
            time.sleep(_TICK_S)

    def _gather(self) -> None:
        """Have clients that paused work again, so that the fault hits them at it."""
        with self._lock:
            self._num_gathering += 1
        self._rig.stopping.wait(_GATHER_S)
        with self._lock:
            self._num_gathering -= 1

    def _rest(self, rng: random.Random) -> None:
        """Pause between faults, and while too many answers wait to be checked."""
        self._rig.stopping.wait(rng.uniform(0, self._rig.form.gap_s))
        while self._num_waiting > _FULL_BACKLOG and not self._rig.stopping.is_set():
            time.sleep(_TICK_S)

    # ---- The main thread ------------------------------------------------------------------------

    def _tick(self) -> None:
        time.sleep(_TICK_S)
        for client_idx, page in self._rig.fleet.pages():
            self._take(client_idx, page)
        self._take(None, self._rig.notes.turn())
        self._checks.collect()
        self._num_waiting = self._checks.num_waiting
        is_late = self._num_waiting > _CALM_BACKLOG and not self._num_gathering
        for client_idx in self._rig.all_clients:
            is_on = is_late and not self._rig.recoveries.is_waited_for(client_idx)
            self._rig.fleet.brake(client_idx, is_on=is_on)
        for client_idx in self._rig.fleet.died():
            self._rig.notes.complain(f"client {client_idx} ended by itself")
            self._rig.stopping.set()
        if (code := self._rig.server.died()) is not None:
            self._rig.notes.complain(f"the server ended by itself with exit code {code}")
            self._rig.stopping.set()
        self._say_now_and_then(self._line())

    def _take(self, client_idx: int | None, page: Page) -> None:
        if client_idx is not None:
            self._rig.recoveries.answered(client_idx, page.answers)
        faults = [(loss, self._rig.history.fault_of(loss)) for loss in page.losses]
        with self._lock:
            self._results.take(page, faults)
        for text in (*page.complaints, *(fault for _, fault in faults if fault)):
            self._num_complaints += 1
            if self._num_complaints <= _MOST_COMPLAINTS:
                self._say(f"WRONG: {text}")
        if page.samples:
            self._checks.add(page.samples)

    def _work_on(self) -> None:
        """Go on until enough answers are there."""
        wanted = self._rig.form.min_answers
        deadline = time.monotonic() + _LAST_ANSWERS_TIMEOUT_S
        while not self._rig.stopping.is_set() and time.monotonic() < deadline:
            if self._checks.counts.num_checked + self._checks.num_waiting >= wanted:
                return
            self._tick()

    def _stop_clients(self) -> None:
        self._say("closing sessions")
        self._rig.fleet.stop()
        deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
        while not self._rig.fleet.is_finished:
            if time.monotonic() > deadline or self._rig.server.died() is not None:
                self._rig.notes.complain("clients could not close their sessions")
                break
            time.sleep(_TICK_S)
            for client_idx, page in self._rig.fleet.pages():
                self._take(client_idx, page)
        self._take(None, self._rig.notes.turn())

    def _wait_for_leases(self) -> None:
        """Wait until sessions of killed clients are gone by their leases; count what is not free then."""
        if self._rig.server.died() is not None:
            return
        deadline = time.monotonic() + self._rig.form.lease_s + _SETTLE_MARGIN_S
        with self._rig.access.client() as client:
            while (info := client.server_info()).num_sessions and time.monotonic() < deadline:
                time.sleep(_TICK_S * 10)
                self._checks.collect()
                self._say_now_and_then(f"{info.num_sessions} sessions wait for their leases to end")
        (model,) = info.models.values()
        self._results.num_left_sessions = info.num_sessions
        self._results.num_leaked_blocks = model.num_blocks - model.num_free_blocks

    def _finish_checks(self) -> None:
        while not self._checks.finish_some(_SAY_EVERY_S):
            self._say_now_and_then(f"checking answers, {self._checks.num_waiting:,} to go")
        self._results.checks = self._checks.counts

    def _say_now_and_then(self, text: str) -> None:
        if time.monotonic() - self._said_s >= _SAY_EVERY_S:
            self._said_s = time.monotonic()
            self._say(text)

    def _line(self) -> str:
        counts, results = self._checks.counts, self._results
        return (
            f"faults {results.faults.total()} of {self._num_faults}, "
            f"calls {results.num_calls:,}, answers checked {counts.num_checked:,} "
            f"({self._checks.num_waiting:,} wait), wrong {counts.num_wrong}, "
            f"sessions opened {results.num_opened:,}, losses said {results.num_losses}, "
            f"complaints {results.complaints.total()}"
        )


def order_of(
    kinds: Mapping[str, int], faults: Mapping[str, Fault], rng: random.Random
) -> list[str]:
    """Return faults in the order in which they are injected.

    A server without a snapshot folder comes after one that was killed: there, nothing is lost by it.
    """
    each = [kind for kind, count in kinds.items() if kind in faults for _ in range(count)]
    rng.shuffle(each)
    later = [kind for kind in each if kind == NO_SNAPSHOT]
    order: list[str] = []
    for kind in each:
        if kind != NO_SNAPSHOT:
            order.append(kind)
        if kind == KILLED and later:
            order.append(later.pop())
    return order + later
