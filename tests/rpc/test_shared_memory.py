"""Memory shared by a stream's two ends: what goes through it, what is refused, and what is left of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import mmap
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo_client as oc
from octavo import v1
from octavo.v1.tensor_fields import WORTH_CUTTING_BYTES
from octavo_client import _shared_memory
from octavo_server import shared_memory
from octavo_server.shared_memory import Region
from tests.rpc.checked_session import Checked, check_batch, draw_step
from tests.rpc.conftest import NUM_BLOCKS, serving
from tests.rpc.cutting_proxy import cutting_proxy
from tests.rpc.wire import (
    CALL_TIMEOUT_S,
    HEAD_DIM,
    MODEL,
    NUM_KV_HEADS,
    NUM_Q_HEADS,
    Caching,
    Stream,
    Wire,
    refusal_of,
    refusal_of_call,
    unharmed,
)
from tests.waiting import wait_until

REGION_BYTES = 1 << 20
QUICK = oc.Retry(max_attempts=20, initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture(scope="module")
def module_wire() -> Iterator[Wire]:
    """A server that shares memory, for the whole module."""
    with serving(shared_memory=True, shared_memory_bytes=REGION_BYTES) as wire:
        yield wire


@pytest.fixture
def wire(module_wire: Wire) -> Iterator[Wire]:
    """The module's server; when the test is over, its streams are, and nothing of them is mapped or open."""
    yield module_wire
    module_wire.backend.open()
    for session in module_wire.sessions():
        module_wire.close(session)
    assert module_wire.num_free_blocks(MODEL) == NUM_BLOCKS, "a block leaked"
    wait_until(lambda: gc.collect() is not None and held_regions() == [])


@pytest.fixture(autouse=True)
def steps_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small steps of these tests use the region too."""
    monkeypatch.setattr(_shared_memory, "MIN_BYTES", 0)


def held_regions(process: int | str = "self") -> list[str]:
    """Return the regions that a process has mapped or open."""
    mapped = Path(f"/proc/{process}/maps").read_text(encoding="ascii").splitlines()
    opened = []
    for fd in Path(f"/proc/{process}/fd").iterdir():
        try:
            opened.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    return [line for line in (*mapped, *opened) if "memfd:octavo-" in line]


def region_of(client: oc.Client | oc.AsyncClient) -> Any:
    assert client._memory is not None
    return client._memory._region


def in_region(client: oc.Client | oc.AsyncClient, values: Any) -> bool:
    """Whether an answer lies in the region of the client's stream."""
    return np.shares_memory(values, np.frombuffer(region_of(client)._memory, np.uint8))


def in_flight(client: oc.Client) -> list[_shared_memory.PlacedTensors]:
    """Return the steps whose room the server may write to."""
    assert client._memory is not None
    return list(client._memory._in_flight.values())


def sharing(target: str) -> oc.Client:
    """Return a client that has its region."""
    client = oc.Client(target, retry=QUICK, shared_memory=True)
    with client.open_session(MODEL) as session:
        session.decode(0, *draw_step())
        wait_until(lambda: region_of(client))
    return client


@pytest.fixture
def client(wire: Wire) -> Iterator[oc.Client]:
    with sharing(wire.address) as client:
        yield client


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_tensors_and_answers_stay_in_the_region(client: oc.Client, dtype: Any) -> None:
    with client.open_session(MODEL) as session:
        checked = Checked(session)
        for num_tokens in (1, 7):
            tensors = draw_step(num_tokens, dtype)
            result = session.decode(0, *tensors, return_lse=True)
            assert result.out.dtype == dtype
            assert in_region(client, result.out)
            assert in_region(client, result.lse)
            assert not result.out.flags.writeable
            checked.check(0, tensors, result)


