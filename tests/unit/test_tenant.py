"""Tenants: limits of their own, defaults, and counts that follow the blocks."""

import pytest

from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason
from octavo_server.session import AppendRecord
from octavo_server.tenant import Tenant, TenantLimits, Tenants
from tests.unit.conftest import make_session, make_spec

SPEC = make_spec()


def test_a_name_is_always_the_same_tenant() -> None:
    tenants = Tenants(TenantLimits(max_sessions=3))
    assert tenants.get("acme") is tenants.get("acme")
    assert tenants.get("acme") is not tenants.get("other")
    assert tenants.get("acme").limits.max_sessions == 3


def test_limits_of_its_own_come_before_the_defaults() -> None:
    tenants = Tenants(TenantLimits(max_sessions=3, max_tokens=64))
    tenants.set_limits("acme", TenantLimits(max_sessions=1))
    assert tenants.get("acme").limits == TenantLimits(max_sessions=1, max_tokens=64)


def test_sessions_are_limited_and_counted() -> None:
    tenant = Tenant("acme", TenantLimits(max_sessions=1))
    tenant.add_session()
    with pytest.raises(
        OctavoError, match="tenant 'acme' may have at most 1 open sessions"
    ) as refused:
        tenant.add_session()
    assert refused.value.reason is Reason.TENANT_LIMIT
    tenant.remove_session()
    tenant.add_session()


@pytest.mark.parametrize(
    "limits",
    [TenantLimits(max_tokens=2 * 16), TenantLimits(max_bytes=2 * SPEC.block_bytes + 1)],
    ids=["tokens", "bytes"],
)
def test_blocks_over_a_limit_are_not_taken(limits: TenantLimits) -> None:
    tenant, pool = Tenant("acme", limits), BlockPool(10)
    session = make_session(SPEC, pool, tenant=tenant)
    session.admit_append(0, AppendRecord(0, 32, 7))
    session.confirm(0)
    assert tenant.stats()[2:] == (32, 2 * SPEC.block_bytes)
    with pytest.raises(OctavoError) as refused:
        session.admit_append(0, AppendRecord(32, 1, 8))
    assert refused.value.reason is Reason.TENANT_LIMIT
    assert (pool.num_free, session.lengths) == (8, [32, 0])
    session.truncate(16)
    assert tenant.num_tokens == 16
    session.close()
    assert tenant.stats()[2:] == (0, 0)


def test_a_refused_append_gives_back_what_it_counted() -> None:
    tenant, pool = Tenant("acme"), BlockPool(10)
    session = make_session(SPEC, pool, tenant=tenant)
    session.admit_append(0, AppendRecord(0, 40, 7))
    assert tenant.num_tokens == 48
    session.refuse(0)
    assert (tenant.num_tokens, tenant.num_bytes, pool.num_free) == (0, 0, 10)


def test_what_the_pool_refuses_is_not_counted() -> None:
    tenant, pool = Tenant("acme"), BlockPool(1)
    session = make_session(SPEC, pool, tenant=tenant)
    session.max_tokens = 96
    with pytest.raises(OctavoError) as refused:
        session.admit_append(0, AppendRecord(0, 40, 7))
    assert refused.value.reason is Reason.OUT_OF_BLOCKS
    assert tenant.num_tokens == 0
