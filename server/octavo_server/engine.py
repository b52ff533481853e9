"""The engine: owns every session and pool, and runs queued steps through the backend, one launch at a time.

Handler threads submit work and read state. A thread that brings work to an idle engine may take that turn itself, which
saves it two switches of threads; all other turns are the engine thread's, and there is one at a time. All mutable state
is guarded by one lock, which is never held while the backend runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from octavo_server import errors
from octavo_server.backends.base import Backend, PagedInt8Cache
from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.launch import (
    NOTHING_RAN,
    admit_step,
    answer_step,
    build_batch,
    run_launch,
    settle,
)
from octavo_server.model import ModelSpec
from octavo_server.scheduler import WHOLE_SESSION, Scheduler, Turn, WorkItem, WorkKey
from octavo_server.session import Session
from octavo_server.session_store import SessionStore
from octavo_server.step import StepAnswer, StepRequest, check_entries, check_tensors

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 4096
"""Rows after which a launch takes no further step; bounds how long a decode step waits for prompts of others."""

Result = TypeVar("Result")


class SessionState(NamedTuple):
    """A session at one moment."""

    session_id: str
    handle: int
    model: str
    lengths: tuple[int, ...]
    num_blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class ModelPool:
    """One served model: its cache on the device and the ids of its blocks."""

    cache: PagedInt8Cache
    blocks: BlockPool

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.cache.spec


class _QueuedStep(NamedTuple):
    """A step in the queue, with the sessions that its handles named when it arrived."""

    request: StepRequest
    sessions: Sequence[Session | None]
    pool: ModelPool
    answer: Callable[[StepAnswer], None]


class _QueuedChange(NamedTuple):
    """A truncate or close in the queue."""

    session: Session
    change: Callable[[Session], Any]
    future: Future[Any]


_Queued = _QueuedStep | _QueuedChange


class Engine:
    """Runs steps over the pools of all models.

    Args:
        backend: Runs the operations.
        pools: Served models by name.
        sessions: Where sessions are kept.
        on_failure: Called once, from the engine's thread, when the backend fails.
    """

    def __init__(
        self,
        backend: Backend,
        pools: Mapping[str, ModelPool],
        sessions: SessionStore,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.pools = pools
        self._backend = backend
        self._sessions = sessions
        self._on_failure = on_failure
        self._scheduler: Scheduler[_Queued] = Scheduler(MAX_BATCH_TOKENS)
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._is_idle = threading.Condition(self._lock)
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
            _refuse(queued, errors.draining())

    @property
    def has_failed(self) -> bool:
        """Whether the backend has failed: nothing is run any more."""
        return self._has_failed

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

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
            state = _state(self._sessions.open(pool.spec, pool.blocks, request_id))
        log.debug("session %s of model %s is open", state.session_id, model)
        return state

    def get_session(self, session_id: str) -> SessionState:
        """Return a session's state.

        Raises:
            OctavoError: SESSION_NOT_FOUND.
        """
        with self._lock:
            return _state(self._sessions.by_id(session_id))

    def get_session_by_handle(self, handle: int) -> SessionState:
        """Return a session's state.

        Raises:
            OctavoError: SESSION_NOT_FOUND.
        """
        with self._lock:
            session = self._sessions.by_handle(handle)
            if session is None:
                raise errors.session_not_found(str(handle))
            return _state(session)

    def list_sessions(self, after_idx: int, size: int) -> tuple[list[SessionState], int]:
        """Return a page of sessions and where the next page starts, 0 after the last."""
        with self._lock:
            sessions, next_idx = self._sessions.page(after_idx, size)
            return [_state(session) for session in sessions], next_idx

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
            return _state(session)

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
        may_lead: bool = False,
    ) -> None:
        """Queue a step.

        Args:
            request: The step.
            answer: Called once with the answer, from this thread, the engine's or another that leads; must not block.
            is_cancelled: Asked when the step's turn comes; a cancelled step is dropped, unapplied and unanswered.
            arrived_at: When its timeout began, on time.monotonic(); now by default.
            may_lead: Whether an idle engine may run the step here and now, before this returns.

        Raises:
            OctavoError: The step cannot be queued: EMPTY_STEP, SHAPE_MISMATCH, DTYPE_MISMATCH, DUPLICATE_ENTRY,
                DRAINING or DEVICE_FAILURE.
        """
        check_entries(request)
        with self._lock:
            self._check_accepting()
            sessions = [self._sessions.by_handle(handle) for handle in request.handles]
        pool = self._common_pool(sessions)
        if pool is None:
            answer(answer_step(request, admit_step(request, sessions), NOTHING_RAN, 0))
            return
        check_tensors(request, pool.spec)
        step = _QueuedStep(request, sessions, pool, answer)
        started_at = time.monotonic() if arrived_at is None else arrived_at
        self._enqueue(_work_item(step, is_cancelled, started_at), may_lead=may_lead)

    def _submit_change(
        self, session_id: str, change: Callable[[Session], Result]
    ) -> Future[Result]:
        with self._lock:
            self._check_accepting()
            session = self._sessions.by_id(session_id)
        future: Future[Result] = Future()
        key = WorkKey(session.handle, WHOLE_SESSION)
        queued = _QueuedChange(session, change, future)
        self._enqueue(WorkItem(queued, frozenset([key]), is_cancelled=future.cancelled))
        return future

    def _enqueue(self, item: WorkItem[_Queued], *, may_lead: bool = False) -> None:
        with self._lock:
            self._check_accepting()
            self._scheduler.submit(item)
            if self._is_busy:
                return  # Who leads looks at the queue again.
            if not may_lead or self._backend.binds_caller:
                self._has_work.notify()
                return
            turn = self._begin_turn()
        self._take(turn)

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
                turn = self._begin_turn()
            self._take(turn)

    def _begin_turn(self) -> Turn[_Queued]:
        self._is_busy = True
        return self._scheduler.next_turn(time.monotonic())

    def _take(self, turn: Turn[_Queued]) -> None:
        """Run a turn that this thread began, and pass the lead on."""
        try:
            for queued in turn.expired:
                _refuse(queued, _expired(queued))
            self._run(turn.batch)
        finally:
            with self._lock:
                self._is_busy = False
                self._is_idle.notify_all()
                if len(self._scheduler):
                    self._has_work.notify()

    def _run(self, batch: Sequence[_Queued]) -> None:
        try:
            if self._has_failed:
                raise errors.device_failure()
            steps = [queued for queued in batch if isinstance(queued, _QueuedStep)]
            if steps:
                self._run_steps(steps)
            for queued in batch:
                if isinstance(queued, _QueuedChange):
                    self._run_change(queued)
        except Exception as error:
            self._fail(error)
            for queued in batch:
                _refuse(queued, errors.device_failure())

    def _run_change(self, queued: _QueuedChange) -> None:
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

    def _run_steps(self, steps: Sequence[_QueuedStep]) -> None:
        """Admit, launch, settle, answer."""
        pool = steps[0].pool
        with self._lock:
            admitted = [admit_step(step.request, step.sessions) for step in steps]
            entries = [entry for step_entries in admitted for entry in step_entries]
            batch = build_batch(entries, pool.spec.block_size)
        requests = [step.request for step in steps]
        outcome = run_launch(self._backend, pool.cache, requests, entries, batch)
        with self._lock:
            settle(entries, outcome)
        first_row = 0
        for step, step_entries in zip(steps, admitted, strict=True):
            step.answer(answer_step(step.request, step_entries, outcome, first_row))
            first_row += step.request.total_tokens

    def _fail(self, error: Exception) -> None:
        with self._lock:
            is_first = not self._has_failed
            self._has_failed = True
        if is_first:
            log.critical(
                "backend %s failed; restart the server", self._backend.name, exc_info=error
            )
            self._on_failure()


def _state(session: Session) -> SessionState:
    return SessionState(
        session.session_id,
        session.handle,
        session.spec.name,
        tuple(session.lengths),
        len(session.block_table),
    )


def _work_item(
    step: _QueuedStep, is_cancelled: Callable[[], bool], started_at: float
) -> WorkItem[_Queued]:
    request = step.request
    tensors = request.tensors
    timeout_s = request.timeout_ms / 1000 if request.timeout_ms else float("inf")
    return WorkItem(
        payload=step,
        keys=frozenset(map(WorkKey, request.handles, request.layers)),
        batch_key=(step.pool.spec.name, tensors[0][1].dtype, tuple([name for name, _ in tensors])),
        num_tokens=request.total_tokens,
        deadline=started_at + timeout_s,
        is_cancelled=is_cancelled,
    )


def _refuse(queued: _Queued, error: OctavoError) -> None:
    if isinstance(queued, _QueuedStep):
        queued.answer(StepAnswer(error=error))
    elif not queued.future.done() and (
        queued.future.running() or queued.future.set_running_or_notify_cancel()
    ):
        queued.future.set_exception(error)


def _expired(queued: _Queued) -> OctavoError:
    assert isinstance(queued, _QueuedStep), "only steps have deadlines"
    timeout_ms = queued.request.timeout_ms
    message = f"the step waited {timeout_ms} ms in the queue and was not applied; send it again, with more time"
    return OctavoError(Reason.STEP_EXPIRED, message, timeout_ms=timeout_ms)
