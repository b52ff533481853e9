"""ExportSession and ImportSession on the wire: whole and exact, or refused with nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import grpc
import pytest
import safetensors.numpy

from octavo import v1
from octavo_server import session_file, transfer_calls
from octavo_server.config_keys import ModelConfig
from octavo_server.errors import OctavoError
from tests.rpc.conftest import NUM_BLOCKS, serving, tiny_model
from tests.rpc.wire import (
    CALL_TIMEOUT_S,
    MODEL,
    NUM_LAYERS,
    WINDOWED_MODEL,
    Caching,
    Wire,
    refusal_of_call,
    unharmed,
)
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut what these tests move into many pieces and messages."""
    monkeypatch.setattr(session_file, "PIECE_BYTES", 600)
    monkeypatch.setattr(transfer_calls, "CHUNK_BYTES", 500)


def filled(wire: Wire, *lengths: int, model: str = MODEL) -> Caching:
    """Open a session with tokens in its layers."""
    caching = wire.open(model)
    for layer, length in enumerate(lengths):
        wire.append(caching, layer, length)
    return caching


def exported(wire: Wire, caching: Caching) -> bytes:
    """Export a session."""
    request = v1.ExportSessionRequest(session_id=caching.session_id)
    responses = wire.stub.ExportSession(request, timeout=CALL_TIMEOUT_S)
    chunks = [response.data for response in responses]
    assert max(map(len, chunks)) <= transfer_calls.CHUNK_BYTES
    return b"".join(chunks)


def messages(data: bytes, size: int = 700, **options: Any) -> Iterator[v1.ImportSessionRequest]:
    """Cut a file into messages."""
    yield v1.ImportSessionRequest(data=data[:size], **options)
    for start in range(size, len(data), size):
        yield v1.ImportSessionRequest(data=data[start : start + size])


def imported(wire: Wire, data: bytes, like: Caching, **options: Any) -> tuple[Caching, v1.Session]:
    """Import a session, which must go on as `like` would."""
    requests = messages(data, **options)
    session = wire.stub.ImportSession(requests, timeout=CALL_TIMEOUT_S).session
    copy = Caching(session.session_id, session.session_handle)
    for layer in range(NUM_LAYERS):
        copy.layers[layer] = deepcopy(like.layers[layer])
    assert wire.lengths(copy) == [copy.length(layer) for layer in range(NUM_LAYERS)]
    return copy, session


def refused(wire: Wire, requests: Iterator[v1.ImportSessionRequest], reason: str) -> dict[str, str]:
    """Import what must be refused, and leave nothing behind; return the refusal's metadata."""
    before = wire.num_free_blocks(), len(wire.sessions())
    with pytest.raises(grpc.RpcError) as caught:
        wire.stub.ImportSession(requests, timeout=CALL_TIMEOUT_S)
    refusal = refusal_of_call(caught.value)
    assert refusal.reason == reason, refusal
    assert (wire.num_free_blocks(), len(wire.sessions())) == before
    return refusal.metadata


@pytest.mark.parametrize("lengths", [(40, 33), (0, 0), (16, 1)])
def test_an_imported_session_goes_on_where_the_exported_one_was(
    wire: Wire, lengths: tuple[int, int]
) -> None:
    caching = wire.open()
    for layer, length in enumerate(lengths):
        if length:
            wire.append(caching, layer, length)
    copy, session = imported(wire, exported(wire, caching), caching)
    assert session.session_id != caching.session_id
    assert session.session_handle != caching.handle
    for layer in range(NUM_LAYERS):
        wire.append(copy, layer, 3)
        wire.append(caching, layer, 2)


def test_other_backends_and_block_sizes_go_on_with_it(wire: Wire) -> None:
    caching = filled(wire, 37, 50)
    data = exported(wire, caching)
    spec = dataclasses.replace(tiny_model(MODEL, 0).spec, block_size=64)
    with serving(backend="reference", models=(ModelConfig(spec, num_blocks=2),)) as other:
        copy, _ = imported(other, data, caching)
        for layer in range(NUM_LAYERS):
            other.append(copy, layer, 5)
        back, _ = imported(wire, exported(other, copy), copy)
    wire.append(back, 0, 1)


