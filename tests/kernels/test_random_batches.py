"""Hypothesis over models and ragged batches: whatever is stored and asked, the oracle agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_server.backends.base import Backend
from octavo_server.model import BLOCK_SIZES, ModelSpec
from tests.kernels.draws import DTYPES
from tests.kernels.rig import Entry, Rig, make_spec

MAX_CACHED = 150


@dataclass(frozen=True, slots=True)
class Plan:
    """One session of a random batch.

    Attributes:
        cached_lens: Tokens of layer 0 and layer 1 before the steps.
        steps: (layer, num_tokens) of each step that the session takes part in; None = it does not.
    """

    cached_lens: tuple[int, int]
    steps: tuple[tuple[int, int] | None, ...]

    def capacity(self) -> int:
        """Return the tokens that the session may come to."""
        return max(self.cached_lens) + sum(step[1] for step in self.steps if step)


plans = st.builds(
    Plan,
    st.tuples(st.integers(0, MAX_CACHED), st.integers(0, MAX_CACHED)),
    st.tuples(*[st.none() | st.tuples(st.integers(0, 1), st.integers(1, 20))] * 3),
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Draw a model of two layers with any options."""
    num_kv_heads, group_size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    pair = st.tuples
    options: dict[str, Any] = {
        "block_size": draw(st.sampled_from(BLOCK_SIZES)),
        "window": draw(pair(*[st.just(0) | st.integers(1, 200)] * 2)),
        "soft_cap": draw(pair(*[st.just(0.0) | st.floats(0.5, 60)] * 2)),
        "deterministic": draw(st.booleans()),
    }
    if draw(st.booleans()):
        shape = (2, num_kv_heads * group_size)
        options["sinks"] = np.linspace(-4, 6, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    return make_spec(num_kv_heads, group_size, 8 * draw(st.integers(1, 32)), **options)


@settings(max_examples=30, deadline=None)
@given(
    spec=specs(),
    sessions=st.lists(plans, min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_random_batches(
    backend: Backend, spec: ModelSpec, sessions: list[Plan], dtype: np.dtype[Any], seed: int
) -> None:
    num_blocks = sum(-(-plan.capacity() // spec.block_size) for plan in sessions) + 2
    rig = Rig(backend, spec, num_blocks, seed)
    for plan in sessions:
        session = rig.open(plan.capacity())
        for layer, cached_len in enumerate(plan.cached_lens):
            rig.fill(session, layer, cached_len, dtype=dtype)
    for turn in range(3):
        entries = [
            Entry(session, *step)
            for session, plan in enumerate(sessions)
            if (step := plan.steps[turn]) is not None
        ]
        if entries:
            rig.step(entries, rig.draw(entries, dtype=dtype))
            for entry in entries:
                rig.verify_stored(entry.session, entry.layer)
