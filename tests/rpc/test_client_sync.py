"""The sync client against a real server: what it takes, what it raises, and what it survives."""

from __future__ import annotations

import re
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import octavo_client as oc
from octavo_client import _append, _exchange
from tests.rpc.checked_session import Checked, check_batch, draw, draw_prompt, draw_step
from tests.rpc.conftest import serving
from tests.rpc.cutting_proxy import CuttingProxy, cutting_proxy
from tests.rpc.wire import HEAD_DIM, MODEL, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS, Wire
from tests.waiting import wait_until

QUICK = oc.Retry(max_attempts=20, initial_backoff_s=0.02, max_backoff_s=0.1)


@pytest.fixture
def client(wire: Wire) -> Iterator[oc.Client]:
    with oc.Client(wire.address, retry=QUICK) as client:
        yield client


@pytest.fixture
def proxy(wire: Wire) -> Iterator[CuttingProxy]:
    with cutting_proxy(wire.address) as proxy:
        yield proxy


@pytest.fixture
def shaky(proxy: CuttingProxy) -> Iterator[oc.Client]:
    """A client whose connection the test cuts."""
    with oc.Client(proxy.target, retry=QUICK) as client:
        yield client


def test_the_server_describes_itself(client: oc.Client) -> None:
    info = client.server_info()
    model = info.models[MODEL]
    assert (info.max_message_bytes, info.max_steps_in_flight) == (256 * 1024, 4)
    assert (model.num_layers, model.num_q_heads, model.num_kv_heads, model.head_dim) == (
        NUM_LAYERS,
        NUM_Q_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
    )


