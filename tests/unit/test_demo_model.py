"""The demo's NumPy model against the torch model that trains it, on small random weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from octavo_client.demo.exact_attention import ExactAttention, exact_attention
from octavo_client.demo.model import (
    DEFAULT_WEIGHTS,
    IntArray,
    ModelConfig,
    TinyLlama,
    decode_text,
    encode_text,
)
from octavo_client.demo.sampling import Sampler, generate

torch = pytest.importorskip("torch", reason="the reference is the torch model")

TRAINING_SCRIPT = Path(__file__).parents[2] / "client" / "training" / "train_demo_model.py"
CONFIG = ModelConfig(
    num_layers=3,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=24,
    intermediate_size=40,
    vocab_size=64,
    rope_theta=100.0,
    max_context=96,
    norm_eps=1e-5,
)

# FP32 sums of at most 48 terms in another order: about sqrt(48) eps relative per product, through
# 4 products a layer and 3 layers, on logits of magnitude 10: sqrt(48) * 12 * 1.2e-7 * 10 = 1e-4.
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """Import the training script, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("train_demo_model", TRAINING_SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights_file(training: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export random weights, large enough that attention and gates are far from uniform."""
    torch.manual_seed(3)
    decoder = training.Decoder(CONFIG)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    training.export(decoder, path)
    return path


@pytest.fixture(scope="module")
def model(weights_file: Path) -> TinyLlama:
    return TinyLlama.load(weights_file)


def random_tokens(num_tokens: int, seed: int = 5) -> IntArray:
    return np.random.default_rng(seed).integers(CONFIG.vocab_size, size=num_tokens)


def full_logits(model: TinyLlama, tokens: IntArray) -> np.ndarray:
    attention = ExactAttention(model.config)
    return model.forward(tokens, attention.begin([len(tokens)]), attention)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, CONFIG.max_context])
def test_logits_equal_torch(
    model: TinyLlama, training: ModuleType, weights_file: Path, num_tokens: int
) -> None:
    tokens = random_tokens(num_tokens)
    with torch.no_grad():
        expected = training.load(weights_file)(torch.from_numpy(tokens)[None])[0].numpy()
    logits = full_logits(model, tokens)
    assert logits.dtype == np.float32
    assert np.abs(expected).max() > 1  # or the comparison would say nothing
    np.testing.assert_allclose(logits, expected, atol=LOGITS_TOLERANCE)


def test_load_reads_the_config(model: TinyLlama) -> None:
    assert model.config == CONFIG


def test_load_refuses_a_file_without_config(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415

    path = tmp_path / "bare.safetensors"
    save_file({"norm.weight": np.ones(4, dtype=np.float32)}, path)
    with pytest.raises(ValueError, match="must have a `config`"):
        TinyLlama.load(path)


def test_qkv_shapes(model: TinyLlama) -> None:
    q, k, v = model.qkv(0, model.embed(random_tokens(5)), np.arange(5))
    assert (q.shape, k.shape, v.shape) == ((5, 6, 8), (5, 2, 8), (5, 2, 8))
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in (q, k, v))


def test_rope_scores_depend_on_distance_alone(model: TinyLlama) -> None:
    x = model.embed(random_tokens(2))
    near, far = (model.qkv(0, x, np.array([p, p + 7])) for p in (0, 60))
    scores = [np.einsum("hd,hd->h", q[1, ::3], k[0]) for q, k, _ in (near, far)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)
    assert not np.allclose(near[1], far[1], atol=0.1)


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 12], [19, 1]])
def test_incremental_decode_equals_full_forward(model: TinyLlama, chunks: list[int]) -> None:
    tokens = random_tokens(20)
    attention = ExactAttention(CONFIG)
    steps = np.split(tokens, np.cumsum(chunks)[:-1])
    logits = [model.forward(step, attention.begin([len(step)]), attention) for step in steps]
    np.testing.assert_allclose(
        np.concatenate(logits), full_logits(model, tokens), atol=LOGITS_TOLERANCE
    )
    assert attention.lengths().tolist() == [20]


def test_ragged_batch_equals_each_sequence_alone(model: TinyLlama) -> None:
    sequences = [random_tokens(n, seed=n) for n in (9, 4, 6)]
    attention = ExactAttention(CONFIG, num_seqs=3)
    counts_by_step: Sequence[Sequence[int]] = ([5, 0, 1], [4, 4, 5])
    taken = [0, 0, 0]
    logits: list[list[np.ndarray]] = [[], [], []]
    for counts in counts_by_step:
        runs = [s[t : t + n] for s, t, n in zip(sequences, taken, counts, strict=True)]
        out = model.forward(np.concatenate(runs), attention.begin(counts), attention)
        for seq_idx, rows in enumerate(np.split(out, np.cumsum(counts)[:-1])):
            logits[seq_idx].append(rows)
        taken = [t + n for t, n in zip(taken, counts, strict=True)]
    for tokens, parts in zip(sequences, logits, strict=True):
        expected = full_logits(model, tokens)
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=LOGITS_TOLERANCE)


def test_exact_attention_by_hand() -> None:
    q = np.zeros((1, 2, 4), dtype=np.float32)
    q[0, :, 0] = 2.0  # scaled by 4 ** -0.5: the scores are the keys' first dimensions
    keys = np.zeros((2, 1, 4), dtype=np.float32)
    keys[1, 0, 0] = np.log(3.0)
    values = np.array([[[0.0] * 4], [[4.0] * 4]], dtype=np.float32)
    np.testing.assert_allclose(exact_attention(q, keys, values), np.full((1, 2, 4), 3.0), rtol=1e-6)


def test_attention_refuses_more_than_max_context(model: TinyLlama) -> None:
    attention = ExactAttention(CONFIG)
    full = random_tokens(CONFIG.max_context)
    model.forward(full, attention.begin([len(full)]), attention)
    attention.begin([1])
    with pytest.raises(ValueError, match="must fit 96 tokens, got 97"):
        model.forward(full[:1], np.array([0]), attention)


def test_attention_refuses_what_was_not_begun() -> None:
    attention = ExactAttention(CONFIG, num_seqs=2)
    with pytest.raises(ValueError, match="must have 2 counts, got 1"):
        attention.begin([3])
    attention.begin([1, 1])
    q = np.zeros((3, 6, 8), dtype=np.float32)
    with pytest.raises(ValueError, match="must have the begun 2 tokens, got 3"):
        attention(0, q, q[:, :2], q[:, :2])


def test_generation_is_seed_deterministic(model: TinyLlama) -> None:
    prompts = [random_tokens(3), random_tokens(8)]

    def run(seed: int) -> list[list[int]]:
        return [t.tolist() for t in generate(model, prompts, 24, Sampler(1.0, seed=seed))]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert [len(t) for t in run(1)] == [24, 24]


def test_greedy_generation_follows_the_full_forward(model: TinyLlama) -> None:
    prompt = random_tokens(4)
    (new,) = generate(model, [prompt], 6, Sampler(temperature=0))
    logits = full_logits(model, np.concatenate([prompt, new]))
    assert new.tolist() == logits[3:-1].argmax(axis=-1).tolist()


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(1.0), {0, 1, 2, 3}),
        (Sampler(1.0, top_k=2), {1, 3}),
        (Sampler(1.0, top_k=9), {0, 1, 2, 3}),
        (Sampler(1.0, top_p=0.5), {3}),
        (Sampler(1.0, top_p=0.75), {1, 3}),
        (Sampler(1.0, top_k=1, top_p=0.75), {3}),
        (Sampler(0.0), {3}),
    ],
)
def test_sampler_keeps_the_likeliest(sampler: Sampler, kept: set[int]) -> None:
    logits = np.log(np.array([[0.1, 0.25, 0.05, 0.6]], dtype=np.float32))
    drawn = sampler(np.repeat(logits, 2000, axis=0))
    assert drawn.dtype == np.int64
    assert set(drawn.tolist()) == kept


@pytest.mark.parametrize(("temperature", "likeliest"), [(1.0, 0.6), (0.5, 0.36 / 0.435)])
def test_sampler_draws_in_proportion(temperature: float, likeliest: float) -> None:
    logits = np.log(np.array([[0.1, 0.25, 0.05, 0.6]], dtype=np.float32))
    drawn = Sampler(temperature, seed=4)(np.repeat(logits, 20_000, axis=0))
    # Four standard deviations of a share of 20,000 draws, at most 4 * 0.5 / sqrt(20,000).
    assert np.mean(drawn == 3) == pytest.approx(likeliest, abs=0.0142)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(-1.0, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0)]
)
def test_sampler_refuses_settings_out_of_range(
    temperature: float, top_k: int, top_p: float
) -> None:
    with pytest.raises(ValueError, match="must have temperature >= 0"):
        Sampler(temperature, top_k, top_p)


def test_text_round_trip() -> None:
    assert encode_text("In the beginning").dtype == np.int64
    assert decode_text(encode_text("In the beginning é")) == "In the beginning é"
    assert decode_text(np.array([73, 255])) == "I\ufffd"


def test_reader_makes_prose_of_verses(training: ModuleType) -> None:
    dump = "Ge1:1 In the beginning.\nGe1:2 And the earth.\nGe2:1 Thus.\n1Sm1:1 Now there was.\n\n"
    assert training.books_of(dump) == {
        "Ge": "In the beginning.\nAnd the earth.\n\nThus.\n\n",
        "1Sm": "Now there was.\n\n",
    }


def test_file_corpus_holds_the_end_out(training: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 955 + "b" * 45)
    corpus = training.file_corpus(path)
    assert bytes(corpus.train.tolist()) == b"a" * 955
    assert bytes(corpus.held_out.tolist()) == b"b" * 45


def test_learning_rate_warms_up_and_anneals(training: ModuleType) -> None:
    recipe = training.Recipe(minutes=1)
    rates = [training.learning_rate(recipe, *at) for at in ((0, 0.0), (500, 0.1), (900, 1.0))]
    assert rates[0] < 0.01 * recipe.peak_lr
    assert 0.9 * recipe.peak_lr < rates[1] < recipe.peak_lr
    assert rates[2] == pytest.approx(recipe.final_lr)


def test_context_grows_with_progress(training: ModuleType) -> None:
    recipe = training.Recipe(minutes=1)
    contexts = [training.context_at(recipe, progress) for progress in (0.0, 0.49, 0.5, 0.8, 1.2)]
    assert contexts == [256, 256, 512, 1024, 1024]


def test_training_learns_and_exports(training: ModuleType, tmp_path: Path) -> None:
    text = torch.arange(4, dtype=torch.uint8).repeat(100)
    recipe = training.Recipe(0.02, batch_tokens=256, contexts=((0.0, 32),), warmup_steps=2)
    torch.manual_seed(0)
    path = tmp_path / "trained.safetensors"
    ticks = count(0.0, 0.005)  # a clock that counts its readings: the number of steps is fixed
    model, corpus = training.Decoder(CONFIG), training.Corpus(text, text)
    training.Trainer(model, corpus, recipe, path, clock=lambda: next(ticks)).run()
    logits = full_logits(TinyLlama.load(path), np.arange(32) % 4)
    assert (logits.argmax(axis=-1) < 4).all()  # of 64 tokens, only these four occur


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_training_time_must_be_positive(
    training: ModuleType, minutes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        training.main([f"--minutes={minutes}"])
    assert f"--minutes: must be a positive number, got {minutes}" in capsys.readouterr().err


def test_too_little_text_is_refused_before_training(
    training: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.safetensors"
    text.write_text("a" * 22_755)  # 1,024 of which are held out
    threads = f"--threads={torch.get_num_threads()}"  # of the whole process
    with pytest.raises(SystemExit, match="2"):
        training.main([threads, "--minutes=0.001", f"--text={text}", f"--out={out}"])
    error = capsys.readouterr().err
    assert "--text: held-out text must be over 1024 bytes, got 1024" in error
    assert not out.exists()


def test_evaluation_names_every_book(training: ModuleType) -> None:
    torch.manual_seed(4)
    model = training.Decoder(CONFIG).eval()
    texts = torch.randint(CONFIG.vocab_size, (4, 400), dtype=torch.uint8)
    corpus = training.Corpus(texts[0], texts[1], {"Ruth": texts[2], "Jas": texts[3]})
    bits = dict(training.evaluate(model, corpus))
    assert list(bits) == ["held-out text", "Ruth", "Jas", "training text, 4 windows"]
    measured = [training.bits_per_byte(model, text, CONFIG.max_context) for text in texts]
    assert list(bits.values()) == pytest.approx([*measured[1:], measured[0]])
    assert len(set(measured)) == 4


def test_evaluation_refuses_too_little_text(training: ModuleType) -> None:
    with pytest.raises(ValueError, match="must be over 96 bytes, got 96"):
        training.eval_windows(torch.zeros(96, dtype=torch.uint8), 96, None)


def test_trained_weights_know_english() -> None:
    model = TinyLlama.load()
    tokens = encode_text("And the king said unto the people, Go ye up into the land.\n")
    logits = full_logits(model, tokens)[:-1]
    surprise = np.logaddexp.reduce(logits, axis=-1) - logits[np.arange(len(logits)), tokens[1:]]
    assert surprise.mean() / np.log(2) < 2.6  # bits per byte; 8 would be no knowledge at all
    assert DEFAULT_WEIGHTS.stat().st_size <= 8_000_000
