"""Values that cannot be stored or attended with: the first is named, and nobody else notices."""

from __future__ import annotations

import numpy as np
import pytest

from octavo_server.backends.base import NO_OFFENCE, Backend, Offence, RaggedBatch
from tests.kernels.draws import BFLOAT16, DTYPES, FLOAT16, FLOAT32, Inputs
from tests.kernels.rig import Entry, Rig, make_spec

BAD_VALUES = (np.nan, np.inf, -np.inf)
NUM_TOKENS = 5


class Scene:
    """Three entries of one batch, of which the middle one will offend.

    Attributes:
        rig: Two sessions with 20 and 30 tokens in layer 0; the second also has layer 1.
        entries: 3, 5 and 4 tokens; the middle one is of the first session.
        inputs: Of those entries.
    """

    def __init__(self, backend: Backend, head_dim: int, dtype: np.dtype[np.generic]) -> None:
        spec = make_spec(num_kv_heads=3, group_size=2, head_dim=head_dim)
        self.rig = Rig(backend, spec, num_blocks=12)
        victim, neighbour = self.rig.open(64), self.rig.open(64)
        self.rig.fill(victim, 0, 20)
        self.rig.fill(neighbour, 0, 30)
        self.entries = [
            Entry(neighbour, 0, 3),
            Entry(victim, 0, NUM_TOKENS),
            Entry(neighbour, 1, 4),
        ]
        self.inputs = self.rig.draw(self.entries, dtype=dtype)

    def run(self) -> list[Offence | None]:
        """Run the step as the engine does; return the first offence of each entry."""
        rig, (q, k, v) = self.rig, self.inputs
        batch = rig.batch(self.entries, appends=True)
        stored = rig.backend.int8_kv_append_paged(rig.cache, batch, k, v)
        output = rig.backend.int8_paged_decode_attention(rig.cache, batch, q, return_lse=True)
        for entry_idx in (0, 2):
            entry = self.entries[entry_idx]
            rows = slice(*batch.token_starts[entry_idx : entry_idx + 2])
            rig.oracle(entry.session, entry.layer).append(k[rows], v[rows])
            rig.verify_entry(entry, batch, entry_idx, q, output)
            rig.verify_stored(entry.session, entry.layer)
        assert stored.dtype == output.offences.dtype == np.int64
        return [Offence.unpack(code) for code in np.minimum(stored, output.offences).tolist()]

    def row(self, token_idx: int) -> int:
        """Return the row of a token of the middle entry."""
        return 3 + token_idx

    def verify_victim_recovers(self) -> None:
        """Step the middle entry again with good values, at the position that it still has."""
        entries = [Entry(self.entries[1].session, 0, NUM_TOKENS)]
        self.rig.step(entries, self.rig.draw(entries, dtype=self.inputs.q.dtype))
        self.rig.verify_stored(entries[0].session, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("field", ["k", "v", "q"])
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_non_finite_is_named_and_neighbours_are_unharmed(
    backend: Backend, bad: float, field: str, dtype: np.dtype[np.generic]
) -> None:
    scene = Scene(backend, 64, dtype)
    getattr(scene.inputs, field)[scene.row(3), 2, 63] = bad
    expected = Offence(field, token_idx=3, head_idx=2, is_overflow=False)
    assert scene.run() == [None, expected, None]
    scene.verify_victim_recovers()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("field", ["k", "v"])
@pytest.mark.parametrize("bad", [65536.0 * 127, -1e38])
def test_overflow_is_named_and_neighbours_are_unharmed(
    backend: Backend, bad: float, field: str, dtype: np.dtype[np.generic]
) -> None:
    scene = Scene(backend, 128, dtype)
    getattr(scene.inputs, field)[scene.row(4), 1, 0] = bad
    expected = Offence(field, token_idx=4, head_idx=1, is_overflow=True)
    assert scene.run() == [None, expected, None]
    scene.verify_victim_recovers()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", [60000, 3e37, 3e38])
def test_large_finite_queries_do_not_offend(
    backend: Backend, large: float, dtype: np.dtype[np.generic]
) -> None:
    scene = Scene(backend, 64, dtype)
    large = min(large, 65504) if dtype == FLOAT16 else large
    scene.inputs.q[scene.row(0), :, ::2] = large
    scene.inputs.q[scene.row(0), :, 1::2] = -large
    assert scene.run() == [None, None, None]


@pytest.mark.parametrize("head_dim", [8, 72, 96, 256])
@pytest.mark.parametrize("field", ["k", "v", "q"])
def test_every_element_of_a_row_is_checked(backend: Backend, head_dim: int, field: str) -> None:
    """One entry for each element; its token offends there."""
    spec = make_spec(num_kv_heads=1, group_size=1, head_dim=head_dim)
    rig = Rig(backend, spec, num_blocks=head_dim)
    entries = [Entry(rig.open(1), 0) for _ in range(head_dim)]
    inputs = rig.draw(entries, dtype=FLOAT16)
    getattr(inputs, field)[range(head_dim), 0, range(head_dim)] = np.nan
    batch = rig.batch(entries, appends=True)
    stored = backend.int8_kv_append_paged(rig.cache, batch, inputs.k, inputs.v)
    output = backend.int8_paged_decode_attention(rig.cache, batch, inputs.q, return_lse=False)
    first = np.minimum(stored, output.offences)
    expected = Offence(field, token_idx=0, head_idx=0, is_overflow=False)
    assert [Offence.unpack(code) for code in first.tolist()] == [expected] * head_dim


def offence_of(rig: Rig, batch: RaggedBatch, inputs: Inputs) -> Offence | None:
    """Append and attend with a batch of one entry; return its first offence."""
    stored = rig.backend.int8_kv_append_paged(rig.cache, batch, inputs.k, inputs.v)
    output = rig.backend.int8_paged_decode_attention(rig.cache, batch, inputs.q, return_lse=False)
    return Offence.unpack(min(int(stored[0]), int(output.offences[0])))


def test_the_first_offence_wins(backend: Backend) -> None:
    """In the order k, v, q, then token, then head; each step adds one that comes earlier."""
    scene = Scene(backend, 64, FLOAT32)
    q, k, v = scene.inputs
    batch = scene.rig.batch(scene.entries, appends=True)
    plants = [
        (q, 4, 5, np.nan, Offence("q", 4, 5, False)),
        (q, 4, 0, np.inf, Offence("q", 4, 0, False)),
        (q, 1, 5, np.nan, Offence("q", 1, 5, False)),
        (v, 4, 2, 1e38, Offence("v", 4, 2, True)),
        (v, 4, 1, np.nan, Offence("v", 4, 1, False)),
        (v, 0, 2, np.nan, Offence("v", 0, 2, False)),
        (k, 4, 2, np.nan, Offence("k", 4, 2, False)),
        (k, 4, 0, 1e38, Offence("k", 4, 0, True)),
        (k, 0, 2, np.inf, Offence("k", 0, 2, False)),
        (k, 0, 0, 1e38, Offence("k", 0, 0, True)),
        (k, 0, 0, np.nan, Offence("k", 0, 0, False)),
    ]
    for step, (tensor, token_idx, head_idx, value, expected) in enumerate(plants):
        tensor[scene.row(token_idx), head_idx, 10 + step] = value
        stored = scene.rig.backend.int8_kv_append_paged(scene.rig.cache, batch, k, v)
        output = scene.rig.backend.int8_paged_decode_attention(
            scene.rig.cache, batch, q, return_lse=False
        )
        first = np.minimum(stored, output.offences)
        assert Offence.unpack(int(first[1])) == expected
        assert first[[0, 2]].tolist() == [NO_OFFENCE, NO_OFFENCE]


def test_every_entry_has_its_own_offence(backend: Backend) -> None:
    scene = Scene(backend, 64, FLOAT32)
    batch = scene.rig.batch(scene.entries, appends=True)
    _, k, v = scene.inputs
    k[2, 1, 5] = np.nan  # entry 0, token 2
    v[3, 0, 0] = np.inf  # entry 1, token 0
    v[11, 2, 7] = 1e38  # entry 2, token 3
    stored = scene.rig.backend.int8_kv_append_paged(scene.rig.cache, batch, k, v)
    assert [Offence.unpack(code) for code in stored.tolist()] == [
        Offence("k", 2, 1, False),
        Offence("v", 0, 0, False),
        Offence("v", 3, 2, True),
    ]


def test_long_entries_find_the_first_of_many(backend: Backend) -> None:
    """Rows of one entry are spread over threads, the first still wins."""
    rig = Rig(backend, make_spec(), num_blocks=40)
    entries = [Entry(rig.open(600), 0, 600)]
    inputs = rig.draw(entries, dtype=FLOAT16)
    batch = rig.batch(entries, appends=True)
    inputs.q[[599, 401, 250], 3, 0] = np.nan
    assert offence_of(rig, batch, inputs) == Offence("q", 250, 3, is_overflow=False)
    inputs.v[[590, 333], 1, 0] = np.nan
    assert offence_of(rig, batch, inputs) == Offence("v", 333, 1, is_overflow=False)
    inputs.k[[598, 597], 1, 0] = np.nan
    assert offence_of(rig, batch, inputs) == Offence("k", 597, 1, is_overflow=False)