def test_a_prompt_and_its_decoding(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        checked = Checked(session)
        prompt = draw_prompt(40)
        reported: list[tuple[int, int]] = []
        session.append(*prompt, progress=lambda *stored: reported.append(stored))
        checked.take_prompt(prompt)
        assert reported == [(80, 80)]
        for num_tokens in (1, 5):
            for layer in range(NUM_LAYERS):
                tensors = draw_step(num_tokens)
                result = session.decode(layer, *tensors, return_lse=True)
                checked.check(layer, tensors, result)
        assert session.lengths == checked.lengths == client.get_session(session.session_id).lengths
    assert client.list_sessions() == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_numpy_of_every_dtype(client: oc.Client, dtype: Any) -> None:
    with client.open_session(MODEL) as session:
        tensors = draw_step(3, dtype)
        result = session.decode(0, *tensors)
        assert result.out.dtype == dtype
        Checked(session).check(0, tensors, result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_of_every_dtype(client: oc.Client, dtype: torch.dtype) -> None:
    with client.open_session(MODEL) as session:
        tensors = draw_step(3)
        q, k, v = (torch.from_numpy(rows).to(dtype) for rows in tensors)
        result = session.decode(0, q, k, v, return_lse=True)
        assert (result.out.dtype, getattr(result.lse, "dtype", None)) == (dtype, torch.float32)
        again = session.decode(0, q)
        assert torch.equal(again.out, result.out)


def test_steps_without_kv_change_nothing(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        session.append(*draw_prompt(20))
        q = draw(4, NUM_Q_HEADS)
        causal, whole = session.decode(0, q), session.decode(0, q, causal=False)
        np.testing.assert_allclose(causal.out[-1], whole.out[-1], atol=1e-5)
        assert not np.allclose(causal.out[0], whole.out[0])
        assert session.lengths == (20, 20)


def test_a_batch_with_a_refused_entry(client: oc.Client) -> None:
    with client.open_session(MODEL) as one, client.open_session(MODEL) as two:
        checked = [Checked(one), Checked(two)]
        tensors = draw_step(2)
        entries = [oc.Entry(one, 1), oc.Entry(two, 1)]
        check_batch(checked, 1, tensors, client.decode_batch(entries, *tensors))
        q, k, v = draw_step(2)
        k[1, 0, 0] = np.nan
        batch = client.decode_batch(entries, q, k, v)
        assert set(batch.errors) == {1}
        checked[0].check(1, (q[:1], k[:1], v[:1]), batch[0])
        with pytest.raises(oc.NonFinite) as raised:
            batch[1]
        assert (raised.value.field, raised.value.token, raised.value.head) == ("k", 0, 0)
        assert (one.lengths, two.lengths) == ((0, 2), (0, 1))
        assert two.refresh().lengths == (0, 1)


def test_many_steps_in_flight(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        checked = Checked(session)
        steps = [(layer, draw_step()) for _ in range(12) for layer in range(NUM_LAYERS)]
        futures = [session.submit(layer, *tensors) for layer, tensors in steps]
        assert session.lengths == (12, 12)
        for (layer, tensors), future in zip(steps, futures, strict=True):
            checked.check(layer, tensors, future.result())


def test_truncate_and_its_guard(client: oc.Client) -> None:
    with client.open_session(MODEL) as session, client.attach(session.session_id) as other:
        session.append(*draw_prompt(20))
        session.truncate(10, guard=True)
        assert session.lengths == (10, 10)
        with pytest.raises(oc.PositionMismatch) as raised:
            other.truncate(5, guard=True)
        assert raised.value.length == 10
        other.truncate(5)
        with pytest.raises(oc.PositionMismatch) as raised:
            session.decode(0, *draw_step())
        assert (raised.value.start_pos, raised.value.length, raised.value.layer) == (10, 5, 0)
        session.decode(0, *draw_step())
        assert session.lengths == (6, 10)
        session.close()
        other._mirror.is_gone = True


def test_a_session_closed_by_another(client: oc.Client) -> None:
    session = client.open_session(MODEL)
    client.attach(session.session_id).close()
    with pytest.raises(oc.SessionNotFound):
        session.decode(0, *draw_step())
    with pytest.raises(oc.SessionNotFound):
        session.refresh()
    with pytest.raises(oc.SessionNotFound):
        client.attach(session.session_id)


def test_limits_are_raised_with_their_values(client: oc.Client) -> None:
    with pytest.raises(oc.ModelNotFound) as no_model:
        client.open_session("huge")
    assert no_model.value.model == "huge"
    with client.open_session(MODEL) as one, client.open_session(MODEL) as two:
        with pytest.raises(oc.ContextTooLong) as too_long:
            one.append(*draw_prompt(161))
        assert (too_long.value.max_context, too_long.value.requested) == (160, 161)
        one.append(*draw_prompt(160))
        with pytest.raises(oc.OutOfBlocks) as no_blocks:
            two.decode(0, *draw_step(40))
        assert (no_blocks.value.required_blocks, no_blocks.value.free_blocks) == (3, 2)
        assert no_blocks.value.retry_after_s is not None
        assert two.lengths == (0, 0)


def test_too_many_sessions(client: oc.Client) -> None:
    sessions = [client.open_session(MODEL) for _ in range(6)]
    with pytest.raises(oc.SessionLimit) as raised:
        client.open_session(MODEL)
    assert raised.value.limit == 6
    for session in sessions:
        session.close()


def test_a_message_over_the_limit(client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        too_many = draw_step(2000)
        with pytest.raises(oc.MessageTooLarge) as raised:
            session.decode(0, *too_many)
        assert raised.value.limit_bytes == 256 * 1024
        # The server's own word, for a client that was told of a larger limit.
        client._info = replace(client.server_info(), max_message_bytes=1 << 30)
        with pytest.raises(oc.MessageTooLarge) as raised:
            session.decode(0, *too_many)
        assert raised.value.limit_bytes == 256 * 1024
        session.decode(0, *draw_step())


def test_a_step_that_expires_in_the_queue(
    wire: Wire, client: oc.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exchange, "_QUEUE_SHARE", 0.01)
    with client.open_session(MODEL) as session:
        with wire.busy():
            future = session.submit(0, *draw_step(), timeout=30.0)
            wait_until(lambda: wire.num_overdue == 1)
        with pytest.raises(oc.StepExpired):
            future.result()
        assert session.lengths == (0, 0)
        session.decode(0, *draw_step())


def test_a_step_given_up_may_be_applied(wire: Wire, client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        wire.backend.shut()
        future = session.submit(0, *draw_step(), timeout=0.2)
        with pytest.raises(oc.StepTimeout) as raised:
            future.result()
        assert raised.value.may_be_applied
        wire.backend.open()
        wait_for_lengths(client, session, (1, 0))
        session.decode(0, *draw_step())
        assert session.lengths == (2, 0)


def test_a_step_that_was_running_when_the_connection_broke(
    wire: Wire, proxy: CuttingProxy, shaky: oc.Client
) -> None:
    with shaky.open_session(MODEL) as session:
        checked, tensors = Checked(session), draw_step()
        wire.backend.shut()
        future = session.submit(0, *tensors)
        assert wire.backend.is_running.wait(10)
        proxy.cut()
        time.sleep(0.1)
        wire.backend.open()
        checked.check(0, tensors, future.result())
        assert client_lengths(shaky, session) == (1, 0)


def test_a_step_whose_answer_was_lost_is_replayed(
    wire: Wire, proxy: CuttingProxy, shaky: oc.Client
) -> None:
    with shaky.open_session(MODEL) as session:
        checked = Checked(session)
        for tensors in (draw_step(), draw_step()):
            proxy.drop_answers()
            future = session.submit(0, *tensors)
            wait_for_lengths_on(wire, session, (checked.lengths[0] + 1, 0))
            proxy.cut()
            checked.check(0, tensors, future.result())
        assert client_lengths(shaky, session) == (2, 0)


def test_decoding_survives_a_connection_that_breaks_all_the_time(
    proxy: CuttingProxy, shaky: oc.Client
) -> None:
    with shaky.open_session(MODEL) as one, shaky.open_session(MODEL) as two:
        checked = [Checked(one), Checked(two)]
        proxy.cut_after_bytes, proxy.num_cuts_left = 10_000, 5
        for _ in range(30):
            decode_one_token(shaky, checked)
        assert (proxy.num_cuts_left, proxy.num_connections) == (0, 6)
        assert client_lengths(shaky, one) == checked[0].lengths == (30, 30)
        assert client_lengths(shaky, two) == checked[1].lengths == (30, 30)


def decode_one_token(client: oc.Client, checked: list[Checked]) -> None:
    entries = [[oc.Entry(each.session, layer) for each in checked] for layer in range(NUM_LAYERS)]
    tensors = [draw_step(len(checked)) for _ in range(NUM_LAYERS)]
    futures = [client.submit_batch(entries[layer], *tensors[layer]) for layer in range(NUM_LAYERS)]
    for layer, future in enumerate(futures):
        check_batch(checked, layer, tensors[layer], future.result())


def test_a_prompt_survives_a_connection_that_breaks(
    wire: Wire, proxy: CuttingProxy, shaky: oc.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_append, "_MAX_MESSAGE_TOKENS", 1)
    with shaky.open_session(MODEL) as session:
        checked, prompt = Checked(session), draw_prompt(150)
        proxy.cut_after_bytes, proxy.num_cuts_left = 20_000, 3
        session.append(*prompt)
        assert (proxy.num_cuts_left, proxy.num_connections) == (0, 4)
        assert client_lengths(shaky, session) == (150, 150)
        checked.take_prompt(prompt)
        tensors = draw_step()
        checked.check(1, tensors, session.decode(1, *tensors))


def test_a_second_client_at_the_same_position_is_refused(wire: Wire, client: oc.Client) -> None:
    with client.open_session(MODEL) as session:
        other = client.attach(session.session_id)
        session.decode(0, *draw_step())
        with pytest.raises(oc.PositionMismatch) as raised:
            other.decode(0, *draw_step())
        assert (raised.value.start_pos, raised.value.length) == (0, 1)
        other.decode(0, *draw_step())
        assert wire.lengths(wire.sessions()[0]) == [2, 0]


def test_a_server_that_stops_and_one_that_takes_its_place() -> None:
    with serving() as wire:
        client = oc.Client(wire.address, retry=QUICK)
        session = client.open_session(MODEL)
        session.decode(0, *draw_step())
        port = int(wire.address.rsplit(":", 1)[1])
        wire.server.stop()
        with pytest.raises((oc.ConnectionLost, oc.Draining)):
            session.decode(0, *draw_step())
    with serving(port=port), client:
        with pytest.raises(oc.SessionLost):
            session.decode(0, *draw_step())
        with client.open_session(MODEL) as session:
            checked, tensors = Checked(session), draw_step()
            checked.check(0, tensors, session.decode(0, *tensors))


def test_a_link_that_goes_silent_is_left_before_the_step_is_given_up(
    wire: Wire, proxy: CuttingProxy
) -> None:
    with oc.Client(proxy.target) as client, client.open_session(MODEL) as session:
        checked = Checked(session)
        for num_connections in (1, 2):
            tensors = draw_step()
            checked.check(0, tensors, session.decode(0, *tensors))
            assert proxy.num_connections == num_connections
            if num_connections == 1:
                proxy.drop_answers()
        assert client_lengths(client, session) == (2, 0)


def test_the_example_in_the_docstring_works(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    assert oc.__doc__ is not None
    _, example, _ = re.split(r"\n\n(?=    import)|\n\n(?=`Client`)", oc.__doc__)
    exec(textwrap.dedent(example).replace("localhost:50051", wire.address), {})
    assert capsys.readouterr().out == "0 (1, 4, 16)\n1 (1, 4, 16)\n"
    assert wire.sessions() == []


def test_threads_share_a_client(client: oc.Client) -> None:
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            with client.open_session(MODEL) as session:
                checked = Checked(session)
                for _ in range(10):
                    tensors = draw_step()
                    checked.check(0, tensors, session.decode(0, *tensors))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def client_lengths(client: oc.Client, session: oc.Session) -> tuple[int, ...]:
    return client.get_session(session.session_id).lengths


def wait_for_lengths(client: oc.Client, session: oc.Session, lengths: tuple[int, ...]) -> None:
    for _ in range(200):
        if client_lengths(client, session) == lengths:
            return
        time.sleep(0.02)
    raise AssertionError(f"lengths stay {client_lengths(client, session)}, expected {lengths}")


def wait_for_lengths_on(wire: Wire, session: oc.Session, lengths: tuple[int, ...]) -> None:
    """Wait without the client's own connection."""
    with oc.Client(wire.address) as client:
        wait_for_lengths(client, session, lengths)
