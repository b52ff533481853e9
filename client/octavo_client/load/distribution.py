"""What is drawn by weight: lengths, sizes and models, as they are written on the command line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


class SpecError(ValueError):
    """A text that is no distribution; it says what one looks like."""


@dataclass(frozen=True, slots=True)
class Span:
    """Whole numbers from `low` to `high`, each as likely."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A mix of whole numbers: spans and their weights."""

    spans: tuple[Span, ...]
    weights: tuple[float, ...]

    def draw(self, rng: random.Random) -> int:
        """Return a number."""
        (span,) = rng.choices(self.spans, self.weights)
        return rng.randint(span.low, span.high)

    @property
    def least(self) -> int:
        """The smallest number that can be drawn."""
        return min(span.low for span in self.spans)

    @property
    def most(self) -> int:
        """The largest number that can be drawn."""
        return max(span.high for span in self.spans)

    def __str__(self) -> str:
        if len(self.spans) == 1:
            return str(self.spans[0])
        return ",".join(
            f"{span}:{weight:g}" for span, weight in zip(self.spans, self.weights, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Mix:
    """Names and their weights."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def draw(self, rng: random.Random) -> str:
        """Return a name."""
        (name,) = rng.choices(self.names, self.weights)
        return name


def parse_lengths(text: str) -> Lengths:
    """Return the distribution of a text such as "64", "16-128" or "64:0.5,1024:0.4,2048-4096:0.1".

    Raises:
        SpecError: It is none.
    """
    spans, weights = [], []
    for part in text.split(","):
        span, colon, weight = part.partition(":")
        spans.append(_span(span, text))
        weights.append(_weight(weight, text) if colon else 1.0)
    return Lengths(tuple(spans), tuple(weights))


def parse_mix(parts: Sequence[str]) -> Mix:
    """Return the mix of texts such as "llama" or "llama=3".

    Raises:
        SpecError: One is none, or a name comes twice.
    """
    names, weights = [], []
    for part in parts:
        name, equals, weight = part.partition("=")
        names.append(name)
        weights.append(_weight(weight, part) if equals else 1.0)
    if len(set(names)) < len(names) or not all(names):
        raise SpecError(f"each model is named once, got {', '.join(names)}")
    return Mix(tuple(names), tuple(weights))


def _span(text: str, whole: str) -> Span:
    low, dash, high = text.partition("-")
    try:
        span = Span(int(low), int(high) if dash else int(low))
    except ValueError:
        raise _no_lengths(whole) from None
    if not 1 <= span.low <= span.high:
        raise _no_lengths(whole)
    return span


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise SpecError(f"a weight must be a number over 0, got {text!r} in {whole!r}")
    return weight


def _no_lengths(whole: str) -> SpecError:
    return SpecError(
        f"lengths are whole numbers from 1, or ranges, with or without weights, such as 64, 16-128 or "
        f"64:0.9,1024-4096:0.1; got {whole!r}"
    )
