"""What the example orchestrator sends and times, with a client that answers at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from octavo_client import BatchResult, Client, Entry, Session
from octavo_client.demo.orchestrator import RemoteAttention
from octavo_client.demo.report import Speed


class FakeClient:
    """Answers each batch with its q, after the next of the given seconds."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.now = 100.0
        self.seconds = iter(seconds)
        self.batches: list[list[tuple[Any, int, int]]] = []

    def decode_batch(self, entries: Sequence[Entry], q: Any, _k: Any, _v: Any) -> BatchResult:
        self.now += next(self.seconds)
        self.batches.append([(e.session, e.layer, e.num_tokens) for e in entries])
        return BatchResult(q, None, {}, (slice(0, len(q)),))


def test_every_step_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient([0.25, 0.5, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: client.now)
    sessions = [SimpleNamespace(lengths=(5,)), SimpleNamespace(lengths=(0,))]
    attention = RemoteAttention(cast(Client, client), cast(list[Session], sessions))
    q = np.ones((3, 2, 4), dtype=np.float32)
    assert attention.begin([2, 1]).tolist() == [5, 6, 0]
    for layer in range(2):
        attention(layer, q, q, q)
    assert attention.begin([0, 1]).tolist() == [0]
    attention(0, q[:1], q[:1], q[:1])
    assert attention.step_seconds == [0.25, 0.5, 2.0]
    first, second = sessions
    both = [[(first, layer, 2), (second, layer, 1)] for layer in range(2)]
    assert client.batches == [*both, [(second, 0, 1)]]


def test_percentiles_of_the_steps() -> None:
    speed = Speed(1, 100, 1.0, [k / 1000 for k in range(101)])
    assert speed.step_ms(50) == pytest.approx(50)
    assert speed.step_ms(99) == pytest.approx(99)
