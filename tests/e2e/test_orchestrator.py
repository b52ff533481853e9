"""The example orchestrator's logits through a real server, against attention in its own process.

Both comparisons derive their tolerance from the model at hand: they give attention in process the errors
that design allows a server, at random, and measure how far the logits move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from octavo_client import Client
from octavo_client.demo.exact_attention import ExactAttention
from octavo_client.demo.local_server import local_server, model_flag
from octavo_client.demo.model import (
    DEFAULT_WEIGHTS,
    FloatArray,
    IntArray,
    ModelConfig,
    TinyLlama,
    encode_text,
)
from octavo_client.demo.orchestrator import Orchestrator, prefill
from octavo_client.demo.quality import Attention
from octavo_client.oracle import TOLERANCES, AttentionOptions, OracleCache, quantize

RANDOM_CONFIG = ModelConfig(
    num_layers=2,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=32,
    hidden_size=48,
    intermediate_size=96,
    vocab_size=64,
    rope_theta=100.0,
    max_context=160,
    norm_eps=1e-5,
)
NUM_STEPS = 16
NUM_DRAWS = 4
ANSWER_TOLERANCE = TOLERANCES[np.dtype(np.float16)]

SLACK = 3.0
"""The largest of NUM_DRAWS random draws is close to the tail; the server's errors are one draw more."""

Half = npt.NDArray[np.float16]


def random_model() -> TinyLlama:
    """Build a model whose weights are large enough that its attention is far from uniform."""
    config, rng = RANDOM_CONFIG, np.random.default_rng(8)

    def matrix(out_size: int, in_size: int) -> FloatArray:
        return rng.normal(0, in_size**-0.5, (out_size, in_size)).astype(np.float32)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = (
        heads * config.head_dim for heads in (config.num_q_heads, config.num_kv_heads)
    )
    norm = np.ones(hidden, dtype=np.float32)
    weights = {
        "embed.weight": matrix(config.vocab_size, hidden),
        "norm.weight": norm,
        "lm_head.weight": matrix(config.vocab_size, hidden),
    }
    for layer in range(config.num_layers):
        weights |= {
            f"layers.{layer}.{name}": weight
            for name, weight in {
                "attn_norm.weight": norm,
                "attn.q_proj.weight": matrix(q_size, hidden),
                "attn.k_proj.weight": matrix(kv_size, hidden),
                "attn.v_proj.weight": matrix(kv_size, hidden),
                "attn.o_proj.weight": matrix(hidden, q_size),
                "mlp_norm.weight": norm,
                "mlp.gate_proj.weight": matrix(inner, hidden),
                "mlp.up_proj.weight": matrix(inner, hidden),
                "mlp.down_proj.weight": matrix(hidden, inner),
            }.items()
        }
    return TinyLlama(config, weights)


@dataclass(frozen=True, slots=True)
class Case:
    """A model, what the server calls it, and texts `[text_len] int64` with the length of their prompts."""

    name: str
    model: TinyLlama
    texts: tuple[IntArray, ...]

    @property
    def prompts(self) -> list[IntArray]:
        return [text[:-NUM_STEPS] for text in self.texts]

    @property
    def steps(self) -> IntArray:
        """[NUM_STEPS, num_seqs] int64: the texts' last tokens, one of each text at a time."""
        return np.stack([text[-NUM_STEPS:] for text in self.texts], axis=1)


def random_case() -> Case:
    """Return a case whose prompts end in the middle of a block, at its end, and one token after it."""
    rng = np.random.default_rng(3)
    lengths = [length + NUM_STEPS for length in (1, 32, 33, 100)]
    texts = tuple(rng.integers(RANDOM_CONFIG.vocab_size, size=length) for length in lengths)
    return Case("random", random_model(), texts)


def trained_case() -> Case:
    """Return a case of English."""
    texts = (
        "And God said, Let there be light: and there was light. And God saw the light, that it was good.",
        "The LORD is my shepherd; I shall not want. He maketh me to lie down.",
    )
    return Case("trained", TinyLlama.load(DEFAULT_WEIGHTS), tuple(map(encode_text, texts)))


@pytest.fixture(scope="module", params=[random_case, trained_case])
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param()
    return made


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    configs = {case.name: case.model.config for case in (random_case(), trained_case())}
    flags = [f"--model={model_flag(name, config, num_seqs=4)}" for name, config in configs.items()]
    with local_server(flags, lambda _news: None) as address:
        yield address


@pytest.fixture(scope="module")
def served_logits(address: str, case: Case) -> FloatArray:
    """Decode the case's texts through the server: `[1 + NUM_STEPS, num_seqs, vocab_size]`."""
    with (
        Client(address) as client,
        Orchestrator(client, case.model, len(case.texts), case.name) as orchestrator,
    ):
        logits = [orchestrator.prefill(case.prompts)]
        logits += [orchestrator.step(tokens) for tokens in case.steps]
    return np.stack(logits)


