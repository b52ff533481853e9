"""What the load test is told to do: distributions, shares of processes, arguments, and what an error means."""

from __future__ import annotations

import random
from collections import Counter
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_client import (
    ClientClosed,
    OutOfBlocks,
    PositionMismatch,
    QueueFull,
    ServerInfo,
    SessionNotFound,
    StepExpired,
    StepTimeout,
)
from octavo_client.load.arguments import DEFAULT_EXPECTED, UsageError, make_parser, settings_of
from octavo_client.load.distribution import SpecError, parse_lengths, parse_mix
from octavo_client.load.fate import Fate, delay_after, fate_of, reason_of
from octavo_client.load.plan import LoadPoint, split_point
from octavo_client.load.results import Settings
from tests.unit.client_fakes import model

# ---- Distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", {64: 1.0}),
        ("2-3", {2: 0.5, 3: 0.5}),
        ("1:3,10:1", {1: 0.75, 10: 0.25}),
        ("1,2,7-8:2", {1: 0.25, 2: 0.25, 7: 0.25, 8: 0.25}),
    ],
)
def test_lengths_are_drawn_by_weight(text: str, expected: dict[int, float]) -> None:
    lengths = parse_lengths(text)
    rng = random.Random(0)
    counts = Counter(lengths.draw(rng) for _ in range(4000))
    assert {length: count / 4000 for length, count in counts.items()} == pytest.approx(
        expected, abs=0.04
    )
    assert (lengths.least, lengths.most) == (min(expected), max(expected))
    assert parse_lengths(str(lengths)) == lengths


@pytest.mark.parametrize("text", ["", "0", "a", "3-2", "5:", "5:0", "5:x", "1,,2", "1:inf", "-3"])
def test_what_is_no_distribution_is_said(text: str) -> None:
    with pytest.raises(SpecError):
        parse_lengths(text)


def test_models_are_mixed_by_weight() -> None:
    mix = parse_mix(["a", "b=3"])
    rng = random.Random(0)
    counts = Counter(mix.draw(rng) for _ in range(4000))
    assert counts["b"] / 4000 == pytest.approx(0.75, abs=0.04)
    for wrong in (["a", "a=2"], ["=2"], ["a=0"]):
        with pytest.raises(SpecError):
            parse_mix(wrong)


# ---- Shares -------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 9), st.none() | st.integers(1, 500))
def test_shares_add_up(
    num_lanes: int, num_more: int, num_processes: int, max_steps: int | None
) -> None:
    point = LoadPoint("rate", 120.0, num_lanes, num_lanes + num_more)
    shares = split_point(point, 3, num_processes, max_steps)
    assert len(shares) <= num_processes
    assert [share.process_idx for share in shares] == list(range(len(shares)))
    assert sum(share.num_lanes for share in shares) == num_lanes
    assert sum(share.num_groups for share in shares) == num_lanes + num_more
    assert sum(share.rate or 0 for share in shares) == pytest.approx(120)
    assert all(share.num_groups >= share.num_lanes >= 1 for share in shares)
    if max_steps is not None:
        assert sum(share.max_steps or 0 for share in shares) == max_steps


# ---- Arguments ----------------------------------------------------------------------------------


def settings(*arguments: str) -> Settings:
    """Return what the arguments make, with a server of two models of 96 tokens."""
    models = {name: model(name) for name in ("tiny", "other")}
    info = ServerInfo("1", "i", "cpu", "", MappingProxyType(models), 1 << 20, 32, 0, 10)
    args = make_parser().parse_args(["--target", "x:1", *_short(arguments)])
    return settings_of(args, "x:1", info)


def _short(arguments: tuple[str, ...]) -> list[str]:
    is_long = any(argument.startswith("--prompt") for argument in arguments)
    return [*arguments, *([] if is_long else ["--prompt-tokens", "8", "--output-tokens", "4"])]


def test_a_closed_loop_is_swept() -> None:
    found = settings("--concurrency", "1,4", "--sessions-per-step", "2", "--sessions", "16")
    assert [(p.label, p.num_lanes, p.num_groups) for p in found.points] == [
        ("concurrency 1", 1, 8),
        ("concurrency 4", 4, 8),
    ]
    assert found.duration_s == 10
    assert found.workload.mix.names == ("tiny", "other")
    assert found.workload.expected == frozenset(DEFAULT_EXPECTED)


