"""Seeded sampling of tokens from logits, and generation in process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from octavo_client.demo.exact_attention import ExactAttention, softmax
from octavo_client.demo.model import FloatArray, IntArray, TinyLlama

__all__ = ["Sampler", "generate"]


class Sampler:
    """Draw next tokens from logits; the same seed and logits give the same tokens."""

    def __init__(
        self, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        """Set how to draw.

        Args:
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Keep this many likeliest tokens; 0 keeps all.
            top_p: Keep the fewest likeliest tokens of at least this much probability, in (0, 1].
            seed: Seed of the sampler's own generator.
        """
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                "must have temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
                f"got {temperature}, {top_k} and {top_p}"
            )
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits: FloatArray) -> IntArray:
        """Draw a token from each row of `logits [num_seqs, vocab_size]`: `[num_seqs] int64`."""
        if self.temperature == 0:
            likeliest: IntArray = logits.argmax(axis=-1)
            return likeliest
        order = np.argsort(-logits, axis=-1, kind="stable")
        ranked = np.take_along_axis(logits, order, axis=-1) / np.float32(self.temperature)
        ranks = self._draw_ranks(softmax(ranked))
        tokens: IntArray = np.take_along_axis(order, ranks, axis=-1)
        return tokens[:, 0]

    def _draw_ranks(self, probabilities: FloatArray) -> IntArray:
        """Draw from rows sorted downwards, by inverting the cumulative sum of what is kept.

        Takes `[num_seqs, vocab_size] float32`, returns `[num_seqs, 1] int64`.
        """
        cumulative = probabilities.cumsum(axis=-1, dtype=np.float64)
        vocab_size = probabilities.shape[-1]
        nucleus = (cumulative < self.top_p).sum(axis=-1, keepdims=True) + 1
        kept = np.minimum(nucleus, min(self.top_k or vocab_size, vocab_size))
        mass = np.take_along_axis(cumulative, kept - 1, axis=-1)
        targets = self._rng.random(mass.shape) * mass
        ranks: IntArray = np.minimum((cumulative <= targets).sum(axis=-1, keepdims=True), kept - 1)
        return ranks


def generate(
    model: TinyLlama,
    prompts: Sequence[IntArray],
    num_new_tokens: int,
    sampler: Sampler,
    progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> list[IntArray]:
    """Continue ragged `prompts` in process with `ExactAttention`.

    Args:
        model: The model.
        prompts: One `[prompt_len] int64` per sequence, none empty.
        num_new_tokens: Tokens to draw for each sequence.
        sampler: How to draw them.
        progress: Called with the tokens drawn for each sequence, and `num_new_tokens`.

    Returns:
        Each sequence's new tokens, `[num_new_tokens] int64`.
    """
    attention = ExactAttention(model.config, len(prompts))
    step, counts, drawn = np.concatenate(prompts), [len(prompt) for prompt in prompts], []
    for num_drawn in range(num_new_tokens):
        progress(num_drawn, num_new_tokens)
        logits = model.forward(step, attention.begin(counts), attention)
        step = sampler(logits[np.cumsum(counts) - 1])
        counts = [1] * len(prompts)
        drawn.append(step)
    progress(num_new_tokens, num_new_tokens)
    return list(np.stack(drawn, axis=1))
