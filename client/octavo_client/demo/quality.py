"""What the INT8 cache costs in quality: the model's own text, scored with and without the server.

The model samples texts with exact attention in process. Both attentions are then forced along these
texts, and their next-token distributions are compared at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo_client import Progress
from octavo_client.demo.exact_attention import ExactAttention
from octavo_client.demo.model import FloatArray, IntArray, TinyLlama, encode_text
from octavo_client.demo.sampling import Sampler, generate

__all__ = [
    "Attention",
    "Quality",
    "QualityPlan",
    "compare",
    "force",
    "measure_quality",
    "plan_chunks",
    "sample_texts",
]

MAX_PERPLEXITY_RISE = 0.005
MIN_AGREEMENT = 0.99

CHUNK_TOKENS = 64
"""Tokens of one sequence in one step, where they do not go one by one."""


ShowPhase = Callable[[str], AbstractContextManager[Progress]]
"""Shows a phase by its title; what it yields is told how far the phase is."""


class Attention(Protocol):
    """An `Attend` with a cache of its own: `ExactAttention` or `RemoteAttention`."""

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        """Announce a ragged step and return its positions."""

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        """Append k and v, and attend with q."""


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """How much is measured, and how.

    Attributes:
        num_texts: Texts, side by side in every step.
        text_len: Tokens of each, up to the model's max_context; the last token has the longest context.
        num_single: Last tokens of each text that go one by one; those before go in chunks.
        seed: The same seed gives the same texts.
    """

    num_texts: int
    text_len: int
    num_single: int
    seed: int


@dataclass(frozen=True, slots=True)
class Quality:
    """How close the next-token distributions are.

    Attributes:
        num_tokens: Tokens compared.
        num_single: Those of them that went to the server by one Decode step per layer and token, as counted on the way.
        max_context: Longest context that a token attended to.
        exact_perplexity: Of the texts, with exact FP32 attention in process.
        octavo_perplexity: Of the texts, with attention on the server.
        agreement: Share of the positions at which both find the same token likeliest.
        mean_kl: Mean Kullback-Leibler divergence of the server's distribution from the exact one, in nats.
    """

    num_tokens: int
    num_single: int
    max_context: int
    exact_perplexity: float
    octavo_perplexity: float
    agreement: float
    mean_kl: float

    @property
    def perplexity_rise(self) -> float:
        """How much higher the perplexity is than with exact attention, as a share of it."""
        return self.octavo_perplexity / self.exact_perplexity - 1

    def faults(self) -> list[str]:
        """Return what is worse than it may be, a sentence each."""
        faults = []
        # Written so that NaN is a fault.
        if not self.perplexity_rise <= MAX_PERPLEXITY_RISE:
            faults.append(
                f"perplexity rises by {self.perplexity_rise:.2%}, "
                f"more than the {MAX_PERPLEXITY_RISE:.1%} that it may"
            )
        if not self.agreement >= MIN_AGREEMENT:
            faults.append(
                f"the likeliest token is the same at {self.agreement:.2%} of the positions, "
                f"less than the {MIN_AGREEMENT:.0%} that it must be"
            )
        return faults


def measure_quality(
    model: TinyLlama, attention: Attention, plan: QualityPlan, show: ShowPhase
) -> Quality:
    """Sample texts, score them with exact attention and with `attention`, and compare.

    Args:
        model: The model.
        attention: The attention to measure, with an empty sequence for each of the plan's texts.
        plan: How much to measure, and how.
        show: Shows the progress of each phase.
    """
    with show("sampling text with exact attention") as progress:
        texts = sample_texts(model, plan, progress)
    with show("scoring it with exact attention") as progress:
        exact_attention = ExactAttention(model.config, plan.num_texts)
        exact = force(model, exact_attention, texts, plan_chunks(plan.text_len), progress)
    with show("scoring it through Octavo") as progress:
        chunks = plan_chunks(plan.text_len, plan.num_single)
        counting = _CountingAttention(attention)
        octavo = force(model, counting, texts, chunks, progress)
    return compare(exact, octavo, texts, counting.num_single // model.config.num_layers)


@dataclass(slots=True, eq=False)
class _CountingAttention:
    """An attention that counts the tokens that are all there is of their sequence in a step."""

    attention: Attention
    num_single: int = 0  # of all layers
    counts: tuple[int, ...] = ()

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        self.counts = tuple(num_tokens)
        return self.attention.begin(num_tokens)

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        out = self.attention(layer, q, k, v)
        self.num_single += self.counts.count(1)
        return out


def sample_texts(model: TinyLlama, plan: QualityPlan, progress: Progress) -> IntArray:
    """Let the model write texts with exact attention in process, at temperature 1.

    Args:
        model: The model.
        plan: How many texts, how long, and from which seed.
        progress: Called with the tokens sampled of each text, and all of them.

    Returns:
        `[num_texts, 1 + text_len] int64`: a line break, then the sampled tokens.
    """
    starts = [encode_text("\n")] * plan.num_texts
    sampler = Sampler(temperature=1.0, seed=plan.seed)
    drawn = generate(model, starts, plan.text_len, sampler, progress)
    return np.column_stack([np.stack(starts), np.stack(drawn)])


def plan_chunks(text_len: int, num_single: int = 0) -> list[int]:
    """Return the tokens of each text in every step: chunks, then `num_single` one by one."""
    num_chunked = text_len - num_single
    starts = range(0, num_chunked, CHUNK_TOKENS)
    chunks = [min(CHUNK_TOKENS, num_chunked - start) for start in starts]
    return chunks + [1] * num_single


def force(
    model: TinyLlama,
    attention: Attention,
    texts: IntArray,
    chunks: Sequence[int],
    progress: Progress,
) -> FloatArray:
    """Run the model along given texts.

    Args:
        model: The model.
        attention: Its attention, with an empty sequence for each text.
        texts: `[num_texts, 1 + text_len] int64`; the last tokens are only predicted.
        chunks: Tokens of each step, of every text; their sum is text_len.
        progress: Called with the tokens of each text that are done, and text_len.

    Returns:
        Logits of tokens 1, 2, ... of each text, `[num_texts, text_len, vocab_size] float32`.
    """
    num_texts, text_len = len(texts), texts.shape[1] - 1
    logits, start = [], 0
    for num_tokens in chunks:
        progress(start, text_len)
        step = texts[:, start : start + num_tokens].reshape(-1)
        positions = attention.begin([num_tokens] * num_texts)
        flat = model.forward(step, positions, attention)
        logits.append(flat.reshape(num_texts, num_tokens, -1))
        start += num_tokens
    progress(start, text_len)
    return np.concatenate(logits, axis=1)


def compare(exact: FloatArray, octavo: FloatArray, texts: IntArray, num_single: int) -> Quality:
    """Compare logits `[num_texts, text_len, vocab_size]` of texts `[num_texts, 1 + text_len]`.

    `num_single` of the tokens were sent one by one.
    """
    targets = texts[:, 1:, None]
    exact_log_probs, octavo_log_probs = _log_softmax(exact), _log_softmax(octavo)
    divergence = np.exp(exact_log_probs) * (exact_log_probs - octavo_log_probs)
    return Quality(
        num_tokens=targets.size,
        num_single=num_single,
        max_context=texts.shape[1] - 1,
        exact_perplexity=_perplexity(exact_log_probs, targets),
        octavo_perplexity=_perplexity(octavo_log_probs, targets),
        agreement=float(np.mean(exact.argmax(axis=-1) == octavo.argmax(axis=-1))),
        mean_kl=float(divergence.sum(axis=-1).mean()),
    )


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Return log-probabilities in float64: a divergence of 1e-6 would drown in float32."""
    wide = logits.astype(np.float64)
    log_probs: npt.NDArray[np.float64] = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    return log_probs


def _perplexity(log_probs: npt.NDArray[np.float64], targets: IntArray) -> float:
    return float(np.exp(-np.take_along_axis(log_probs, targets, axis=-1).mean()))
