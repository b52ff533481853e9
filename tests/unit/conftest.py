"""Small models for the unit tests."""

from collections.abc import Callable

import pytest

from octavo_server.model import ModelSpec


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


@pytest.fixture
def spec_of() -> Callable[..., ModelSpec]:
    """A maker of models."""
    return make_spec
