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
from octavo_server.config import DEFAULT_MAX_QUEUED_STEPS
from octavo_server.errors import OctavoError, Reason
from octavo_server.launch import (
    NOTHING_RAN,
    admit_step,
    answer_step,
    build_batch,
    run_launch,
    settle,
)
from octavo_server.model_pool import ModelPool
from octavo_server.queued import Queued, QueuedChange, QueuedStep, expired, refuse, work_item
from octavo_server.scheduler import Scheduler, Turn
from octavo_server.session import Session, SessionState
from octavo_server.session_store import SessionStore
from octavo_server.stats import EngineStats, LaunchTimes, LaunchTotals, PoolStats
from octavo_server.step import StepAnswer, StepRequest, check_entries, check_tensors
from octavo_server.work import WHOLE_SESSION, WorkItem, WorkKey

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
        sessions: Where sessions are kept.
        on_failure: Called once, from the engine's thread, when the backend fails.
        max_queued_steps: Steps that may wait for their launch; one more is refused.
    """

    def __init__(
        self,
        backend: Backend,
        pools: Mapping[str, ModelPool],
        sessions: SessionStore,
        on_failure: Callable[[], None] = lambda: None,
        max_queued_steps: int = DEFAULT_MAX_QUEUED_STEPS,
    ) -> None:
        self.pools = pools
        self._backend = backend
        self._sessions = sessions
        self._on_failure = on_failure
        self._max_queued_steps = max_queued_steps
        self._totals = LaunchTotals()
        self._scheduler: Scheduler[Queued] = Scheduler(MAX_BATCH_TOKENS, MAX_PROMPT_TOKENS)
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._is_idle = threading.Condition(self._lock)
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
        for queued in self._scheduler.clear():
            refuse(queued, errors.draining())

    @property
    def has_failed(self) -> bool:
        """Whether the backend has failed: nothing is run any more."""
        return self._has_failed

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def stats(self) -> EngineStats:
        """Return what was done since the start, and what is held now."""
        with self._lock:
            return EngineStats(
                launches=self._totals.stats(),
                num_appended_tokens=self._totals.num_appended_tokens,
                num_queued=len(self._scheduler),
                max_queued_steps=self._max_queued_steps,
                num_sessions=len(self._sessions),
                pools=tuple(
                    PoolStats(name, pool.blocks.num_blocks, pool.blocks.num_free)
                    for name, pool in self.pools.items()
                ),
            )

    def open_session(self, model: str, request_id: str) -> SessionState:
        """Open a session, or return the one that `request_id` opened before.

        Raises:
            OctavoError: MODEL_NOT_FOUND, SESSION_LIMIT, DUPLICATE_ENTRY, DRAINING or DEVICE_FAILURE.
        """
        with self._lock:
            self._check_accepting()
            pool = self.pools.get(model)
            if pool is None:
                raise errors.model_not_found(model)
            state = self._sessions.open(pool.spec, pool.blocks, request_id).state()
        log.debug("session %s of model %s is open", state.session_id, model)
        return state

    def get_session(self, session_id: str) -> SessionState:
        """Return a session's state.

        Raises:
            OctavoError: SESSION_NOT_FOUND.
        """
        with self._lock:
            return self._sessions.by_id(session_id).state()

    def get_session_by_handle(self, handle: int) -> SessionState:
        """Return a session's state.

        Raises:
            OctavoError: SESSION_NOT_FOUND.
        """
        with self._lock:
            session = self._sessions.by_handle(handle)
            if session is None:
                raise errors.session_not_found(str(handle))
            return session.state()

    def list_sessions(self, after_idx: int, size: int) -> tuple[list[SessionState], int]:
        """Return a page of sessions and where the next page starts, 0 after the last."""
        with self._lock:
            sessions, next_idx = self._sessions.page(after_idx, size)
            return [session.state() for session in sessions], next_idx

    def truncate_session(
        self, session_id: str, length: int, expected_lengths: Sequence[int]
    ) -> Future[SessionState]:
        """Truncate a session once the work accepted before is done, unless the future is cancelled by then.

        Returns:
            The state after it, or OctavoError: SESSION_NOT_FOUND, POSITION_MISMATCH or SHAPE_MISMATCH.

        Raises:
            OctavoError: SESSION_NOT_FOUND, DRAINING or DEVICE_FAILURE.
        """

        def truncate(session: Session) -> SessionState:
            session.truncate(length, expected_lengths)
            return session.state()

        return self._submit_change(session_id, truncate)

    def close_session(self, session_id: str) -> Future[int]:
        """Close a session once the work accepted before is done, unless the future is cancelled by then.

        Returns:
            The blocks freed by it, or OctavoError: SESSION_NOT_FOUND.

        Raises:
            OctavoError: SESSION_NOT_FOUND, DRAINING or DEVICE_FAILURE.
        """

        def close(session: Session) -> int:
            self._sessions.forget(session)
            log.debug("session %s closes at lengths %s", session_id, session.lengths)
            return session.close()

        return self._submit_change(session_id, close)

    def submit(
        self,
        request: StepRequest,
        answer: Callable[[StepAnswer], None],
        is_cancelled: Callable[[], bool] = lambda: False,
        arrived_at: float | None = None,
        *,
        client: Hashable = None,
        lead_s: float = 0.0,
    ) -> None:
        """Queue a step.

        Args:
            request: The step.
            answer: Called once with the answer, from this thread, the engine's or another that leads; must not block.
            is_cancelled: Asked when the step's turn comes; a cancelled step is dropped, unapplied and unanswered.
            arrived_at: When it was read, and its timeout began, on time.monotonic(); now by default.
            client: Whose it is; clients take turns when a launch cannot take all that is queued.
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
            sessions = [self._sessions.by_handle(handle) for handle in request.handles]
        pool = self._common_pool(sessions)
        if pool is None:
            answer(answer_step(request, admit_step(request, sessions), NOTHING_RAN, 0))
            return
        check_tensors(request, pool.spec)
        step = QueuedStep(request, sessions, pool, answer, arrived_at)
        if lead_s and self._begin_alone(lead_s):
            self._take(Turn([step], []))
        else:
            self._enqueue(work_item(step, is_cancelled, client))

    def _submit_change(
        self, session_id: str, change: Callable[[Session], Result]
    ) -> Future[Result]:
        with self._lock:
            self._check_accepting()
            session = self._sessions.by_id(session_id)
        future: Future[Result] = Future()
        key = WorkKey(session.handle, WHOLE_SESSION)
        queued = QueuedChange(session, change, future)
        self._enqueue(WorkItem(queued, frozenset([key]), is_cancelled=future.cancelled))
        return future

    def _begin_alone(self, lead_s: float) -> bool:
        """Begin a turn for this thread, if the engine is idle, its backend takes any thread, and launches are short."""
        with self._lock:
            self._check_accepting()
            is_idle = not (self._is_busy or len(self._scheduler) or self._backend.binds_caller)
            begins = is_idle and self._last_launch_s < lead_s
            self._is_busy |= begins
            return begins

    def _enqueue(self, item: WorkItem[Queued]) -> None:
        with self._lock:
            self._check_accepting()
            is_step = isinstance(item.payload, QueuedStep)
            if is_step and len(self._scheduler) >= self._max_queued_steps:
                what = "queued steps"
                raise errors.limit_reached(Reason.QUEUE_FULL, what, self._max_queued_steps)
            self._scheduler.submit(item)
            if not self._is_busy:  # Who has the turn looks at the queue again.
                self._has_work.notify()

    def _check_accepting(self) -> None:
        if self._has_failed:
            raise errors.device_failure()
        if self._is_draining:
            raise errors.draining()

    def _common_pool(self, sessions: Sequence[Session | None]) -> ModelPool | None:
        names = {session.spec.name for session in sessions if session is not None}
        if len(names) > 1:
            actual = f"of {', '.join(sorted(names))}"
            raise errors.mismatch(Reason.SHAPE_MISMATCH, "session_handles", "of one model", actual)
        return self.pools[names.pop()] if names else None

    def _take_turns(self) -> None:
        while True:
            with self._lock:
                self._has_work.wait_for(
                    lambda: self._is_stopped or (len(self._scheduler) and not self._is_busy)
                )
                if self._is_stopped:
                    return
                self._is_busy = True
                turn = self._scheduler.next_turn(time.monotonic())
            self._take(turn)

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
                    raise errors.session_not_found(queued.session.session_id)
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
        times.queued_s = len(steps) * times.began_at - sum(step.arrived_at for step in steps)
        with self._lock:
            totals = self._totals.add(times, settle(entries, outcome))
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
