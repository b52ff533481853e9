"""The server's and the client's table of reasons name the same reasons with the same metadata."""

from typing import get_type_hints

import pytest

from octavo_client import REASONS as CLIENT_REASONS
from octavo_client import RefusedError
from octavo_server.errors import REASONS, OctavoError, Reason

OWN_FIELDS = set(get_type_hints(RefusedError))
COUNTS = {
    "token",
    "head",
    "layer",
    "length",
    "start_pos",
    "requested",
    "limit",
    "timeout_ms",
    "lease_ms",
}


def test_both_sides_know_the_same_reasons() -> None:
    assert set(REASONS) == set(Reason) == set(CLIENT_REASONS)


@pytest.mark.parametrize("reason", Reason)
def test_every_metadata_key_is_a_typed_field(reason: Reason) -> None:
    hints = get_type_hints(CLIENT_REASONS[reason])
    fields = {name: kind for name, kind in hints.items() if name not in OWN_FIELDS}
    assert set(fields) == set(REASONS[reason].metadata)
    for name, kind in fields.items():
        is_count = name in COUNTS or name.startswith(("num_", "max_")) or name.endswith("_blocks")
        assert kind is (int if is_count else str), name


def test_a_refusal_carries_exactly_its_metadata() -> None:
    with pytest.raises(TypeError, match="carries"):
        OctavoError(Reason.MODEL_NOT_FOUND, "no such model", modle="tiny")