def test_arrays_of_any_strides(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        checked, (q, k, v) = Checked(session), draw_step(6)
        q, v = q[::-1], np.broadcast_to(v[:1], v.shape)
        k = np.asfortranarray(k)
        checked.check(0, (q, k, v), session.decode(0, q, k, v))


def test_torch_gets_a_copy(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        checked, tensors = Checked(session), draw_step(3)
        result = session.decode(0, *(torch.from_numpy(rows) for rows in tensors))
        assert not in_region(client, result.out.numpy())
        checked.check(0, tensors, oc.DecodeResult(result.out.numpy(), None))


def test_asyncio(wire: Wire) -> None:
    async def main() -> None:
        async with (
            oc.AsyncClient(wire.address, shared_memory=True) as client,
            await client.open_session(MODEL) as session,
        ):
            checked, has_shared = Checked(session), False
            while not has_shared:
                tensors = draw_step()
                result = await session.decode(0, *tensors)
                checked.check(0, tensors, result)
                has_shared = region_of(client) is not None and in_region(client, result.out)

    asyncio.run(main())


def test_a_batch_with_a_refused_entry(client: oc.Client) -> None:
    with client.open_session(MODEL) as one, client.open_session(MODEL) as two:
        checked, (q, k, v) = [Checked(one), Checked(two)], draw_step(2)
        entries = [oc.Entry(one, 1), oc.Entry(two, 1)]
        check_batch(checked, 1, (q, k, v), client.decode_batch(entries, q, k, v))
        k = k.copy()
        k[1, 0, 0] = np.nan
        batch = client.decode_batch(entries, q, k, v)
        assert set(batch.errors) == {1}
        assert in_region(client, batch.out)
        assert not batch.out[1].any()
        checked[0].check(1, (q[:1], k[:1], v[:1]), batch[0])


def test_the_caller_s_arrays_are_the_caller_s_again(wire: Wire, client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        checked, tensors = Checked(session), draw_step(3)
        sent = tuple(rows.copy() for rows in tensors)
        with wire.busy():
            future = session.submit(0, *sent)
            for rows in sent:
                rows[:] = np.nan
        checked.check(0, tensors, future.result())


def test_a_full_region_sends_steps_in_messages(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        kept = [session.decode(0, *draw_step(160))]
        while in_region(client, kept[-1].out):
            kept.append(session.decode(0, kept[0].out))
        assert len(kept) > 10
        for later in kept[2:]:
            np.testing.assert_array_equal(later.out, kept[1].out)
        kept.clear()
        assert in_region(client, session.decode(0, draw_step(160)[0]).out)


def test_an_answer_outlives_its_client(wire: Wire) -> None:
    with sharing(wire.address) as client, client.open_session(MODEL) as session:
        checked, tensors = Checked(session), draw_step(3)
        result = session.decode(0, *tensors)
        assert in_region(client, result.out)
    checked.check(0, tensors, result)


def test_a_step_cut_off_is_sent_again_without_its_region(wire: Wire) -> None:
    with (
        cutting_proxy(wire.address) as proxy,
        sharing(proxy.target) as client,
        client.open_session(MODEL) as session,
    ):
        checked, first = Checked(session), region_of(client)
        for _ in range(3):
            tensors = draw_step(2)
            wire.backend.shut()
            future = session.submit(0, *tensors)
            assert wire.backend.is_running.wait(10)
            proxy.cut()
            wire.backend.open()
            checked.check(0, tensors, future.result())
            wait_until(lambda: region_of(client) not in (None, first))
            tensors = draw_step(2)
            result = session.decode(0, *tensors)
            assert in_region(client, result.out)
            checked.check(0, tensors, result)
        assert session.refresh().lengths == (12, 0)


def test_room_that_the_server_may_write_to_is_not_used_again(wire: Wire, client: oc.Client) -> None:
    with client.open_session(MODEL) as slow, client.open_session(MODEL) as session:
        wire.backend.shut()
        given_up = slow.submit(0, *draw_step(20), timeout=0.2)
        (start,) = (placed.start for placed in in_flight(client))
        with pytest.raises(oc.StepTimeout):
            given_up.result()
        del given_up
        gc.collect()
        tensors = draw_step(20)
        future = session.submit(0, *tensors)
        assert start not in (placed.start for placed in in_flight(client)[1:])
        wire.backend.open()
        Checked(session).check(0, tensors, future.result())
        wait_until(lambda: in_flight(client) == [])
        assert region_of(client).take(1)[0] == start


def decode_two(wire: Wire) -> None:
    """Have two steps answered; the second is sent when the client knows whether it has a region."""
    with (
        oc.Client(wire.address, shared_memory=True) as client,
        client.open_session(MODEL) as session,
    ):
        checked = Checked(session)
        for _ in range(2):
            tensors = draw_step()
            checked.check(0, tensors, session.decode(0, *tensors))
        assert region_of(client) is None


def test_a_server_that_shares_nothing_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as wire:
        decode_two(wire)
    (record,) = (one for one in caplog.records if one.name == "octavo_client")
    assert record.levelno == logging.WARNING
    assert "shared_memory is off in the server's config" in record.getMessage()


def test_a_server_of_another_process_namespace_is_said_in_the_log(
    wire: Wire, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for process in (os.getppid(), 2**22 + 1):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        decode_two(wire)
    texts = [one.getMessage() for one in caplog.records if one.name == "octavo_client"]
    assert len(texts) == 2
    assert all("in one process namespace, as one user" in text for text in texts)


def test_memory_that_cannot_be_had_is_refused(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with wire.stream() as stream:
        refusal = refusal_of(ask(stream).error)
    assert refusal.metadata == {"cause": "1048576 bytes could not be had: No space left on device"}


def ask(stream: Stream) -> v1.RegionResponse:
    """Ask for the stream's region."""
    stream._requests.put(v1.DecodeRequest(region=v1.RegionRequest()))
    return next(stream.call).region  # type: ignore[no-any-return]


def test_a_stream_has_one_region(wire: Wire) -> None:
    with wire.stream() as stream:
        assert ask(stream).num_bytes == REGION_BYTES
        refusal = refusal_of(ask(stream).error)
        assert refusal.reason == "SHARED_MEMORY_UNAVAILABLE"
        assert len([line for line in held_regions() if line.startswith("/memfd")]) == 2


def tensor(num_heads: int, offset: int | None, num_tokens: int = 1) -> v1.Tensor:
    shape = (num_tokens, num_heads, HEAD_DIM)
    return v1.Tensor(dtype=v1.DATA_TYPE_FLOAT32, shape=shape, region_offset=offset)


def in_region_step(wire: Wire, caching: Caching, **changes: Any) -> v1.Step:
    """Return a step whose tensors lie at 0, 256 and 384, and its answer at 512."""
    placed = {
        "q": tensor(NUM_Q_HEADS, 0),
        "k": tensor(NUM_KV_HEADS, 256),
        "v": tensor(NUM_KV_HEADS, 384),
        "out_region_offset": 512,
        "lse_region_offset": 768,
    }
    return wire.step((caching, 0, 1), **(placed | changes))


@pytest.mark.parametrize("num_tokens", [3, 90])
def test_a_step_may_lie_half_in_its_message(wire: Wire, num_tokens: int) -> None:
    """The message of the larger step is cut by its fields rather than parsed whole."""
    sessions = [wire.open(), wire.open()]
    step = wire.step(*((session, 0, num_tokens) for session in sessions))
    sent = v1.Step()
    sent.CopyFrom(step)
    with wire.stream() as stream:
        memory = _shared_memory._open(ask(stream))
        memory[: len(step.v.data)] = step.v.data
        sent.v.data, sent.v.region_offset = b"", 0
        sent.out_region_offset = out = 1 << 16
        assert (sent.ByteSize() > WORTH_CUTTING_BYTES) == (num_tokens == 90)
        stream.send(sent)
        result = stream.receive()
    assert (result.out.data, result.out.region_offset) == (b"", out)
    result.out.data = memory[out : out + len(step.q.data)]
    wire.check(step, result, [(session, 0) for session in sessions])


def with_data(message: v1.Tensor) -> v1.Tensor:
    message.data = b"x"
    return message


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "past the end": ("q.region_offset", {"q": tensor(NUM_Q_HEADS, REGION_BYTES)}),
    "over the end": ("q.region_offset", {"q": tensor(NUM_Q_HEADS, REGION_BYTES - 192)}),
    "as far as can be": ("q.region_offset", {"q": tensor(NUM_Q_HEADS, 2**64 - 64)}),
    "more than there is": ("q.region_offset", {"q": tensor(NUM_Q_HEADS, 0, num_tokens=2**32 - 1)}),
    "between elements": ("k.region_offset", {"k": tensor(NUM_KV_HEADS, 257)}),
    "over another": ("k.region_offset", {"k": tensor(NUM_KV_HEADS, 192)}),
    "the answer over q": ("out.region_offset", {"out_region_offset": 64}),
    "the answer over the end": ("out.region_offset", {"out_region_offset": REGION_BYTES - 64}),
    "lse over out": ("lse.region_offset", {"lse_region_offset": 704}),
    "lse as far as can be": ("lse.region_offset", {"lse_region_offset": 2**64 - 64}),
    "also in the message": ("q.data", {"q": with_data(tensor(NUM_Q_HEADS, 0))}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_place_is_refused(wire: Wire, case: str) -> None:
    field, changes = WRONG[case]
    with unharmed(wire) as (victim, _), wire.stream() as stream:
        ask(stream)
        stream.send(in_region_step(wire, victim, **changes))
        refusal = refusal_of(stream.receive().error)
    assert (refusal.reason, refusal.metadata["field"]) == ("BAD_TENSOR", field)


def test_offsets_mean_nothing_without_a_region(wire: Wire) -> None:
    with unharmed(wire) as (victim, _):
        for step in (
            in_region_step(wire, victim),
            wire.step((victim, 0, 1), out_region_offset=0),
        ):
            refusal = refusal_of(wire.run(step).error)
            assert refusal.reason == "BAD_TENSOR"
            assert "absent where no region was asked for" in refusal.metadata["expected"]
        append = v1.AppendRequest(
            session_handle=victim.handle, num_tokens=1, k=step.k, v=tensor(NUM_KV_HEADS, 0)
        )
        once = v1.DecodeOnceRequest(step=in_region_step(wire, victim))
        for call, request in ((wire.stub.DecodeOnce, once), (wire.stub.Append, iter([append]))):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=CALL_TIMEOUT_S)
            assert refusal_of_call(refused.value).reason == "BAD_TENSOR"


OFFSETS = st.none() | st.sampled_from([0, 64, 128, 256, 512, 1000, REGION_BYTES - 64, 2**64 - 64])
PLACED = st.builds(
    v1.Tensor,
    data=st.sampled_from([b"", b"", b"\0" * 256]),
    dtype=st.sampled_from([0, 1, 2, 3, 77]),
    shape=st.sampled_from([[1, 4, 16], [1, 2, 16], [2**32 - 1] * 3, [0, 4, 16], [5]]),
    region_offset=OFFSETS,
)


@settings(max_examples=80, deadline=None)
@given(
    tensors=st.fixed_dictionaries({}, optional=dict.fromkeys("qkv", PLACED)),
    out=OFFSETS,
    lse=OFFSETS,
    num_entries=st.sampled_from([0, 1, 1, 2]),
)
def test_any_place_is_answered_or_refused(
    module_wire: Wire,
    tensors: dict[str, v1.Tensor],
    out: int | None,
    lse: int | None,
    num_entries: int,
) -> None:
    session = module_wire.open()
    step = v1.Step(
        step_id=5,
        session_handles=[session.handle] * num_entries,
        layers=range(num_entries),
        start_pos=[0] * num_entries,
        num_tokens=[1] * num_entries,
        return_lse=True,
        out_region_offset=out,
        lse_region_offset=lse,
    )
    for name, tensor in tensors.items():
        getattr(step, name).CopyFrom(tensor)
    with module_wire.stream() as stream:
        ask(stream)
        stream.send(step)
        result = stream.receive()
        if result.HasField("error"):
            refusal_of(result.error)
        stream.send(module_wire.step((session, 1, 1), start_pos=module_wire.lengths(session)[1:]))
        assert not stream.receive().HasField("error")
    module_wire.close(session)


def region_path(region: Region) -> str:
    return f"/proc/{os.getpid()}/fd/{region.fd}"


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(4096)
    yield region
    region.close()


def test_a_client_cannot_change_the_size(region: Region) -> None:
    fd = os.open(region_path(region), os.O_RDWR)
    for size in (0, 1, 4095, 4097):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.posix_fallocate(fd, 0, 8192)
    os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")
def test_another_user_cannot_open_it(region: Region) -> None:
    command = ["/bin/sh", "-c", f"exec 3< {region_path(region)}"]
    assert subprocess.run(command, check=False).returncode == 0
    refused = subprocess.run(command, user=65534, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert re.search("Permission denied|Cannot open", refused.stderr, re.IGNORECASE)


def test_what_a_client_writes_later_is_not_seen(region: Region) -> None:
    fd = os.open(region_path(region), os.O_RDWR)
    with mmap.mmap(fd, 4096) as shared:
        shared[:4] = b"1234"
        read = region.read(shared_memory.Extent("q", 0, 4))
        shared[:4] = b"5678"
        assert read.tobytes() == b"1234"
    os.close(fd)


def test_a_client_opens_nothing_but_the_region(region: Region, tmp_path: Path) -> None:
    found = v1.RegionResponse(
        process_id=os.getpid(), fd=region.fd, name=region.name, num_bytes=region.num_bytes
    )
    _shared_memory._open(found).close()
    unsealed = os.memfd_create("octavo-1")
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    for changes, why in (
        ({"fd": other}, "is another file"),
        ({"name": region.name[:-1]}, "is another file"),
        ({"num_bytes": region.num_bytes - 1}, "is not of 4095 bytes"),
        ({"fd": unsealed, "name": "octavo-1"}, "may shrink"),
    ):
        wrong = v1.RegionResponse()
        wrong.CopyFrom(found)
        wrong.MergeFrom(v1.RegionResponse(**changes))
        with pytest.raises((OSError, ValueError), match=why):
            _shared_memory._open(wrong)
    os.close(unsealed)
    os.close(other)