def test_the_file_is_safetensors(wire: Wire) -> None:
    tensors = safetensors.numpy.load(exported(wire, filled(wire, 20, 3)))
    assert tensors["layers.0.k_codes"].shape == (20, 2, 16)
    assert tensors["layers.1.v_scales"].shape == (3, 2)


def test_a_step_that_was_answered_before_the_export_is_a_replay_after_it(wire: Wire) -> None:
    caching = wire.open()
    step = wire.step((caching, 0, 4))
    answer = wire.run(step)
    wire.check(step, answer, [(caching, 0)])
    copy, _ = imported(wire, exported(wire, caching), caching)
    step.session_handles[0] = copy.handle
    assert wire.run(step).out == answer.out
    assert wire.lengths(copy) == [4, 0]


def test_options_travel_unless_others_are_asked_for(wire: Wire) -> None:
    request = v1.OpenSessionRequest(
        model=MODEL,
        lease_ms=123_000,
        disconnect_policy=v1.DISCONNECT_POLICY_CLOSE,
        reserve_tokens=20,
    )
    opened = wire.stub.OpenSession(request, timeout=CALL_TIMEOUT_S).session
    caching = Caching(opened.session_id, opened.session_handle)
    data = exported(wire, caching)
    _, same = imported(wire, data, caching)
    assert (same.lease_ms, same.disconnect_policy) == (123_000, v1.DISCONNECT_POLICY_CLOSE)
    assert (same.reserved_tokens, same.num_blocks) == (20, 2)
    _, other = imported(
        wire,
        data,
        caching,
        lease_ms=5_000,
        disconnect_policy=v1.DISCONNECT_POLICY_KEEP,
        reserve_tokens=50,
    )
    assert (other.lease_ms, other.disconnect_policy) == (5_000, v1.DISCONNECT_POLICY_KEEP)
    assert (other.reserved_tokens, other.num_blocks) == (50, 4)


def test_an_import_is_idempotent_by_its_request_id(wire: Wire) -> None:
    caching = filled(wire, 5)
    data = exported(wire, caching)
    _, first = imported(wire, data, caching, request_id="again")
    _, second = imported(wire, data, caching, request_id="again")
    assert first.session_id == second.session_id
    assert len(wire.sessions()) == 2


def test_appends_go_on_while_a_session_is_exported_and_are_not_in_it(wire: Wire) -> None:
    caching = filled(wire, 40, 40)
    like = Caching("", 0, [deepcopy(cache) for cache in caching.layers])
    request = v1.ExportSessionRequest(session_id=caching.session_id)
    responses = wire.stub.ExportSession(request, timeout=CALL_TIMEOUT_S)
    data = next(responses).data
    wire.append(caching, 0, 9)
    data += b"".join(response.data for response in responses)
    imported(wire, data, like)


@pytest.mark.parametrize(
    ("call", "reason"),
    [("TruncateSession", "POSITION_MISMATCH"), ("CloseSession", "SESSION_NOT_FOUND")],
)
def test_an_export_ends_with_the_truncate_or_close_of_its_session(
    wire: Wire, call: str, reason: str
) -> None:
    caching = filled(wire, 100, 100)
    started = wire.server._engine.transfers.export(
        caching.session_id, wire.server._engine._tenants.get("")
    )
    values = started.values(lambda future: future.result(CALL_TIMEOUT_S))
    next(values)
    request = getattr(v1, f"{call}Request")(session_id=caching.session_id)
    getattr(wire.stub, call)(request, timeout=CALL_TIMEOUT_S)
    with pytest.raises(OctavoError) as caught:
        list(values)
    assert caught.value.reason == reason


