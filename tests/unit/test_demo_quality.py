"""The demo's measures of quality, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from octavo_client.demo.model import FloatArray
from octavo_client.demo.quality import Quality, compare, plan_chunks

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
