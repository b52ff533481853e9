"""The parts of the chaos test that decide: what is lost, whether it was said, who recovered, and what fails a run."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from dataclasses import replace

import pytest

from octavo_client.load.checks import CheckCounts
from tests.chaos.account import Account, Difference, Loss
from tests.chaos.faults import LANES, SERVER_FAULTS
from tests.chaos.faults.servers import KILLED, NO_SNAPSHOT
from tests.chaos.form import FULL, SHORT
from tests.chaos.history import History, Restart
from tests.chaos.notes import Page
from tests.chaos.proxy import FaultyProxy
from tests.chaos.recovery import Blow, Recoveries
from tests.chaos.results import Results
from tests.chaos.run import order_of

S = 10**9
LEASE_S = 10.0
LOSS = Loss(
    client_idx=1,
    session_id="x",
    reason="SESSION_LOST",
    call="decode",
    num_tokens=7,
    since_ns=100 * S,
    until_ns=105 * S,
    closes_on_disconnect=False,
)


def test_every_kind_of_fault_is_in_the_forms() -> None:
    assert sorted(FULL.faults) == sorted(kind for lane in LANES for kind in lane)


def test_the_order_of_faults_follows_the_seed() -> None:
    orders = [order_of(FULL.faults, SERVER_FAULTS, random.Random(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert {order: FULL.faults[order] for order in orders[0]} == Counter(orders[0])


def test_a_server_without_snapshots_follows_a_killed_one() -> None:
    order = order_of(FULL.faults, SERVER_FAULTS, random.Random(1))
    before = [order[idx - 1] for idx, kind in enumerate(order) if kind == NO_SNAPSHOT]
    assert before == [KILLED] * FULL.faults[NO_SNAPSHOT]


# ---- What a session must hold -------------------------------------------------------------------


def account(confirmed: list[int], sent: list[int]) -> Account:
    return Account(seen_ns=0, confirmed=confirmed, sent=sent)


@pytest.mark.parametrize(
    ("lengths", "difference"),
    [
        ([5, 5], Difference(0, 0)),
        ([6, 5], Difference(0, 0)),
        ([4, 3], Difference(3, 0)),
        ([7, 8], Difference(0, 3)),
        ([0, 8], Difference(5, 2)),
    ],
)
def test_lengths_lie_between_what_was_confirmed_and_what_was_sent(
    lengths: list[int], difference: Difference
) -> None:
    kept = account([5, 5], [6, 6])
    assert kept.settle(lengths, 3) == difference
    assert kept.confirmed == lengths
    assert kept.seen_ns == 3


def test_an_answer_confirms_and_never_takes_back() -> None:
    kept = account([5, 5], [5, 5])
    kept.send(1, 9)
    kept.confirm(1, 9, 40)
    kept.confirm(1, 7, 30)
    assert (kept.confirmed, kept.sent, kept.seen_ns) == ([5, 9], [5, 9], 40)


def test_tokens_that_were_cut_may_be_there_until_the_answer_comes() -> None:
    kept = account([5, 3], [6, 3])
    kept.cut(4)
    assert kept.confirmed == [4, 3]
    assert kept.settle([6, 3], 1) == Difference(0, 0)
    kept.cut(4)
    kept.was_cut(2)
    assert (kept.confirmed, kept.sent) == ([4, 3], [4, 3])
    assert kept.settle([6, 3], 3) == Difference(0, 2)


# ---- Whether a loss was due ---------------------------------------------------------------------


def history(*restarts: Restart, disconnected: tuple[int, int] | None = None) -> History:
    kept = History(LEASE_S)
    for restart in restarts:
        kept.restarted(restart)
    if disconnected is not None:
        kept.disconnected(*disconnected)
    return kept


@pytest.mark.parametrize(
    ("restarts", "is_due"),
    [
        ([], False),
        ([Restart(101 * S, is_lossy=True)], True),
        ([Restart(99 * S, is_lossy=True)], False),
        ([Restart(101 * S, is_lossy=False)], False),
        ([Restart(101 * S, is_lossy=False), Restart(102 * S, is_lossy=True)], True),
    ],
)
def test_a_session_is_lost_by_a_lossy_restart_after_its_last_answer(
    restarts: list[Restart], is_due: bool
) -> None:
    assert (history(*restarts).fault_of(LOSS) == "") == is_due


def test_a_session_that_had_ended_before_a_restart_is_lost_by_it() -> None:
    restart = Restart(111 * S, is_lossy=False)
    assert history(restart).fault_of(LOSS._replace(until_ns=112 * S)) == ""
    closing = LOSS._replace(closes_on_disconnect=True)
    assert history(restart._replace(ended_ns=104 * S)).fault_of(closing) == ""
    assert history(disconnected=(1, 101 * S)).fault_of(closing) != ""


def test_a_session_expires_after_its_lease() -> None:
    expired = LOSS._replace(reason="SESSION_EXPIRED")
    assert "5.0 s before" in history().fault_of(expired)
    assert history().fault_of(expired._replace(until_ns=110 * S)) == ""


@pytest.mark.parametrize(
    ("closes", "disconnected", "is_due"),
    [
        (True, (1, 101 * S), True),
        (True, (1, 99 * S), False),
        (True, (2, 101 * S), False),
        (True, None, False),
        (False, (1, 101 * S), False),
    ],
)
def test_a_session_is_absent_when_its_policy_met_a_broken_connection(
    closes: bool, disconnected: tuple[int, int] | None, is_due: bool
) -> None:
    absent = LOSS._replace(reason="SESSION_NOT_FOUND", closes_on_disconnect=closes)
    assert (history(disconnected=disconnected).fault_of(absent) == "") == is_due


# ---- Recoveries ---------------------------------------------------------------------------------


def test_only_answers_to_steps_sent_after_the_blow_count() -> None:
    recoveries = Recoveries()
    blow = Blow("cut", began_ns=10 * S, counts_from_ns=12 * S, waiting={0, 1})
    recoveries.add(blow)
    recoveries.answered(0, [(9 * S, 11 * S), (11 * S, 13 * S)])
    recoveries.answered(2, [(20 * S, 21 * S)])
    assert blow.waiting == {0, 1}
    recoveries.answered(0, [(12 * S, 14 * S), (13 * S, 15 * S)])
    assert recoveries.is_waited_for(1)
    assert not recoveries.is_waited_for(0)
    assert recoveries.seconds() == {"cut": [4.0]}
    assert recoveries.give_up(blow) == [1]
    assert not recoveries.is_waited_for(1)


# ---- The proxy ----------------------------------------------------------------------------------


def test_the_proxy_flips_one_bit_and_cuts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = FaultyProxy(f"127.0.0.1:{listener.getsockname()[1]}", seed=1)
        host, _, port = proxy.target.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            server, _ = listener.accept()
            with server:
                flipped = threading.Thread(target=lambda: proxy.corrupt(20))
                sent, seen = bytes(1000), bytes(1000)
                flipped.start()
                while seen == sent:
                    client.sendall(sent)
                    seen = server.recv(1000, socket.MSG_WAITALL)
                flipped.join()
                assert sum(byte.bit_count() for byte in seen) == 1
                client.sendall(sent)
                assert server.recv(1000, socket.MSG_WAITALL) == sent
                proxy.cut()
                assert server.recv(1) == b""
                assert client.recv(1) == b""
        proxy.close()


# ---- What fails a run ---------------------------------------------------------------------------

GOOD = Results(checks=CheckCounts(num_checked=SHORT.min_answers))
GOOD.faults.update(SHORT.faults)


def test_a_good_run_has_no_failures() -> None:
    assert GOOD.failures(SHORT, SHORT.num_faults) == []


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (replace(GOOD, checks=CheckCounts(SHORT.min_answers, num_wrong=1)), "1 answers are wrong"),
        (replace(GOOD, checks=CheckCounts(SHORT.min_answers, num_dropped=2)), "not checked"),
        (replace(GOOD, checks=CheckCounts(1)), "1 of 500 answers were checked"),
        (replace(GOOD, num_lost_tokens=3), "3 tokens were lost"),
        (replace(GOOD, num_left_sessions=4), "4 sessions were left open"),
        (replace(GOOD, num_leaked_blocks=5), "5 blocks leaked"),
    ],
)
def test_each_bad_count_fails_a_run(bad: Results, text: str) -> None:
    (failure,) = bad.failures(SHORT, SHORT.num_faults)
    assert text in failure


def test_too_few_faults_fail_a_run() -> None:
    assert "were injected" in GOOD.failures(SHORT, SHORT.num_faults + 1)[0]


def test_a_loss_without_cause_counts_its_tokens_as_lost_unsaid() -> None:
    results = Results()
    results.take(Page(num_lost_tokens=2), [(LOSS, ""), (LOSS, "no cause")])
    assert (results.num_losses, results.num_said_lost_tokens, results.num_lost_tokens) == (2, 7, 9)
    assert "no cause" in results.failures(SHORT, 0)[-1]
