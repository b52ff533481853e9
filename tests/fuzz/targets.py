"""All targets of the fuzzer, and the choice between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from google.protobuf.message import DecodeError, Message

from octavo import v1
from octavo.v1.tensor_fields import encode_field, only_field
from tests.fuzz.call_targets import fuzz_calls, fuzz_trace_parent
from tests.fuzz.file_targets import (
    fuzz_authorization,
    fuzz_session_file,
    fuzz_session_header,
    fuzz_tenants,
)
from tests.fuzz.message_targets import (
    REQUESTS,
    fuzz_append,
    fuzz_append_fields,
    fuzz_requests,
    fuzz_step,
    fuzz_step_fields,
)
from tests.fuzz.mutation import mutated, mutated_bytes

TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "step": fuzz_step,
    "append": fuzz_append,
    "step fields": fuzz_step_fields,
    "append fields": fuzz_append_fields,
    "requests": fuzz_requests,
    "calls": fuzz_calls,
    "session file": fuzz_session_file,
    "session header": fuzz_session_header,
    "tenants": fuzz_tenants,
    "authorization": fuzz_authorization,
    "trace parent": fuzz_trace_parent,
}

_BY_BYTES = frozenset(
    ["append fields", "session file", "session header", "tenants", "authorization", "trace parent"]
)
"""Targets whose inputs are no messages, or which are about how one is written."""

_SHARE_OF_OUTER_CHANGES = 0.1
_TARGETS = tuple(TARGETS.values())


def run_target(data: bytes) -> None:
    """Run the target that the first byte chooses on the bytes behind it."""
    if data:
        _TARGETS[data[0] % len(_TARGETS)](data[1:])


def changed(data: bytes, rng: random.Random) -> bytes:
    """Return another input for the same target: with changed fields, or changed bytes where those matter."""
    target = list(TARGETS)[data[0] % len(_TARGETS)]
    if target in _BY_BYTES:
        return data[:1] + mutated_bytes(data[1:], rng)
    if target == "step fields":
        return data[:1] + _changed_step(data[1:], rng)
    message_type = _message_type(target, rng)
    try:
        message = message_type.FromString(data[1:])
    except DecodeError:
        message = message_type()
    return data[:1] + mutated(message, rng)


def _changed_step(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a step, most often inside the field that holds it, whose length then fits."""
    try:
        start, end = only_field(data, v1.DecodeRequest.STEP_FIELD_NUMBER)
    except ValueError:
        return mutated_bytes(data, rng)
    if rng.random() < _SHARE_OF_OUTER_CHANGES:
        return mutated_bytes(data, rng)
    inner = mutated_bytes(data[start:end], rng)
    return b"".join(encode_field(v1.DecodeRequest.STEP_FIELD_NUMBER, [inner]))


def _message_type(target: str, rng: random.Random) -> type[Message]:
    if target.startswith("step"):
        return v1.DecodeRequest
    if target.startswith("append"):
        return v1.AppendRequest
    return rng.choice(REQUESTS)
