"""Exports and imports in the engine: between launches, whole or not at all, and never a block lost."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from octavo_server import errors, session_file
from octavo_server.errors import OctavoError, Reason
from octavo_server.session import SessionOptions
from octavo_server.session_header import InvalidSessionFileError, SavedSession
from octavo_server.session_transfer import Export, Import, abandoning
from tests.unit.conftest import LEASE_S
from tests.unit.test_engine import WAIT_S, Bench, bench, step

__all__ = ["bench"]

OPTIONS = SessionOptions(LEASE_S)


def result(future: Future[Any]) -> Any:
    return future.result(WAIT_S)


def exported(bench: Bench, num_tokens: int = 20) -> Export:
    """Begin to export a session with tokens in one layer."""
    handle = bench.open()
    bench.run(step((handle, 0, 0, num_tokens)))
    return bench.engine.transfers.export(bench.id_of(handle), bench.tenant)


def begin(bench: Bench, saved: SavedSession, request_id: str = "") -> Import:
    started = bench.engine.transfers.begin(saved, "", bench.tenant, OPTIONS, request_id)
    assert isinstance(started, Import)
    return started


def refusal(bench: Bench, saved: SavedSession) -> Reason:
    """Return why a session is not imported; nothing may change by it."""
    before = bench.pool.num_free, bench.tenant.stats()
    with pytest.raises(OctavoError) as refused:
        begin(bench, saved)
    assert (bench.pool.num_free, bench.tenant.stats()) == before
    return refused.value.reason


def test_an_import_counts_from_its_beginning_and_is_found_at_its_end(bench: Bench) -> None:
    saved = exported(bench, 70).saved
    before = bench.tenant.stats()
    started = begin(bench, saved)
    assert bench.pool.num_free == 0
    assert bench.tenant.stats().num_sessions == 2
    assert bench.engine.sessions.page(bench.tenant, 0, 10)[0][1:] == []
    assert refusal(bench, saved) is Reason.OUT_OF_BLOCKS
    started.abandon()
    assert bench.tenant.stats() == before
    state = begin(bench, saved).finish()
    assert state.lengths == (70, 0)
    assert bench.state(state.handle).session_id == state.session_id


def test_the_limit_of_sessions_counts_imports_under_way(bench: Bench) -> None:
    saved = exported(bench, 1).saved
    started = [begin(bench, saved) for _ in range(3)]
    assert refusal(bench, saved) is Reason.SESSION_LIMIT
    for one in started:
        one.abandon()
    assert bench.pool.num_free == 9


def test_two_imports_of_one_request_open_one_session(bench: Bench) -> None:
    saved = exported(bench).saved
    first, second = begin(bench, saved, "r"), begin(bench, saved, "r")
    assert first.finish().session_id == second.finish().session_id
    again = bench.engine.transfers.begin(saved, "", bench.tenant, OPTIONS, "r")
    assert not isinstance(again, Import)
    assert bench.pool.num_free == 6


def test_an_import_that_fails_gives_its_blocks_back_once_nobody_writes(bench: Bench) -> None:
    export = exported(bench)
    piece, values = next(session_file.pieces(export.saved, 16)), next(export.values(result))
    started = begin(bench, export.saved)
    bench.hold()
    started._written = bench.engine.transfers.write(started._session, piece, values)
    with pytest.raises(KeyError), abandoning(started):
        raise KeyError
    assert started._written.cancelled()
    assert bench.pool.num_free == 8


def test_nothing_is_imported_once_the_server_drains_and_exports_go_on(bench: Bench) -> None:
    export = exported(bench)
    started = begin(bench, export.saved)
    assert bench.engine.drain(WAIT_S)
    with pytest.raises(OctavoError) as refused:
        started.finish()
    assert refused.value.reason is Reason.DRAINING
    started.abandon()
    assert refusal(bench, export.saved) is Reason.DRAINING
    assert len(list(export.values(result))) == len(list(session_file.pieces(export.saved, 16)))
    assert len(bench.engine.transfers.export_all()) == 1


def test_an_export_goes_between_the_launches_of_others(bench: Bench) -> None:
    export = exported(bench)
    bench.hold()
    answers = bench.submit(step((bench.open(), 0, 0, 1)))
    values = export.values(result)
    bench.backend.may_run.set()
    assert next(values).shape == (20, 2, 8)
    assert answers.get(timeout=WAIT_S).error is None


@pytest.mark.parametrize("change", ["truncate", "close"])
def test_an_export_ends_with_its_session(bench: Bench, change: str) -> None:
    export = exported(bench)
    values = export.values(result)
    next(values)
    if change == "truncate":
        result(bench.engine.sessions.truncate(export.session_id, bench.tenant, 19, ()))
    else:
        result(bench.close(export.session_id))
    with pytest.raises(OctavoError) as refused:
        list(values)
    expected = {"truncate": Reason.POSITION_MISMATCH, "close": Reason.SESSION_NOT_FOUND}
    assert refused.value.reason is expected[change]


def test_a_backend_that_fails_in_a_task_has_failed(bench: Bench) -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    with pytest.raises(OctavoError) as refused:
        result(bench.engine.run_task(fail, None))
    assert refused.value.reason is Reason.DEVICE_FAILURE
    assert bench.failures == [True]
    with pytest.raises(OctavoError):
        bench.engine.run_task(fail, None)


def test_a_task_that_refuses_is_no_failure(bench: Bench) -> None:
    def refuse() -> None:
        raise errors.draining()

    with pytest.raises(OctavoError):
        result(bench.engine.run_task(refuse, None))
    assert not bench.engine.has_failed


def test_what_is_dropped_is_refused_and_tasks_go_on(bench: Bench) -> None:
    handle = bench.open()
    bench.hold()
    answers = bench.submit(step((handle, 0, 0, 1)))
    assert not bench.engine.drain(0.0)
    bench.engine.drop_queued()
    answer = answers.get(timeout=WAIT_S)
    assert answer.error is not None
    assert answer.error.reason is Reason.DRAINING
    bench.backend.may_run.set()
    assert result(bench.engine.run_task(lambda: 7, None)) == 7
    bench.engine.stop()
    with pytest.raises(OctavoError) as refused:
        bench.engine.run_task(lambda: 7, None)
    assert refused.value.reason is Reason.DRAINING


def test_a_snapshot_of_an_open_session_is_refused(bench: Bench) -> None:
    exported(bench)
    (export,) = bench.engine.transfers.export_all()
    with pytest.raises(InvalidSessionFileError, match="an open session has its id"):
        bench.engine.transfers.restore(export.saved, bench.tenant)
    with pytest.raises(InvalidSessionFileError, match="no identity"):
        bench.engine.transfers.restore(exported(bench).saved, bench.tenant)
