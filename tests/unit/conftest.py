"""Small models for the unit tests."""

from collections.abc import Callable

import pytest

from octavo_server.block_pool import BlockPool
from octavo_server.model import ModelSpec
from octavo_server.session import Session, SessionOptions
from octavo_server.tenant import Tenant

LEASE_S = 60.0


def make_spec(**changes: object) -> ModelSpec:
    """Return a model of 2 layers, 4 / 2 heads of 8, blocks of 16 and contexts to 96, with changes."""
    num_layers = int(str(changes.get("num_layers", 2)))
    values: dict[str, object] = {
        "name": "tiny",
        "num_layers": num_layers,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "block_size": 16,
        "max_context": 96,
        "sm_scale": (0.35,) * num_layers,
        "window": (0,) * num_layers,
        "soft_cap": (0.0,) * num_layers,
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def make_session(
    spec: ModelSpec,
    pool: BlockPool,
    *,
    handle: int = 1,
    tenant: Tenant | None = None,
    reserve_tokens: int = 0,
    lease_s: float = LEASE_S,
) -> Session:
    """Return an empty session, without the blocks that it reserves."""
    options = SessionOptions(lease_s, reserve_tokens=reserve_tokens)
    return Session(f"s{handle}", handle, spec, pool, tenant or Tenant(""), options)


@pytest.fixture
def spec_of() -> Callable[..., ModelSpec]:
    """A maker of models."""
    return make_spec