def test_a_session_that_is_not_there_cannot_be_exported(wire: Wire) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        exported(wire, Caching("nobody", 0))
    assert refusal_of_call(caught.value).reason == "SESSION_NOT_FOUND"


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[:-300], "cut off"),
        (lambda data: data[:-300] + bytes([data[-300] ^ 1]) + data[-299:], "checksum"),
        (lambda data: data + b"x", "after its end"),
        (lambda data: b"garbage!" + data, "header"),
        (lambda data: b"", "cut off"),
    ],
)
def test_what_is_damaged_is_refused_whole(wire: Wire, damage: Any, cause: str) -> None:
    with unharmed(wire) as (victim, _):
        data = damage(exported(wire, victim))
        assert cause in refused(wire, messages(data), "SNAPSHOT_INVALID")["cause"]


def test_a_call_without_a_message_is_refused(wire: Wire) -> None:
    assert refused(wire, iter(()), "MALFORMED_MESSAGE")["field"] == "request"


def test_another_models_session_is_refused(wire: Wire) -> None:
    data = exported(wire, filled(wire, 5))
    metadata = refused(wire, messages(data, model=WINDOWED_MODEL), "SNAPSHOT_INVALID")
    assert metadata["cause"].startswith("its window is not that of model 'windowed'")
    assert refused(wire, messages(data, model="nope"), "MODEL_NOT_FOUND") == {"model": "nope"}


def test_what_there_is_no_room_for_is_refused_before_anything_is_taken(wire: Wire) -> None:
    caching = filled(wire, 100)
    data = exported(wire, caching)
    metadata = refused(wire, messages(data), "OUT_OF_BLOCKS")
    assert metadata == {"required_blocks": "7", "free_blocks": str(NUM_BLOCKS - 7)}
    others = [wire.open() for _ in range(5)]
    refused(wire, messages(data), "SESSION_LIMIT")
    for other in [*others, caching]:
        wire.close(other)
    spec = dataclasses.replace(tiny_model(MODEL, 0).spec, max_context=99)
    with serving(models=(ModelConfig(spec, num_blocks=NUM_BLOCKS),)) as small:
        assert refused(small, messages(data), "CONTEXT_TOO_LONG")["requested"] == "100"


def test_an_importer_that_vanishes_leaves_nothing(wire: Wire) -> None:
    data = exported(wire, filled(wire, 60))
    free = wire.num_free_blocks()

    def half() -> Iterator[v1.ImportSessionRequest]:
        yield v1.ImportSessionRequest(data=data[: len(data) // 2])
        wait_until(lambda: wire.num_free_blocks() == free - 4)
        call.cancel()

    call = wire.stub.ImportSession.future(half(), timeout=CALL_TIMEOUT_S)
    wait_until(call.done)
    wait_until(lambda: wire.num_free_blocks() == free)
    wait_until(lambda: wire.num_free_streams == 4)
    assert len(wire.sessions()) == 1


def test_an_importer_that_falls_silent_is_cancelled(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_calls, "MAX_SILENT_S", 0.05)
    data = exported(wire, filled(wire, 60))
    free = wire.num_free_blocks()

    def half() -> Iterator[v1.ImportSessionRequest]:
        yield v1.ImportSessionRequest(data=data[: len(data) // 2])
        wait_until(call.done)

    call = wire.stub.ImportSession.future(half(), timeout=CALL_TIMEOUT_S)
    wait_until(call.done)
    assert call.code() == grpc.StatusCode.CANCELLED
    wait_until(lambda: wire.num_free_blocks() == free)


def test_an_exporter_that_vanishes_gives_its_stream_back(wire: Wire) -> None:
    caching = filled(wire, 100, 100)
    request = v1.ExportSessionRequest(session_id=caching.session_id)
    responses = wire.stub.ExportSession(request, timeout=CALL_TIMEOUT_S)
    next(responses)
    responses.cancel()
    wait_until(lambda: wire.num_free_streams == 4)
