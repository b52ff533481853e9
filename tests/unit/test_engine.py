"""The engine on a backend without kernels: batching, isolation of refusals, order, deadlines, drain and failure."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from octavo_server import engine as engine_module
from octavo_server.backends.base import HostArray, alloc_paged_int8_cache
from octavo_server.block_pool import BlockPool
from octavo_server.engine import Engine
from octavo_server.errors import OctavoError, Reason
from octavo_server.launch import answer_step
from octavo_server.model_pool import ModelPool
from octavo_server.session import Session, SessionOptions, SessionState
from octavo_server.session_store import SessionStore
from octavo_server.step import StepAnswer, StepOrigin, StepRequest
from octavo_server.tenant import Tenants
from tests.unit.conftest import LEASE_S, make_spec
from tests.unit.fake_backend import FakeBackend
from tests.waiting import wait_until

WAIT_S = 10


class Bench:
    """An engine with a tiny model of 10 blocks, and short ways to talk to it."""

    def __init__(self, max_queued_steps: int = 100) -> None:
        self.backend = FakeBackend()
        self.failures: list[bool] = []
        pools = {}
        for spec in (make_spec(), make_spec(name="other", head_dim=16)):
            cache = alloc_paged_int8_cache(self.backend, spec, 10)
            pools[spec.name] = ModelPool(cache, BlockPool(10))
        self.pool = pools["tiny"].blocks
        self.store = SessionStore("feed", max_sessions=4)
        self.tenants = Tenants()
        self.tenant = self.tenants.get("")
        self.origin = StepOrigin(self.tenant)
        self.engine = Engine(
            self.backend,
            pools,
            self.store,
            self.tenants,
            lambda: self.failures.append(True),
            max_queued_steps,
        )
        self._origins: dict[str, StepOrigin] = {}
        self.engine.start()

    def open(self, model: str = "tiny", **options: Any) -> int:
        return self.open_session(model, **options).handle

    def open_session(
        self, model: str = "tiny", request_id: str = "", **options: Any
    ) -> SessionState:
        asked = SessionOptions(**({"lease_s": LEASE_S} | options))
        return self.engine.sessions.open(model, self.tenant, asked, request_id)

    def id_of(self, handle: int) -> str:
        session = self.store.by_handle(handle, self.tenant)
        assert isinstance(session, Session)
        return session.session_id

    def state(self, handle: int) -> SessionState:
        return self.engine.sessions.get_by_handle(handle, self.tenant)

    def close(self, session_id: str) -> Future[int]:
        return self.engine.sessions.close(session_id, self.tenant)

    def submit(
        self,
        request: StepRequest,
        is_cancelled: Callable[[], bool] | None = None,
        client: str = "",
    ) -> SimpleQueue[StepAnswer]:
        answers: SimpleQueue[StepAnswer] = SimpleQueue()
        origin = self._origins.setdefault(
            client, self.origin if not client else StepOrigin(self.tenant)
        )
        if is_cancelled is not None:
            origin = StepOrigin(self.tenant, is_cancelled)
        self.engine.submit(request, answers.put, origin)
        return answers

    def run(self, request: StepRequest) -> StepAnswer:
        return self.submit(request).get(timeout=WAIT_S)

    def hold(self) -> None:
        """Hold the engine in a launch of its own, so that what follows queues up."""
        self.backend.may_run.clear()
        self.backend.is_running.clear()
        handle = self.open("other")
        self.submit(step((handle, 0, 0, 1), head_dim=16))
        assert self.backend.is_running.wait(WAIT_S)
        self.backend.batches.clear()


def rows(num_tokens: int, num_heads: int, head_dim: int = 8, dtype: type = np.float32) -> HostArray:
    return np.ones((num_tokens, num_heads, head_dim), dtype)


def step(
    *entries: tuple[int, int, int, int],
    has_kv: bool = True,
    head_dim: int = 8,
    dtype: type = np.float32,
    **options: object,
) -> StepRequest:
    """Return a step of (handle, layer, start_pos, num_tokens) entries."""
    handles, layers, start_pos, num_tokens = zip(*entries, strict=True)
    total = sum(num_tokens)
    values: dict[str, object] = {"q": rows(total, 4, head_dim, dtype)}
    if has_kv:
        values |= {name: rows(total, 2, head_dim, dtype) for name in "kv"}
    return StepRequest(handles, layers, start_pos, num_tokens, **(values | options))  # type: ignore[arg-type]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.backend.may_run.set()
    bench.engine.stop()


def test_a_step_appends_then_attends(bench: Bench) -> None:
    handle = bench.open()
    answer = bench.run(step((handle, 0, 0, 3), (handle, 1, 0, 2), return_lse=True))
    assert answer.error is None
    assert not answer.entry_errors
    assert answer.out is not None
    assert answer.out[:, 0, 0].tolist() == [4, 4, 4, 3, 3]
    assert answer.lse is not None
    assert answer.lse.shape == (5, 4)
    assert bench.state(handle).lengths == (3, 2)


def test_slots_follow_the_block_table(bench: Bench) -> None:
    first, second = bench.open(), bench.open()
    bench.run(step((first, 0, 0, 15)))
    bench.run(step((second, 0, 0, 1)))
    bench.run(step((first, 0, 15, 3), (second, 0, 1, 1)))
    assert bench.backend.batches[-1].slot_mapping.tolist() == [15, 32, 33, 17]
    assert bench.backend.batches[-1].block_tables.tolist() == [[0, 2], [1, -1]]


def test_one_bad_entry_leaves_its_neighbours_answered(bench: Bench) -> None:
    good, bad, gone = bench.open(), bench.open(), bench.open()
    bench.close(bench.id_of(gone)).result(WAIT_S)
    free = bench.pool.num_free
    request = step(
        (bad, 0, 0, 20),
        (good, 0, 0, 2),
        (bad, 1, 5, 1),
        (gone, 0, 0, 1),
        (bad, 2, 0, 1),
        return_lse=True,
    )
    assert request.k is not None
    request.k[7, 1, 3] = np.nan
    answer = bench.run(request)
    reasons = {entry: error.reason for entry, error in answer.entry_errors.items()}
    assert reasons == {
        0: Reason.NON_FINITE,
        2: Reason.POSITION_MISMATCH,
        3: Reason.SESSION_NOT_FOUND,
        4: Reason.LAYER_NOT_FOUND,
    }
    assert answer.entry_errors[0].metadata == {"field": "k", "token": "7", "head": "1"}
    assert answer.out is not None
    assert answer.out[:, 0, 0].tolist() == [0] * 20 + [3, 3] + [0] * 3
    assert answer.lse is not None
    assert answer.lse[:, 0].tolist() == [0] * 20 + [2.5, 2.5] + [0] * 3
    assert bench.state(bad).lengths == (0, 0)
    assert bench.pool.num_free == free - 1


def test_a_full_pool_refuses_the_entry_that_does_not_fit(bench: Bench) -> None:
    first, second, third = bench.open(), bench.open(), bench.open()
    answer = bench.run(step((first, 0, 0, 96), (second, 0, 0, 80), (third, 0, 0, 64)))
    assert {i: e.reason for i, e in answer.entry_errors.items()} == {1: Reason.OUT_OF_BLOCKS}
    assert bench.pool.num_free == 0


def test_a_replay_answers_again_and_stores_nothing(bench: Bench) -> None:
    handle = bench.open()
    request = step((handle, 0, 0, 3), step_key=9)
    first, again = bench.run(request), bench.run(request)
    assert first.out is not None
    assert again.out is not None
    np.testing.assert_array_equal(first.out, again.out)
    assert bench.state(handle).lengths == (3, 0)


def test_queued_steps_share_one_launch(bench: Bench) -> None:
    handles = [bench.open() for _ in range(3)]
    bench.hold()
    answers = [bench.submit(step((handle, 0, 0, 2))) for handle in handles]
    bench.backend.may_run.set()
    for answer in answers:
        out = answer.get(timeout=WAIT_S).out
        assert out is not None
        assert out.shape == (2, 4, 8)
        assert out[0, 0, 0] == 3
    assert bench.backend.batches[-1].num_entries == 3


def test_steps_of_two_dtypes_do_not_share_a_launch(bench: Bench) -> None:
    handles = [bench.open() for _ in range(2)]
    bench.hold()
    answers = [
        bench.submit(step((handle, 0, 0, 2), dtype=dtype))
        for handle, dtype in zip(handles, (np.float16, np.float32), strict=True)
    ]
    bench.backend.may_run.set()
    outs = [answer.get(timeout=WAIT_S).out for answer in answers]
    assert [out is not None and out.dtype for out in outs] == [np.float16, np.float32]
    assert [batch.num_entries for batch in bench.backend.batches[-2:]] == [1, 1]


def test_steps_that_share_a_launch_get_the_lse_that_each_asked_for(bench: Bench) -> None:
    handles = [bench.open() for _ in range(3)]
    bench.hold()
    answers = [
        bench.submit(step((handle, 0, 0, num_tokens), return_lse=num_tokens == 2))
        for num_tokens, handle in enumerate(handles, start=1)
    ]
    bench.backend.may_run.set()
    before, asked, after = (answer.get(timeout=WAIT_S).lse for answer in answers)
    assert before is after is None
    assert asked is not None
    assert asked[:, 0].tolist() == [2.5, 2.5]
    assert bench.backend.batches[-1].num_entries == 3


def test_positions_are_checked_when_the_turn_comes(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    request = step((handle, 0, 0, 2))
    assert request.v is not None
    request.v[0, 0, 0] = np.nan
    refused, late = bench.submit(request), bench.submit(step((handle, 0, 2, 1)))
    right = bench.submit(step((handle, 0, 0, 1)))
    bench.backend.may_run.set()
    assert refused.get(timeout=WAIT_S).entry_errors[0].reason is Reason.NON_FINITE
    assert late.get(timeout=WAIT_S).entry_errors[0].reason is Reason.POSITION_MISMATCH
    assert not right.get(timeout=WAIT_S).entry_errors


def test_close_and_truncate_wait_for_what_was_accepted_before(bench: Bench) -> None:
    handle = bench.open()
    session_id = bench.id_of(handle)
    bench.hold()
    answer = bench.submit(step((handle, 0, 0, 20)))
    truncated = bench.engine.sessions.truncate(session_id, bench.tenant, 5, [])
    closed = bench.close(session_id)
    after = bench.submit(step((handle, 0, 5, 1)))
    assert not truncated.done()
    bench.backend.may_run.set()
    assert not answer.get(timeout=WAIT_S).entry_errors
    assert truncated.result(WAIT_S).lengths == (5, 0)
    assert closed.result(WAIT_S) == 1
    assert after.get(timeout=WAIT_S).entry_errors[0].reason is Reason.SESSION_NOT_FOUND
    assert bench.pool.num_free == 10


def test_closing_twice_at_once_closes_once(bench: Bench) -> None:
    session_id = bench.id_of(bench.open())
    bench.hold()
    first, second = (bench.close(session_id) for _ in range(2))
    bench.backend.may_run.set()
    assert first.result(WAIT_S) == 0
    with pytest.raises(OctavoError, match="no open session"):
        second.result(WAIT_S)


def test_a_step_that_expires_in_the_queue_is_not_applied(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    answer = bench.submit(step((handle, 0, 0, 1), timeout_ms=1))
    in_time = bench.submit(step((handle, 0, 0, 2), timeout_ms=60_000))
    time.sleep(0.02)
    bench.backend.may_run.set()
    error = answer.get(timeout=WAIT_S).error
    assert error is not None
    assert error.reason is Reason.STEP_EXPIRED
    assert error.metadata == {"timeout_ms": "1"}
    assert not in_time.get(timeout=WAIT_S).entry_errors


def test_a_cancelled_step_is_dropped_unapplied(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    dropped = bench.submit(step((handle, 0, 0, 7)), lambda: True)
    kept = bench.submit(step((handle, 0, 0, 2)))
    bench.backend.may_run.set()
    assert not kept.get(timeout=WAIT_S).entry_errors
    assert dropped.empty()


def test_drain_refuses_new_work_and_finishes_the_old(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    answer = bench.submit(step((handle, 0, 0, 1)))
    assert not bench.engine.drain(timeout_s=0.01)
    with pytest.raises(OctavoError) as refused:
        bench.submit(step((handle, 0, 1, 1)))
    assert refused.value.reason is Reason.DRAINING
    with pytest.raises(OctavoError, match="shutting down"):
        bench.open()
    bench.backend.may_run.set()
    assert bench.engine.drain(timeout_s=WAIT_S)
    assert not answer.get(timeout=WAIT_S).entry_errors


def test_stopping_refuses_what_never_had_its_turn(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    waiting = bench.submit(step((handle, 0, 0, 1)))
    closing = bench.close(bench.id_of(handle))
    stopping = threading.Thread(target=bench.engine.stop)
    stopping.start()
    wait_until(lambda: bench.engine._is_stopped)
    bench.backend.may_run.set()
    stopping.join(WAIT_S)
    error = waiting.get(timeout=WAIT_S).error
    assert error is not None
    assert error.reason is Reason.DRAINING
    with pytest.raises(OctavoError, match="shutting down"):
        closing.result(WAIT_S)


def test_a_backend_that_fails_refuses_everything_and_says_so_once(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    waiting = bench.submit(step((handle, 0, 0, 1)))
    closing = bench.close(bench.id_of(handle))
    bench.backend.is_broken = True
    bench.backend.may_run.set()
    error = waiting.get(timeout=WAIT_S).error
    assert error is not None
    assert error.reason is Reason.DEVICE_FAILURE
    with pytest.raises(OctavoError, match="device failed"):
        closing.result(WAIT_S)
    with pytest.raises(OctavoError, match="device failed"):
        bench.submit(step((handle, 0, 0, 1)))
    assert bench.failures == [True]


def test_sessions_of_two_models_cannot_share_a_step(bench: Bench) -> None:
    with pytest.raises(OctavoError) as refused:
        bench.submit(step((bench.open(), 0, 0, 1), (bench.open("other"), 0, 0, 1)))
    assert refused.value.reason is Reason.SHAPE_MISMATCH
    assert refused.value.metadata["actual"] == "of other, tiny"


def test_a_step_of_unknown_sessions_is_answered_with_zeros(bench: Bench) -> None:
    answer = bench.run(step((12345, 0, 0, 2), return_lse=True))
    assert answer.entry_errors[0].metadata == {"session_id": "12345"}
    assert answer.out is not None
    assert not answer.out.any()
    assert answer.lse is not None


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"q": rows(3, 4)}, Reason.SHAPE_MISMATCH, "q"),
        ({"q": rows(2, 2)}, Reason.SHAPE_MISMATCH, "q"),
        ({"k": rows(2, 4)}, Reason.SHAPE_MISMATCH, "k"),
        ({"v": rows(2, 2, 16)}, Reason.SHAPE_MISMATCH, "v"),
        ({"v": None}, Reason.SHAPE_MISMATCH, "v"),
        ({"k": None}, Reason.SHAPE_MISMATCH, "k"),
        ({"is_causal": False}, Reason.SHAPE_MISMATCH, "causal"),
        ({"v": rows(2, 2).astype(np.float16)}, Reason.DTYPE_MISMATCH, "q, k, v"),
        ({"layers": [0, 1]}, Reason.SHAPE_MISMATCH, "layers"),
        ({"num_tokens": [0]}, Reason.SHAPE_MISMATCH, "num_tokens"),
        (
            {"handles": [], "layers": [], "start_pos": [], "num_tokens": []},
            Reason.EMPTY_STEP,
            "session_handles",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_refused_whole(
    bench: Bench, changes: dict[str, object], reason: Reason, field: str
) -> None:
    values: dict[str, object] = {
        "handles": [bench.open()],
        "layers": [0],
        "start_pos": [0],
        "num_tokens": [2],
    }
    values |= {"q": rows(2, 4), "k": rows(2, 2), "v": rows(2, 2)}
    with pytest.raises(OctavoError) as refused:
        bench.submit(StepRequest(**(values | changes)))  # type: ignore[arg-type]
    assert refused.value.reason is reason
    assert refused.value.metadata["field"] == field
    assert bench.pool.num_free == 10


def test_one_session_and_layer_twice_in_a_step_is_refused(bench: Bench) -> None:
    handle = bench.open()
    with pytest.raises(OctavoError) as refused:
        bench.submit(step((handle, 0, 0, 1), (handle, 1, 0, 1), (handle, 0, 1, 1)))
    assert refused.value.reason is Reason.DUPLICATE_ENTRY


def test_opening_is_idempotent_by_request_id_and_limited(bench: Bench) -> None:
    first = bench.open_session("tiny", "request")
    assert bench.open_session("tiny", "request").session_id == first.session_id
    with pytest.raises(OctavoError) as refused:
        bench.open_session("other", "request")
    assert refused.value.reason is Reason.DUPLICATE_ENTRY
    for _ in range(3):
        bench.open()
    with pytest.raises(OctavoError) as refused:
        bench.open()
    assert refused.value.metadata == {"limit": "4"}
    bench.close(first.session_id).result(WAIT_S)
    assert bench.open_session("tiny", "request").handle != first.handle


def test_sessions_are_listed_in_pages_in_the_order_of_opening(bench: Bench) -> None:
    handles = [bench.open() for _ in range(4)]
    page, next_idx = bench.engine.sessions.page(bench.tenant, 0, 3)
    assert [state.handle for state in page] == handles[:3]
    bench.close(page[2].session_id).result(WAIT_S)
    page, next_idx = bench.engine.sessions.page(bench.tenant, next_idx, 3)
    assert [state.handle for state in page] == handles[3:]
    assert next_idx == 0


def test_an_unknown_model_is_refused(bench: Bench) -> None:
    with pytest.raises(OctavoError, match="ServerInfo lists"):
        bench.open("missing")


def test_an_idle_engine_runs_a_step_in_the_thread_that_brings_it(bench: Bench) -> None:
    bench.backend.binds_caller = False
    handle = bench.open()
    answers: list[StepAnswer] = []
    bench.engine.submit(step((handle, 0, 0, 1)), answers.append, bench.origin, lead_s=math.inf)
    assert [answer.error for answer in answers] == [None]
    assert bench.backend.threads[-1] is threading.current_thread()
    assert bench.run(step((handle, 0, 1, 1))).error is None
    assert bench.backend.threads[-1].name == "octavo-engine"


def test_a_backend_that_binds_its_caller_has_one(bench: Bench) -> None:
    bench.backend.binds_caller = True
    answers: SimpleQueue[StepAnswer] = SimpleQueue()
    bench.engine.submit(step((bench.open(), 0, 0, 1)), answers.put, bench.origin, lead_s=math.inf)
    assert answers.get(timeout=WAIT_S).error is None
    assert {thread.name for thread in bench.backend.threads} == {"octavo-engine"}


def test_a_step_that_comes_while_another_thread_leads_is_the_engines(bench: Bench) -> None:
    first, second = bench.open(), bench.open()
    bench.backend.may_run.clear()
    leader = threading.Thread(
        target=bench.engine.submit,
        args=(step((first, 0, 0, 1)), lambda _: None, bench.origin),
        kwargs={"lead_s": math.inf},
    )
    leader.start()
    assert bench.backend.is_running.wait(WAIT_S)
    answers: SimpleQueue[StepAnswer] = SimpleQueue()
    bench.engine.submit(step((second, 0, 0, 1)), answers.put, bench.origin, lead_s=math.inf)
    bench.backend.may_run.set()
    assert answers.get(timeout=WAIT_S).error is None
    leader.join(WAIT_S)
    assert [thread.name for thread in bench.backend.threads[-1:]] == ["octavo-engine"]
    assert bench.backend.threads[0] is leader


def test_draining_waits_for_whoever_leads(bench: Bench) -> None:
    bench.backend.may_run.clear()
    request = step((bench.open(), 0, 0, 1))
    leader = threading.Thread(
        target=bench.engine.submit,
        args=(request, lambda _: None, bench.origin),
        kwargs={"lead_s": math.inf},
    )
    leader.start()
    assert bench.backend.is_running.wait(WAIT_S)
    assert not bench.engine.drain(0.01)
    bench.backend.may_run.set()
    assert bench.engine.drain(WAIT_S)
    leader.join(WAIT_S)


def test_a_step_tells_what_it_cost_when_asked(bench: Bench) -> None:
    handles = [bench.open() for _ in range(2)]
    before = time.monotonic()
    bench.hold()
    asking = step((handles[0], 0, 0, 2), (handles[0], 1, 1, 3), return_stage_times=True)
    asked, silent = bench.submit(asking), bench.submit(step((handles[1], 0, 0, 4)))
    queued_at = time.monotonic()
    time.sleep(0.01)
    queued_us = (time.monotonic() - queued_at) * 1e6
    bench.backend.may_run.set()
    times = asked.get(timeout=WAIT_S).stage_times
    assert silent.get(timeout=WAIT_S).stage_times is None
    assert times is not None
    assert (times.batch_size, times.batch_tokens) == (3, 9)
    whole_us = (time.monotonic() - before) * 1e6
    stages = (times.queue_us, times.copy_in_us, times.kernel_us, times.copy_out_us)
    assert times.queue_us >= queued_us - 1
    assert min(stages) >= 0
    assert sum(stages) <= whole_us + len(stages)


def test_time_in_the_backend_is_the_kernels(bench: Bench) -> None:
    handle = bench.open()
    bench.backend.may_run.clear()
    bench.backend.is_running.clear()
    answer = bench.submit(step((handle, 0, 0, 1), return_stage_times=True))
    assert bench.backend.is_running.wait(WAIT_S)
    held_at = time.monotonic()
    time.sleep(0.01)
    held_us = (time.monotonic() - held_at) * 1e6
    bench.backend.may_run.set()
    times = answer.get(timeout=WAIT_S).stage_times
    assert times is not None
    assert times.kernel_us >= held_us - 1


def test_a_step_that_no_launch_ran_has_no_stage_times(bench: Bench) -> None:
    answer = bench.run(step((12345, 0, 0, 2), return_stage_times=True))
    assert answer.stage_times is None


def test_a_full_queue_refuses_steps_and_takes_changes() -> None:
    bench = Bench(max_queued_steps=2)
    handle = bench.open()
    bench.hold()
    answers = [bench.submit(step((handle, layer, 0, 1))) for layer in range(2)]
    with pytest.raises(OctavoError) as refused:
        bench.submit(step((handle, 0, 1, 1)))
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.metadata == {"limit": "2"}
    closed = bench.close(bench.id_of(handle))
    bench.backend.may_run.set()
    for answer in answers:
        assert not answer.get(timeout=WAIT_S).entry_errors
    assert closed.result(WAIT_S) == 1
    assert not bench.run(step((bench.open(), 0, 0, 1))).entry_errors
    bench.engine.stop()


def test_prompts_do_not_share_the_launches_of_decode_steps(bench: Bench) -> None:
    handles = [bench.open() for _ in range(3)]
    bench.hold()
    prompts = [bench.submit(step((handles[0], 0, 0, 40))), bench.submit(only_kv(handles[1], 3))]
    decode = bench.submit(step((handles[2], 0, 0, 32)))
    bench.backend.may_run.set()
    for answer in (*prompts, decode):
        assert not answer.get(timeout=WAIT_S).entry_errors
    layouts = [batch.token_starts.tolist() for batch in bench.backend.batches]
    assert layouts[-3:] == [[0, 32], [0, 40], [0, 3]]


def only_kv(handle: int, num_tokens: int) -> StepRequest:
    return step((handle, 0, 0, num_tokens), q=None)


def test_clients_take_turns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.engine._scheduler._decodes, "max_tokens", 2)
    flooding, other = bench.open(), bench.open()
    bench.hold()
    for layer in range(2):
        bench.submit(step((flooding, layer, 0, 1)), client="flooding")
    late = bench.submit(step((other, 0, 0, 1)), client="other")
    bench.backend.may_run.set()
    assert not late.get(timeout=WAIT_S).entry_errors
    wait_until(lambda: len(bench.backend.batches) == 3)
    _held, shared, rest = bench.backend.batches
    assert shared.block_tables[:, 0].tolist() == [0, 1]
    assert (shared.layers.tolist(), rest.layers.tolist()) == ([0, 0], [1])


def test_the_totals_have_every_launch_before_it_is_answered(bench: Bench) -> None:
    first, second = bench.open(), bench.open()
    bench.run(step((first, 0, 0, 3), (first, 1, 0, 2), step_key=7))
    bench.hold()
    bad = step((second, 0, 0, 4), (second, 1, 0, 1))
    assert bad.v is not None
    bad.v[0, 0, 0] = np.nan
    answers = [bench.submit(step((first, 0, 3, 1))), bench.submit(bad)]
    assert bench.engine.stats().num_queued == 2
    bench.backend.may_run.set()
    for answer in answers:
        answer.get(timeout=WAIT_S)
    bench.run(step((first, 0, 3, 1), has_kv=False))
    stats = bench.engine.stats()
    shapes = [launch[:5] for launch in stats.launches]
    assert shapes == [(1, 2, 2, 2, 2), (2, 1, 1, 2, 5), (4, 1, 2, 3, 6)]
    assert (stats.num_steps, stats.num_appended_tokens) == (5, 3 + 2 + 1 + 1 + 1)
    assert (stats.num_queued, stats.max_queued_steps, stats.num_sessions) == (0, 100, 3)
    assert [pool[:3] for pool in stats.pools] == [("tiny", 10, 8), ("other", 10, 9)]
    assert [pool[3:] for pool in stats.pools] == [
        (pool.spec.block_size, pool.spec.block_bytes) for pool in bench.engine.pools.values()
    ]


def test_what_steps_waited_and_took_adds_up(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    answer = bench.submit(step((handle, 0, 0, 1), (handle, 1, 0, 1), return_stage_times=True))
    time.sleep(0.005)
    bench.backend.may_run.set()
    times = answer.get(timeout=WAIT_S).stage_times
    assert times is not None
    launch = bench.engine.stats().launches[-1]
    assert (launch.queue_us, launch.copy_in_us, launch.kernel_us) == (
        times.queue_us,
        times.copy_in_us,
        times.kernel_us,
    )
    wait_until(lambda: bench.engine.stats().launches[-1].copy_out_us >= times.copy_out_us)


def test_a_step_runs_where_it_is_brought_only_while_launches_are_short(bench: Bench) -> None:
    handle = bench.open()
    bench.engine._last_launch_s = 1.0
    answers: SimpleQueue[StepAnswer] = SimpleQueue()
    bench.engine.submit(step((handle, 0, 0, 1)), answers.put, bench.origin, lead_s=0.5)
    assert answers.get(timeout=WAIT_S).error is None
    assert bench.backend.threads[-1].name == "octavo-engine"
    wait_until(lambda: not bench.engine._is_busy)
    bench.engine.submit(step((handle, 0, 1, 1)), answers.put, bench.origin, lead_s=0.5)
    assert answers.get(timeout=WAIT_S).error is None
    assert bench.backend.threads[-1] is threading.current_thread()


def test_a_launch_whose_answers_cannot_be_cut_answers_each_step_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = [bench.open() for _ in range(2)]
    bench.hold()
    answers = [bench.submit(step((handle, 0, 0, 1))) for handle in handles]
    cut = answer_step
    num_cut = 0

    def fail_at_the_second(*args: Any) -> StepAnswer:
        nonlocal num_cut
        num_cut += 1
        if num_cut == 3:  # the held launch is the first
            raise RuntimeError("planted")
        return cut(*args)

    monkeypatch.setattr(engine_module, "answer_step", fail_at_the_second)
    bench.backend.may_run.set()
    for answer in answers:
        error = answer.get(timeout=WAIT_S).error
        assert error is not None
        assert error.reason is Reason.DEVICE_FAILURE
    assert all(answer.empty() for answer in answers)
