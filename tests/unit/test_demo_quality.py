"""The demo's measures of quality, by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from octavo_client import Progress
from octavo_client.demo.exact_attention import ExactAttention
from octavo_client.demo.model import FloatArray, IntArray, TinyLlama
from octavo_client.demo.quality import (
    Quality,
    QualityPlan,
    compare,
    measure_quality,
    plan_chunks,
    sample_texts,
)

GOOD = Quality(
    num_tokens=4096,
    num_single=1024,
    max_context=1024,
    exact_perplexity=4.0,
    octavo_perplexity=4.0,
    agreement=1.0,
    mean_kl=0.0,
)


def logits_of(*rows: tuple[float, float]) -> FloatArray:
    """Return the logits of one text from the probabilities of two tokens; adds a constant, which changes nothing."""
    return np.log(np.array([rows], dtype=np.float32)) + 7


def test_compare_by_hand() -> None:
    exact = logits_of((0.5, 0.5), (0.8, 0.2))
    octavo = logits_of((0.25, 0.75), (0.8, 0.2))
    texts = np.array([[1, 0, 0]])  # the first token is given, the others are predicted
    quality = compare(exact, octavo, texts, num_single=1)
    assert quality.exact_perplexity == pytest.approx((0.5 * 0.8) ** -0.5)
    assert quality.octavo_perplexity == pytest.approx((0.25 * 0.8) ** -0.5)
    assert quality.perplexity_rise == pytest.approx(2**0.5 - 1)
    assert quality.agreement == 0.5
    divergence = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert quality.mean_kl == pytest.approx(divergence / 2, abs=1e-6)
    assert (quality.num_tokens, quality.num_single, quality.max_context) == (2, 1, 2)


def test_equal_logits_have_no_fault() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    quality = compare(logits, logits, np.zeros((2, 6), dtype=np.int64), num_single=2)
    assert quality.mean_kl == quality.perplexity_rise == 0
    assert quality.faults() == []


@pytest.mark.parametrize(
    ("quality", "faults"),
    [
        (GOOD, []),
        (replace(GOOD, octavo_perplexity=4.0199, agreement=0.9901), []),
        (replace(GOOD, octavo_perplexity=3.0), []),
        (replace(GOOD, octavo_perplexity=4.0201), ["perplexity rises by 0.50%"]),
        (replace(GOOD, octavo_perplexity=float("nan")), ["perplexity rises by nan%"]),
        (replace(GOOD, agreement=0.9899), ["the same at 98.99% of the positions"]),
        (replace(GOOD, agreement=float("nan")), ["the same at nan% of the positions"]),
        (replace(GOOD, octavo_perplexity=5.0, agreement=0.5), ["25.00%", "50.00%"]),
    ],
)
def test_faults(quality: Quality, faults: list[str]) -> None:
    actual = quality.faults()
    assert len(actual) == len(faults)
    assert all(part in fault for part, fault in zip(faults, actual, strict=True))


@pytest.mark.parametrize(
    ("text_len", "num_single", "chunks"),
    [
        (3, 1, [2, 1]),
        (3, 3, [1, 1, 1]),
        (66, 2, [64, 1, 1]),
        (67, 2, [64, 1, 1, 1]),
        (200, 0, [64, 64, 64, 8]),
    ],
)
def test_chunks(text_len: int, num_single: int, chunks: list[int]) -> None:
    assert plan_chunks(text_len, num_single) == chunks


class RecordingAttention:
    """Exact attention that keeps what it was asked: layers, and each sequence's tokens."""

    def __init__(self, model: TinyLlama, num_seqs: int) -> None:
        self.exact = ExactAttention(model.config, num_seqs)
        self.counts: Sequence[int] = ()
        self.steps: list[tuple[int, tuple[int, ...], int]] = []

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        self.counts = tuple(num_tokens)
        return self.exact.begin(num_tokens)

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        self.steps.append((layer, tuple(self.counts), len(q)))
        return self.exact(layer, q, k, v)


@contextmanager
def show_nothing(_title: str) -> Iterator[Progress]:
    yield lambda _done, _total: None


def ignore_progress(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> TinyLlama:
    return TinyLlama.load()


def test_measurement_goes_in_chunks_then_one_by_one(model: TinyLlama) -> None:
    attention = RecordingAttention(model, num_seqs=2)
    quality = measure_quality(model, attention, QualityPlan(2, 70, 3, seed=0), show_nothing)
    expected = [
        (layer, (num_tokens, num_tokens), 2 * num_tokens)
        for num_tokens in (64, 3, 1, 1, 1)
        for layer in range(model.config.num_layers)
    ]
    assert attention.steps == expected
    assert (quality.num_tokens, quality.num_single, quality.max_context) == (140, 6, 70)


def test_single_tokens_are_counted_rather_than_planned(
    model: TinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "octavo_client.demo.quality.plan_chunks", lambda text_len, _num_single=0: [text_len]
    )
    attention = RecordingAttention(model, num_seqs=2)
    quality = measure_quality(model, attention, QualityPlan(2, 8, 4, seed=0), show_nothing)
    assert (quality.num_tokens, quality.num_single) == (16, 0)


def test_texts_are_sampled_at_temperature_1(model: TinyLlama) -> None:
    plan = QualityPlan(num_texts=4, text_len=150, num_single=0, seed=0)
    texts = sample_texts(model, plan, ignore_progress)
    assert texts.shape == (4, 151)
    attention = ExactAttention(model.config, plan.num_texts)
    positions = attention.begin([plan.text_len] * plan.num_texts)
    logits = model.forward(texts[:, :-1].reshape(-1), positions, attention).astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    surprise = -np.take_along_axis(log_probs, texts[:, 1:].reshape(-1, 1), axis=-1)[:, 0]
    probs = np.exp(log_probs)
    entropy = -(probs * log_probs).sum(axis=-1)
    variance = (probs * log_probs**2).sum(axis=-1) - entropy**2
    # Of tokens drawn at temperature 1, the surprise is the entropy on average; colder ones surprise less.
    z_score = (surprise - entropy).sum() / np.sqrt(variance.sum())
    assert abs(z_score) < 3
    assert surprise.mean() < 0.5 * np.log(model.config.vocab_size)


def test_texts_differ_and_follow_the_seed(model: TinyLlama) -> None:
    def texts(seed: int) -> list[list[int]]:
        plan = QualityPlan(num_texts=3, text_len=24, num_single=0, seed=seed)
        sampled: list[list[int]] = sample_texts(model, plan, ignore_progress).tolist()
        return sampled

    assert texts(1) == texts(1)
    assert len({tuple(text) for text in texts(1) + texts(2)}) == 6
