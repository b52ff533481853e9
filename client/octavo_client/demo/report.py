"""The demo's table: what was measured, in the words of somebody who decides whether to use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from octavo_client import Model
from octavo_client.demo.quality import Quality

__all__ = ["CacheUse", "Speed", "measure_table"]

Row = tuple[str, str, str]

_SCALE_BYTES = 2
_FP16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast text was generated.

    Attributes:
        num_sessions: Sequences that each step served.
        num_tokens: Tokens decoded over the wire, of all sessions.
        seconds: What they took, the model's own arithmetic included.
        step_seconds: Every layer's step, from sending q, k and v to having the answer.
    """

    num_sessions: int
    num_tokens: int
    seconds: float
    step_seconds: Sequence[float]

    def step_ms(self, percent: float) -> float:
        """Return a percentile of a layer's step."""
        return float(np.percentile(self.step_seconds, percent)) * 1e3


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What the cached tokens take.

    Attributes:
        num_tokens: Tokens held, of all sessions.
        int8_bytes: INT8 codes and FP16 scales of their K and V in all layers.
        fp16_bytes: What an FP16 cache would take.
    """

    num_tokens: int
    int8_bytes: int
    fp16_bytes: int

    @classmethod
    def of(cls, model: Model, num_tokens: int) -> CacheUse:
        """Return what `num_tokens` tokens of a served model take."""
        rows = num_tokens * 2 * model.num_layers * model.num_kv_heads
        return cls(
            num_tokens,
            int8_bytes=rows * (model.head_dim + _SCALE_BYTES),
            fp16_bytes=rows * model.head_dim * _FP16_BYTES,
        )


def measure_table(title: str, speed: Speed, cache: CacheUse, quality: Quality | None) -> Table:
    """Return the table of everything measured; without quality where that was not measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how")
    for row in (*_speed_rows(speed), *_cache_rows(cache)):
        table.add_row(*row)
    if quality is not None:
        table.add_section()
        for row in _quality_rows(quality):
            table.add_row(*row)
    return table


def _speed_rows(speed: Speed) -> Iterator[Row]:
    sessions = f"{speed.num_sessions} session{'s' * (speed.num_sessions > 1)}"
    rate = speed.num_tokens / speed.seconds
    yield "tokens/s", f"{rate:,.0f}", f"{sessions} at once, the model's numpy arithmetic included"
    num_steps = len(speed.step_seconds)
    yield (
        "layer step p50",
        f"{speed.step_ms(50):.2f} ms",
        f"round trip of {num_steps:,} Decode steps",
    )
    yield "layer step p99", f"{speed.step_ms(99):.2f} ms", "one step serves all sessions"


def _cache_rows(cache: CacheUse) -> Iterator[Row]:
    tokens = f"{cache.num_tokens:,} tokens held"
    yield "cache bytes, INT8", f"{cache.int8_bytes:,}", f"codes and scales of {tokens}"
    share = cache.int8_bytes / cache.fp16_bytes
    yield "cache bytes, FP16", f"{cache.fp16_bytes:,}", f"would be; INT8 takes {share:.1%} of it"


def _quality_rows(quality: Quality) -> Iterator[Row]:
    exact, octavo = quality.exact_perplexity, quality.octavo_perplexity
    yield "perplexity, exact", f"{exact:.4f}", "FP32 attention in process, text sampled with it"
    yield "perplexity, Octavo", f"{octavo:.4f}", f"{quality.perplexity_rise:+.3%}; may rise by 0.5%"
    yield "top-1 agreement", f"{quality.agreement:.2%}", "same likeliest token; at least 99%"
    yield "mean KL", f"{quality.mean_kl:.2e}", "nats per token, Octavo from exact"
    contexts = f"contexts up to {quality.max_context:,}, float16 on the wire"
    yield "tokens compared", f"{quality.num_tokens:,}", contexts
    yield "... one by one", f"{quality.num_single:,}", "one Decode step per layer and token"
