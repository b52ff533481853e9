"""The engine: owns every session and pool, and runs queued steps through the backend, one launch at a time.

Any thread submits work and reads state. One that brings work to an idle engine may take that turn itself, which
saves it two switches of threads; all other turns are the engine thread's, and there is one at a time. All mutable state
is guarded by one lock, which is never held while the backend runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from octavo_server import errors
from octavo_server.backends.base import Backend
from octavo_server.config_keys import DEFAULT_MAX_QUEUED_STEPS
from octavo_server.errors import OctavoError, Reason
from octavo_server.launch import (
    NOTHING_RAN,
    admit_step,
    answer_step,
    build_batch,
    num_read_tokens,
    run_launch,
    settle,
)
from octavo_server.model_pool import ModelPool
from octavo_server.queued import (
    Queued,
    QueuedChange,
    QueuedStep,
    QueuedTask,
    change_item,
    expired,
    refuse,
    task_item,
    work_item,
)
from octavo_server.scheduler import Scheduler, Turn
from octavo_server.session import Session
from octavo_server.session_store import SessionStore
from octavo_server.session_transfer import Transfers
from octavo_server.sessions import Sessions
from octavo_server.stats import EngineStats, LaunchTimes, LaunchTotals, PoolStats
from octavo_server.step import (
    StepAnswer,
    StepOrigin,
    StepRequest,
    check_entries,
    check_tensors,
)
from octavo_server.tenant import Tenants
from octavo_server.work import WorkItem

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 4096
"""Rows after which a launch takes no further decode step."""

MAX_PROMPT_TOKENS = 1024
"""The same for prompts, whose launches decode steps have to wait for: a few milliseconds."""

Result = TypeVar("Result")


class Engine:
    """Runs steps over the pools of all models.

    Args:
        backend: Runs the operations.
        pools: Served models by name.
        store: Where sessions are kept.
        tenants: Whose sessions they may be.
        on_failure: Called once, from the engine's thread, when the backend fails.
        max_queued_steps: Steps that may wait for their launch; one more is refused.
    """

    def __init__(
        self,
        backend: Backend,
        pools: Mapping[str, ModelPool],
        store: SessionStore,
        tenants: Tenants,
        on_failure: Callable[[], None] = lambda: None,
        max_queued_steps: int = DEFAULT_MAX_QUEUED_STEPS,
    ) -> None:
        self.pools = pools
        self._backend = backend
        self._tenants = tenants
        self._on_failure = on_failure
        self._max_queued_steps = max_queued_steps
        self._totals = LaunchTotals()
        self._scheduler: Scheduler[Queued] = Scheduler(MAX_BATCH_TOKENS, MAX_PROMPT_TOKENS)
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._is_idle = threading.Condition(self._lock)
        self.sessions = Sessions(
            store, pools, self._has_work, self._check_accepting, self._enqueue_change
        )
        self.transfers = Transfers(backend, store, self.sessions, self._lock, self.run_task)
        self._last_launch_s = 0.0
        self._is_busy = self._is_draining = self._is_stopped = self._has_failed = False
        self._thread = threading.Thread(target=self._take_turns, name="octavo-engine", daemon=True)

    def start(self) -> None:
        """Start taking turns."""
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for what was accepted.

        Returns:
            Whether all of it finished in time.
        """
        with self._lock:
            self._is_draining = True
            return self._is_idle.wait_for(
                lambda: not self._is_busy and not len(self._scheduler), timeout_s
            )

    def stop(self) -> None:
        """Take no turn after the launch that runs; what is still queued is refused, unapplied."""
        with self._lock:
            self._is_draining = self._is_stopped = True
            self._has_work.notify()
            self._is_idle.wait_for(lambda: not self._is_busy)
        self._thread.join()
        self.drop_queued()

    @property
    def has_failed(self) -> bool:
        """Whether the backend has failed: nothing is run any more."""
        return self._has_failed

    def stats(self) -> EngineStats:
        """Return what was done since the start, and what is held now."""
        free_bytes = self._free_bytes()
        with self._lock:
            return EngineStats(
                launches=self._totals.stats(),
                queue=self._totals.queue,
                kernel=self._totals.kernel,
                num_appended_tokens=self._totals.num_appended_tokens,
                num_queued=len(self._scheduler),
                max_queued_steps=self._max_queued_steps,
                num_sessions=len(self.sessions),
                num_opened_sessions=self.sessions.num_opened,
                num_expired_sessions=self.sessions.num_expired,
                device_free_bytes=free_bytes,
                pools=tuple(
                    PoolStats(
                        name,
                        pool.blocks.num_blocks,
                        pool.blocks.num_free,
                        pool.spec.block_size,
                        pool.spec.block_bytes,
                    )
                    for name, pool in self.pools.items()
                ),
                tenants=self._tenants.stats(),
            )

    def _free_bytes(self) -> int:
        try:
            return self._backend.free_bytes()
        except Exception:
            # A device that has failed answers nothing; what is left to tell is told all the same.
            return 0

    def submit(
        self,
        request: StepRequest,
        answer: Callable[[StepAnswer], None],
        origin: StepOrigin,
        arrived_at: float | None = None,
        *,
        lead_s: float = 0.0,
    ) -> None:
        """Queue a step.

        Args:
            request: The step.
            answer: Called once with the answer, from this thread, the engine's or another that leads; must not block.
            origin: Where it comes from; its clients take turns when a launch cannot take all that is queued.
            arrived_at: When it was read, and its timeout began, on time.monotonic(); now by default.
            lead_s: Run the step here and now, before this returns, if the engine is idle and its last launch took less
                than so many seconds.

        Raises:
            OctavoError: The step cannot be queued: EMPTY_STEP, SHAPE_MISMATCH, DTYPE_MISMATCH, DUPLICATE_ENTRY,
                QUEUE_FULL, DRAINING or DEVICE_FAILURE.
        """
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        check_entries(request)
        with self._lock:
            self._check_accepting()
            sessions = self.sessions.find(request.handles, origin)
        pool = self._common_pool(sessions)
        if pool is None:
            answer(answer_step(request, admit_step(request, sessions), NOTHING_RAN, 0))
            return
        check_tensors(request, pool.spec)
        step = QueuedStep(request, sessions, pool, answer, arrived_at)
        if lead_s and self._begin_alone(lead_s):
            self._take(Turn([step], []))
        else:
            self._enqueue_step(work_item(step, origin))

    def run_task(self, run: Callable[[], Result], client: Hashable) -> Future[Result]:
        """Queue a short use of the backend, also while the engine drains; it is dropped if its future is cancelled.

        Args:
            run: Called with the turn, and without the lock; what it raises, but an OctavoError, is a device failure.
            client: Whose it is; clients take turns.

        Raises:
            OctavoError: DEVICE_FAILURE, or DRAINING once the engine has stopped.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._has_failed or self._is_stopped:
                self._check_accepting()
            self._enqueue(task_item(QueuedTask(run, future, client), MAX_PROMPT_TOKENS))
        return future

    def drop_queued(self) -> None:
        """Refuse what is still queued, unapplied."""
        with self._lock:
            dropped = self._scheduler.clear()
        for queued in dropped:
            refuse(queued, errors.draining())

    def _begin_alone(self, lead_s: float) -> bool:
        """Begin a turn for this thread, if the engine is idle, its backend takes any thread, and launches are short."""
        with self._lock:
            self._check_accepting()
            is_idle = not (self._is_busy or len(self._scheduler) or self._backend.binds_caller)
            begins = is_idle and self._last_launch_s < lead_s
            self._is_busy |= begins
            return begins

    def _enqueue_step(self, item: WorkItem[Queued]) -> None:
        with self._lock:
            self._check_accepting()
            if len(self._scheduler) >= self._max_queued_steps:
                what = "queued steps"
                raise errors.limit_reached(Reason.QUEUE_FULL, what, self._max_queued_steps)
            self._enqueue(item)

    def _enqueue_change(self, change: QueuedChange) -> None:
        """Queue a change of a session; under the lock."""
        self._enqueue(change_item(change))

    def _enqueue(self, item: WorkItem[Queued]) -> None:
        self._scheduler.submit(item)
        if not self._is_busy:  # Who has the turn looks at the queue again.
            self._has_work.notify()

    def _check_accepting(self) -> None:
        if self._has_failed:
            raise errors.device_failure()
        if self._is_draining:
            raise errors.draining()

    def _common_pool(self, sessions: Sequence[Session | OctavoError]) -> ModelPool | None:
        names = {session.spec.name for session in sessions if isinstance(session, Session)}
        if len(names) > 1:
            actual = f"of {', '.join(sorted(names))}"
            raise errors.mismatch(Reason.SHAPE_MISMATCH, "session_handles", "of one model", actual)
        return self.pools[names.pop()] if names else None

    def _take_turns(self) -> None:
        while True:
            with self._lock:
                self._end_sessions()
                while not self._has_turn():
                    self._wait_for_work()
                    self._end_sessions()
                if self._is_stopped:
                    return
                self._is_busy = True
                turn = self._scheduler.next_turn(time.monotonic())
            self._take(turn)

    def _has_turn(self) -> bool:
        return self._is_stopped or bool(len(self._scheduler) and not self._is_busy)

    def _wait_for_work(self) -> None:
        """Wait until there may be work, or a session is to end."""
        next_due = None if self._is_draining else self.sessions.next_due
        self._has_work.wait(None if next_due is None else max(next_due - time.monotonic(), 0.0))

    def _end_sessions(self) -> None:
        if not self._is_draining:
            self.sessions.end_due()

    def _take(self, turn: Turn[Queued]) -> None:
        """Run a turn that this thread began, and pass the lead on."""
        try:
            for queued in turn.expired:
                refuse(queued, expired(queued))
            self._run(turn.batch)
        finally:
            with self._lock:
                self._is_busy = False
                self._is_idle.notify_all()
                if len(self._scheduler):
                    self._has_work.notify()

    def _run(self, batch: Sequence[Queued]) -> None:
        try:
            if self._has_failed:
                raise errors.device_failure()
            steps = [queued for queued in batch if isinstance(queued, QueuedStep)]
            if steps:
                self._run_steps(steps)
            for queued in batch:
                if isinstance(queued, QueuedChange):
                    self._run_change(queued)
                elif isinstance(queued, QueuedTask):
                    _run_task(queued)
        except Exception as error:
            self._fail(error)
            for queued in batch:
                refuse(queued, errors.device_failure())

    def _run_change(self, queued: QueuedChange) -> None:
        if not queued.future.set_running_or_notify_cancel():
            return
        try:
            with self._lock:
                if queued.session.is_closed:
                    raise queued.session.gone()
                result = queued.change(queued.session)
        except OctavoError as error:
            queued.future.set_exception(error)
        else:
            queued.future.set_result(result)

    def _run_steps(self, steps: Sequence[QueuedStep]) -> None:
        """Admit, launch, settle, answer."""
        times = LaunchTimes(time.monotonic())
        pool = steps[0].pool
        with self._lock:
            admitted = [admit_step(step.request, step.sessions) for step in steps]
            entries = [entry for step_entries in admitted for entry in step_entries]
            batch = build_batch(entries, pool.spec.block_size)
        requests = [step.request for step in steps]
        outcome = run_launch(self._backend, pool.cache, requests, entries, batch, times)
        times.num_steps, times.num_entries = len(steps), len(entries)
        times.num_tokens = int(batch.token_starts[-1])
        times.arrivals = [step.arrived_at for step in steps]
        read_tokens = num_read_tokens(pool.spec, batch) if requests[0].q is not None else 0
        with self._lock:
            num_stored = settle(entries, outcome, times.ran_at)
            times.cache_bytes = (read_tokens + num_stored) * pool.spec.layer_token_bytes
            totals = self._totals.add(times, num_stored)
        first_row = 0
        answers = []
        for step, step_entries in zip(steps, admitted, strict=True):
            answer = answer_step(step.request, step_entries, outcome, first_row)
            if step.request.return_stage_times:
                answer.stage_times = times.of_step(step.arrived_at, time.monotonic())
            answers.append(answer)
            first_row += step.request.total_tokens
        # All are cut out before the first is given: what fails until here refuses them all, and none is answered twice.
        for step, answer in zip(steps, answers, strict=True):
            step.answer(answer)
        # Only the thread that runs a launch writes here, and one runs at a time.
        self._last_launch_s = times.ran_at - times.began_at
        totals.copy_out_s += time.monotonic() - times.ran_at

    def _fail(self, error: Exception) -> None:
        with self._lock:
            is_first = not self._has_failed
            self._has_failed = True
        if is_first:
            log.critical(
                "backend %s failed; restart the server", self._backend.name, exc_info=error
            )
            self._on_failure()


def _run_task(task: QueuedTask) -> None:
    if not task.future.set_running_or_notify_cancel():
        return
    try:
        result = task.run()
    except OctavoError as error:
        task.future.set_exception(error)
    else:
        task.future.set_result(result)
