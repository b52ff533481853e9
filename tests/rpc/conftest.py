"""A real server on port 0 with small limits, one a test module, and a wire to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octavo_server import server as server_module
from octavo_server.backends.base import Backend
from octavo_server.backends.registry import create_backend
from octavo_server.config_keys import ModelConfig, ServerConfig
from octavo_server.model import ModelSpec
from octavo_server.server import Server
from tests.rpc.gated_backend import GatedBackend
from tests.rpc.wire import (
    HEAD_DIM,
    MODEL,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    SM_SCALE,
    WINDOWED_MODEL,
    Wire,
)

NUM_BLOCKS = 12


def tiny_model(name: str, window: int) -> ModelConfig:
    """Return a model of 12 blocks of 16 tokens and contexts to 160."""
    spec = ModelSpec(
        name=name,
        num_layers=NUM_LAYERS,
        num_q_heads=NUM_Q_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=16,
        max_context=160,
        sm_scale=(SM_SCALE,) * NUM_LAYERS,
        window=(window,) * NUM_LAYERS,
        soft_cap=(0.0,) * NUM_LAYERS,
    )
    return ModelConfig(spec, num_blocks=NUM_BLOCKS)


@contextmanager
def serving(**changes: Any) -> Iterator[Wire]:
    """Run a server whose backend can be held and broken."""
    values: dict[str, Any] = {
        "port": 0,
        "backend": "cpu",
        "num_threads": 1,
        "max_sessions": 6,
        "max_streams": 4,
        "max_unary_calls": 2,
        "max_steps_in_flight": 4,
        "max_message_bytes": 256 * 1024,
        "drain_timeout_s": 20.0,
        "models": (tiny_model(MODEL, 0), tiny_model(WINDOWED_MODEL, 8)),
    }
    gates: list[GatedBackend] = []

    def create_gated(name: str, num_threads: int, *, pin_threads: bool) -> Backend:
        gates.append(GatedBackend(create_backend(name, num_threads, pin_threads=pin_threads)))
        return gates[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "create_backend", create_gated)
        server = Server(ServerConfig(**(values | changes)))
    server.start()
    wire = Wire(server, gates[0])
    try:
        yield wire
    finally:
        gates[0].open()
        wire.channel.close()
        server.stop()


@pytest.fixture(scope="module")
def module_wire() -> Iterator[Wire]:
    """A server for the whole module."""
    with serving() as wire:
        yield wire


@pytest.fixture
def wire(module_wire: Wire) -> Iterator[Wire]:
    """The module's server, empty before the test and seen to be empty again after it closed what it left."""
    yield module_wire
    module_wire.backend.open()
    for session in module_wire.sessions():
        module_wire.close(session)
    for model in (MODEL, WINDOWED_MODEL):
        assert module_wire.num_free_blocks(model) == NUM_BLOCKS, "a block leaked"
