"""The session store: tenants, what became of sessions that are gone, and those of earlier processes."""

import pytest

from octavo_server import session_store
from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.session import Session, SessionOptions
from octavo_server.session_store import SessionStore
from octavo_server.tenant import Tenant, TenantLimits
from tests.unit.conftest import make_spec

SPEC = make_spec()
OPTIONS = SessionOptions(60.0)
ACME, OTHER = Tenant("acme"), Tenant("other")
STRANGE_ID = "0badcafe-" + 32 * "7"
STRANGE_HANDLE = 0x0BAD << 48 | 5


@pytest.fixture
def store() -> SessionStore:
    return SessionStore("feedc0de", max_sessions=2)


def opened(store: SessionStore, tenant: Tenant = ACME, request_id: str = "") -> Session:
    session = store.create(SPEC, BlockPool(10), tenant, OPTIONS)
    store.add(session, request_id)
    return session


def reasons(store: SessionStore, session_id: str, handle: int, tenant: Tenant) -> set[Reason]:
    """Return what a tenant is told of an id and of a handle that name no session of its."""
    with pytest.raises(OctavoError) as refused:
        store.by_id(session_id, tenant)
    by_handle = store.by_handle(handle, tenant)
    assert isinstance(by_handle, OctavoError)
    assert str(handle) in str(by_handle)
    assert session_id in str(refused.value)
    return {refused.value.reason, by_handle.reason}


def test_ids_and_handles_carry_the_incarnation_and_are_random(store: SessionStore) -> None:
    first, second = opened(store), opened(store)
    assert first.session_id.startswith("feedc0de-")
    assert len(first.session_id) == 41
    assert first.handle >> 48 == second.handle >> 48 == 0xFEED
    assert first.handle != second.handle


def test_a_session_is_its_tenants_alone(store: SessionStore) -> None:
    session = opened(store, request_id="r")
    assert store.by_id(session.session_id, ACME) is session
    assert store.by_handle(session.handle, ACME) is session
    assert store.page(OTHER, 0, 10) == ([], 0)
    assert store.opened_by(OTHER, "r", SPEC) is None
    assert reasons(store, session.session_id, session.handle, OTHER) == {Reason.SESSION_NOT_FOUND}


def test_an_expired_session_is_remembered_for_its_tenant(store: SessionStore) -> None:
    session = opened(store)
    ids = session.session_id, session.handle
    session.has_expired = True
    store.forget(session)
    assert reasons(store, *ids, ACME) == {Reason.SESSION_EXPIRED}
    assert reasons(store, *ids, OTHER) == {Reason.SESSION_NOT_FOUND}


def test_what_is_remembered_is_bounded(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_store, "MAX_ENDED", 2)
    ended = []
    for _ in range(3):
        session = opened(store)
        session.has_expired = True
        store.forget(session)
        ended.append((session.session_id, session.handle))
    assert reasons(store, *ended[0], ACME) == {Reason.SESSION_NOT_FOUND}
    assert reasons(store, *ended[1], ACME) == {Reason.SESSION_EXPIRED}


def test_a_closed_session_is_not_found(store: SessionStore) -> None:
    session = opened(store)
    store.forget(session)
    assert reasons(store, session.session_id, session.handle, ACME) == {Reason.SESSION_NOT_FOUND}


def test_a_session_of_another_process_is_lost(store: SessionStore) -> None:
    assert reasons(store, STRANGE_ID, STRANGE_HANDLE, ACME) == {Reason.SESSION_LOST}


@pytest.mark.parametrize("text", ["", "s", "0badcafe", "0badcafe-77", STRANGE_ID + "7", "x" * 41])
def test_what_is_no_id_is_not_found(store: SessionStore, text: str) -> None:
    with pytest.raises(OctavoError) as refused:
        store.by_id(text, ACME)
    assert refused.value.reason is Reason.SESSION_NOT_FOUND


def test_a_restored_session_is_known_and_those_beside_it_are_lost(store: SessionStore) -> None:
    session = Session(STRANGE_ID, STRANGE_HANDLE, SPEC, BlockPool(10), ACME, OPTIONS)
    store.restore(session)
    store.add(session, "r")
    assert store.by_id(STRANGE_ID, ACME) is session
    assert store.opened_by(ACME, "r", SPEC) is session
    gone = STRANGE_ID[:-1] + "0"
    for tenant in (ACME, OTHER):
        assert reasons(store, gone, STRANGE_HANDLE + 1, tenant) == {Reason.SESSION_LOST}
    # Nobody can tell from the answer that another tenant's session is there.
    assert reasons(store, STRANGE_ID, STRANGE_HANDLE, OTHER) == {Reason.SESSION_LOST}


def test_a_restored_session_that_was_closed_is_not_lost(store: SessionStore) -> None:
    session = Session(STRANGE_ID, STRANGE_HANDLE, SPEC, BlockPool(10), ACME, OPTIONS)
    store.restore(session)
    store.add(session, "")
    store.forget(session)
    assert reasons(store, STRANGE_ID, STRANGE_HANDLE, ACME) == {Reason.SESSION_NOT_FOUND}
    assert reasons(store, STRANGE_ID, STRANGE_HANDLE, OTHER) == {Reason.SESSION_LOST}


def test_the_handle_of_a_restored_session_is_taken_before_it_is_added(store: SessionStore) -> None:
    session = Session(STRANGE_ID, STRANGE_HANDLE, SPEC, BlockPool(10), ACME, OPTIONS)
    store.restore(session)
    assert store.has("0badcafe-" + 32 * "8", STRANGE_HANDLE)
    store.abandon(session)
    assert not store.has(STRANGE_ID, STRANGE_HANDLE)


def test_a_session_counts_from_when_it_is_created(store: SessionStore) -> None:
    tenant = Tenant("small", TenantLimits(max_sessions=1))
    session = store.create(SPEC, BlockPool(10), tenant, OPTIONS)
    with pytest.raises(OctavoError) as refused:
        store.create(SPEC, BlockPool(10), tenant, OPTIONS)
    assert refused.value.reason is Reason.TENANT_LIMIT
    opened(store)
    with pytest.raises(OctavoError) as refused:
        opened(store)
    assert refused.value.reason is Reason.SESSION_LIMIT
    store.abandon(session)
    assert tenant.num_sessions == 0
    assert opened(store, tenant)


def test_a_reservation_that_cannot_be_had_changes_nothing(store: SessionStore) -> None:
    tenant, pool = Tenant("acme"), BlockPool(3)
    for num_tokens, reason in ((97, Reason.CONTEXT_TOO_LONG), (49, Reason.CONTEXT_TOO_LONG)):
        with pytest.raises(OctavoError) as refused:
            store.create(SPEC, pool, tenant, SessionOptions(60.0, reserve_tokens=num_tokens))
        assert refused.value.reason is reason
    store.create(SPEC, pool, tenant, SessionOptions(60.0, reserve_tokens=17))
    with pytest.raises(OctavoError) as refused:
        store.create(SPEC, pool, tenant, SessionOptions(60.0, reserve_tokens=48))
    assert refused.value.reason is Reason.OUT_OF_BLOCKS
    assert (pool.num_free, tenant.num_sessions, tenant.num_tokens) == (1, 1, 32)