class OracleAttention:
    """Attention in float64 over INT8 tokens, inputs and answers float16: what a server should say."""

    def __init__(self, config: ModelConfig, num_seqs: int) -> None:
        options = AttentionOptions(sm_scale=config.head_dim**-0.5)
        self.caches = [
            [OracleCache(options) for _ in range(config.num_layers)] for _ in range(num_seqs)
        ]
        self.counts: Sequence[int] = ()

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        self.counts = num_tokens
        starts = [len(layers[0]) for layers in self.caches]
        return np.concatenate(
            [start + np.arange(n) for start, n in zip(starts, num_tokens, strict=True)]
        )

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        ends = np.cumsum(self.counts)[:-1]
        rows = zip(*(np.split(x.astype(np.float16), ends) for x in (q, k, v)), strict=True)
        outs = [
            self.attend(layers[layer], *tensors)
            for layers, tensors in zip(self.caches, rows, strict=True)
        ]
        return np.concatenate(outs)

    def attend(self, cache: OracleCache, q: Half, k: Half, v: Half) -> FloatArray:
        start_pos = len(cache)
        cache.append(k, v)
        out = cache.attend(q, start_pos=start_pos).out
        return out.astype(np.float16).astype(np.float32)


@dataclass(slots=True, eq=False)
class Shaken:
    """An attention whose answers are off by as much as float16 answers may be, at random.

    With `is_cache_shaken` K and V are off, too, by as much as quantising may make them.
    """

    attention: Attention
    rng: np.random.Generator
    is_cache_shaken: bool = False

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        return self.attention.begin(num_tokens)

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        if self.is_cache_shaken:
            k, v = self.shake_rows(k), self.shake_rows(v)
        out = self.attention(layer, q, k, v)
        direction = self.rng.standard_normal(out.shape)
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        size = ANSWER_TOLERANCE * np.linalg.norm(out, axis=-1, keepdims=True)
        moved: FloatArray = (out + size * direction).astype(np.float32)
        return moved

    def shake_rows(self, x: FloatArray) -> FloatArray:
        _codes, scales = quantize(x)
        half_steps = self.rng.uniform(-0.5, 0.5, x.shape) * scales[..., None]
        moved: FloatArray = (x + half_steps).astype(np.float32)
        return moved


def local_logits(case: Case, attention: Attention) -> FloatArray:
    """Decode the case's texts in process: `[1 + NUM_STEPS, num_seqs, vocab_size]`."""
    model, config = case.model, case.model.config
    prompts = [prefill(model, prompt) for prompt in case.prompts]
    attention.begin([len(prompt) for prompt in case.prompts])
    for layer in range(config.num_layers):
        k = np.concatenate([prompt.k[layer] for prompt in prompts])
        v = np.concatenate([prompt.v[layer] for prompt in prompts])
        attention(layer, np.zeros((len(k), config.num_q_heads, config.head_dim), np.float32), k, v)
    last = np.stack([prompt.logits for prompt in prompts])
    steps = [
        model.forward(tokens, attention.begin([1] * len(tokens)), attention)
        for tokens in case.steps
    ]
    return np.stack([last, *steps])


def tolerance(case: Case, expected: FloatArray, shaken: Callable[[int], Shaken]) -> float:
    """Return how far from `expected` the logits may be: SLACK times the largest move of the draws."""
    moves = [np.abs(local_logits(case, shaken(seed)) - expected).max() for seed in range(NUM_DRAWS)]
    return SLACK * float(max(moves))


def test_logits_match_attention_over_the_same_int8_cache(
    case: Case, served_logits: FloatArray
) -> None:
    def oracle() -> OracleAttention:
        return OracleAttention(case.model.config, len(case.texts))

    expected = local_logits(case, oracle())
    atol = tolerance(case, expected, lambda seed: Shaken(oracle(), np.random.default_rng(seed)))
    assert atol < 0.05 * expected.std()  # or it would hide mistakes
    np.testing.assert_allclose(served_logits, expected, rtol=0, atol=atol)


def test_logits_match_exact_attention(case: Case, served_logits: FloatArray) -> None:
    def exact() -> ExactAttention:
        return ExactAttention(case.model.config, len(case.texts))

    expected = local_logits(case, exact())
    atol = tolerance(
        case,
        expected,
        lambda seed: Shaken(exact(), np.random.default_rng(seed), is_cache_shaken=True),
    )
    assert atol < 0.3 * expected.std()  # or it would hide mistakes
    np.testing.assert_allclose(served_logits, expected, rtol=0, atol=atol)


def test_a_sequence_is_answered_as_if_it_were_alone(
    address: str, case: Case, served_logits: FloatArray
) -> None:
    with (
        Client(address) as client,
        Orchestrator(client, case.model, 1, case.name) as orchestrator,
    ):
        logits = [orchestrator.prefill(case.prompts[:1])]
        logits += [orchestrator.step(tokens[:1]) for tokens in case.steps]
    assert np.abs(np.stack(logits)[:, 0] - served_logits[:, 0]).max() < 0.05 * served_logits.std()


def test_sessions_are_closed_at_the_end(address: str, case: Case) -> None:
    with Client(address) as client:
        num_before = client.server_info().num_sessions
        with Orchestrator(client, case.model, 3, case.name):
            assert client.server_info().num_sessions == num_before + 3
        assert client.server_info().num_sessions == num_before