def test_an_open_loop_is_swept() -> None:
    found = settings("--rate", "50,0.5", "--max-in-flight", "6", "--steps", "10")
    assert [(p.label, p.num_lanes) for p in found.points] == [("rate 50", 6), ("rate 0.5", 6)]
    assert (found.duration_s, found.max_steps) == (None, 10)


def test_chaos_expects_what_it_brings_about() -> None:
    found = settings("--chaos", "deadline", "--expect", "none").workload
    assert found.expected == {"STEP_EXPIRED", "STEP_TIMEOUT"}
    assert settings("--expect", "QUEUE_FULL").workload.expected == {"QUEUE_FULL"}
    many = settings("--chaos", "all", "--prompt-tokens", "8", "--output-tokens", "4")
    assert many.workload.chaos == {"kill", "cancel", "deadline", "slow", "rival"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", "1.5"], "--concurrency"),
        (["--rate", "x"], "--rate"),
        (["--rate", "-1"], "--rate"),
        (["--model", "absent"], "absent"),
        (["--prompt-tokens", "60-70"], "--prompt-tokens"),
        (["--prompt-tokens", "sixty"], "sixty"),
        (["--concurrency", "4", "--sessions", "3"], "--sessions"),
        (["--chaos", "fire"], "fire"),
        (["--expect", "NO_SUCH_REASON"], "NO_SUCH_REASON"),
        (["--chaos", "kill", "--steps", "5"], "--duration"),
        (["--check", "1.5"], "--check"),
        (["--duration", "0"], "--duration"),
        (["--processes", "0"], "--processes"),
        (["--chaos", "slow", "--prompt-tokens", "50", "--output-tokens", "4"], "--prompt-tokens"),
    ],
)
def test_mistakes_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        settings(*arguments)


# ---- Errors -------------------------------------------------------------------------------------


def refusal(kind: Any, hint_s: float | None = None, **metadata: str) -> Any:
    return kind("SOME_REASON", "text", "CODE", metadata, hint_s)


LENGTH_6 = refusal(PositionMismatch, start_pos="5", length="6", layer="0")
LENGTH_7 = refusal(PositionMismatch, start_pos="5", length="7", layer="0")


@pytest.mark.parametrize(
    ("error", "is_unsure", "num_tries", "fate"),
    [
        (refusal(QueueFull), False, 1, Fate.AGAIN),
        (refusal(QueueFull), False, 50, Fate.GIVEN_UP),
        (refusal(OutOfBlocks), False, 2, Fate.AGAIN),
        (refusal(OutOfBlocks), False, 3, Fate.GIVEN_UP),
        (refusal(StepExpired), True, 1, Fate.AGAIN),
        (StepTimeout("late", may_be_applied=True), False, 1, Fate.UNSURE),
        (ClientClosed("closed"), False, 1, Fate.UNSURE),
        (LENGTH_6, True, 2, Fate.APPLIED),
        (LENGTH_6, False, 1, Fate.GIVEN_UP),
        (LENGTH_7, True, 2, Fate.GIVEN_UP),
        (refusal(SessionNotFound), True, 1, Fate.GIVEN_UP),
    ],
)
def test_what_an_error_means(error: Any, is_unsure: bool, num_tries: int, fate: Fate) -> None:
    assert fate_of(error, 5, is_unsure=is_unsure, num_tries=num_tries) is fate


def test_errors_are_counted_by_reason() -> None:
    assert reason_of(refusal(QueueFull)) == "SOME_REASON"
    assert reason_of(StepTimeout("late", may_be_applied=True)) == "STEP_TIMEOUT"
    assert reason_of(ClientClosed("closed")) == "CLIENT_CLOSED"


def test_the_hint_is_kept_and_doubled() -> None:
    error = refusal(QueueFull, 0.1)
    assert delay_after(error, 1, 1.0) == pytest.approx(0.1)
    assert delay_after(error, 3, 1.0) == pytest.approx(0.4)
    assert delay_after(error, 30, 1.0) == 2
    assert delay_after(error, 1, 0.0) == pytest.approx(0.05)
    assert delay_after(refusal(QueueFull), 1, 1.0) > 0
