"""Whatever the configuration says, it is loaded or refused with a list of mistakes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_server.config import ConfigError, load_config
from octavo_server.config_keys import ModelKeys, ServerConfig
from octavo_server.config_schema import keys_of

TINY = "name=tiny,num_layers=2,num_q_heads=4,num_kv_heads=2,head_dim=64,max_context=512"
KEYS = [key.name for key in (*keys_of(ServerConfig), *keys_of(ModelKeys))]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("50%")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
SECTIONS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=6)


def ends_well(path: Path | None, *models: str, **flags: str) -> None:
    """Load a configuration; only a list of mistakes may come instead."""
    with suppress(ConfigError):
        load_config(path, flags, models)


def test_deep_nesting_ends_well(tmp_path: Path) -> None:
    (tmp_path / "octavo.yaml").write_text("[" * 5000)
    ends_well(tmp_path / "octavo.yaml")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_end_well(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "octavo.yaml").write_bytes(content)
    ends_well(tmp_path / "octavo.yaml")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(server=SECTIONS, models=st.lists(SECTIONS, max_size=2) | VALUES)
def test_any_yaml_ends_well(tmp_path: Path, server: dict[str, object], models: object) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text(yaml.safe_dump({**server, "models": models}), encoding="utf-8")
    ends_well(path)


@settings(deadline=None)
@given(key=st.sampled_from(KEYS), value=st.text(max_size=20))
def test_any_flag_ends_well(key: str, value: str) -> None:
    ends_well(None, f"{TINY},{key}={value}", value, **{key: value})
