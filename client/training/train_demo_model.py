"""Train the demo's byte-level decoder on the King James Bible, on a CPU, within a time budget.

The text is not kept in this repository. It is read through the `bible` program (Debian packages
`bible-kjv` and `bible-kjv-text`), or from any plain text file given with `--text`.

    python client/training/train_demo_model.py --minutes 70 --out tiny-kjv.safetensors

The learning rate follows the wall clock: it warms up, then decays by a cosine over the budget, so
a run always ends annealed. So does the context, which grows from 256 to 1,024 tokens: weights are
exported at every evaluation, but those of a run cut short know the contexts trained so far alone.
`--evaluate FILE` measures exported weights instead of training: on the held-out text, on each of its
books, and on as much of the training text.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from octavo_client.demo.model import ModelConfig

# Whole books kept out of training: narrative, wisdom, prophecy and epistle, none of which the rest
# of the text repeats at length (as Chronicles repeats Kings, or Jude repeats 2 Peter).
HELD_OUT_BOOKS = ("Ruth", "Est", "Eccl", "Dan", "Hos", "Jonah", "Jas")  # as `bible` names them
HELD_OUT_FRACTION = 0.045  # of a plain text file, taken from its end

CONFIG = ModelConfig(
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=256,
    intermediate_size=704,
    vocab_size=256,
    rope_theta=10_000.0,
    max_context=1024,
    norm_eps=1e-5,
)

VERSE = re.compile(r"^(?P<book>[1-3]?[A-Za-z]+)(?P<chapter>\d+):\d+ (?P<text>.+)$")


# ------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out bytes, each `[num_bytes] uint8`, and the books of the held-out ones."""

    train: Tensor
    held_out: Tensor
    held_out_books: Mapping[str, Tensor] = field(default_factory=dict)


def dump_bible() -> str:
    """Return the whole text of the `bible` program, one `Ge1:1 In the ...` line per verse."""
    if shutil.which("bible") is None:
        raise FileNotFoundError("bible must be on PATH: install bible-kjv, or give a --text FILE")
    command = ["bible", "-f", "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def books_of(dump: str) -> dict[str, str]:
    """Turn a verse dump into prose: one verse per line, chapters parted by a blank line."""
    chapters: dict[str, dict[str, list[str]]] = {}
    for match in filter(None, map(VERSE.match, dump.splitlines())):
        book = chapters.setdefault(match["book"], {})
        book.setdefault(match["chapter"], []).append(match["text"].strip())
    return {name: _prose(list(book.values())) for name, book in chapters.items()}


def _prose(chapters: list[list[str]]) -> str:
    return "\n\n".join("\n".join(verses) for verses in chapters) + "\n\n"


def bible_corpus() -> Corpus:
    """Read the Bible and part it into training books and `HELD_OUT_BOOKS`."""
    books = books_of(dump_bible())
    held_out = {name: books.pop(name) for name in HELD_OUT_BOOKS}
    return Corpus(
        _bytes_of("".join(books.values())),
        _bytes_of("".join(held_out.values())),
        {name: _bytes_of(text) for name, text in held_out.items()},
    )


def file_corpus(path: Path) -> Corpus:
    """Read a plain text file; its last `HELD_OUT_FRACTION` is held out."""
    data = _bytes_of(path.read_text(encoding="utf-8"))
    split = int(len(data) * (1 - HELD_OUT_FRACTION))
    return Corpus(data[:split], data[split:])


def _bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------ model


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of RoPE (Su et al. 2021), each `[max_context, head_dim]`."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(config.max_context, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [batch, num_heads, num_tokens, head_dim]`; its halves are the pairs' parts."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_q_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `x [batch, num_tokens, hidden_size]` to the same shape."""
        q = rotate(self._heads(self.q_proj(x)), cos, sin)
        k = rotate(self._heads(self.k_proj(x)), cos, sin)
        v = self._heads(self.v_proj(x))
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x [batch, num_tokens, hidden_size]` to the same shape."""
        gated = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `x [batch, num_tokens, hidden_size]` to the same shape."""
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The Llama-style decoder; its parameter names are the names in the exported file."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `tokens [batch, num_tokens] int64` to logits `[batch, num_tokens, vocab_size]`."""
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]

    def _init_weights(self) -> None:
        """Draw weights from N(0, 0.02); the two projections into the residual, 1/sqrt(2L) of it."""
        residual_scale = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 * (residual_scale if is_residual else 1.0))


def export(model: Decoder, path: Path, **facts: str) -> None:
    """Write FP16 weights, with the config and `facts` about the training in the metadata."""
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"config": json.dumps(asdict(model.config)), **facts}
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata=metadata)
    partial.replace(path)


def load(path: Path) -> Decoder:
    """Read exported weights back, as FP32."""
    with safe_open(path, framework="pt") as file:
        model = Decoder(ModelConfig(**json.loads(file.metadata()["config"])))
        names = file.keys()
        model.load_state_dict({name: file.get_tensor(name).float() for name in names})
    return model.eval()


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Contexts grow with progress; a batch keeps its number of tokens."""

    minutes: float
    batch_tokens: int = 4096
    contexts: tuple[tuple[float, int], ...] = ((0.0, 256), (0.5, 512), (0.8, 1024))
    peak_lr: float = 2e-3
    final_lr: float = 4e-5
    warmup_steps: int = 150
    weight_decay: float = 0.1
    dropout: float = 0.05
    clip_norm: float = 1.0
    eval_every_minutes: float = 5.0


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Return the rate after `step` steps and `progress` in [0, 1] of the time budget."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decayed = recipe.final_lr + (recipe.peak_lr - recipe.final_lr) * cosine
    return decayed * min(1.0, (step + 1) / recipe.warmup_steps)


def context_at(recipe: Recipe, progress: float) -> int:
    """Return the window length in tokens at `progress` in [0, 1] of the time budget."""
    return [context for begins, context in recipe.contexts if progress >= begins][-1]


def make_optimizer(model: Decoder, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.98), fused=True)


def draw_batch(data: Tensor, context: int, batch_tokens: int, rng: torch.Generator) -> Tensor:
    """Return random windows of `data`: `[batch_tokens // context, context + 1] int64`."""
    starts = torch.randint(len(data) - context, (batch_tokens // context, 1), generator=rng)
    return data[starts + torch.arange(context + 1)].long()


def batch_loss(forward: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of each byte of `windows` but the first."""
    logits = forward(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def eval_windows(data: Tensor, context: int, limit: int | None) -> Tensor:
    """Return windows that do not overlap, `[num_windows, context + 1]`; `limit` spreads evenly."""
    if len(data) <= context:
        raise ValueError(f"held-out text must be over {context} bytes, got {len(data)}")
    windows = data.unfold(0, context + 1, context).long()
    if limit is None or limit >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, limit).long()]


@torch.no_grad()
def bits_per_byte(model: Decoder, data: Tensor, context: int, limit: int | None = None) -> float:
    """Measure the model on non-overlapping windows; each starts with an empty context."""
    model.eval()
    chunks = torch.split(eval_windows(data, context, limit), 4)
    nats = sum(float(batch_loss(model, chunk)) * len(chunk) for chunk in chunks)
    model.train()
    return nats / sum(len(chunk) for chunk in chunks) / math.log(2)


def evaluate(model: Decoder, corpus: Corpus) -> Iterator[tuple[str, float]]:
    """Yield the names of texts and the model's bits per byte of them."""
    context = model.config.max_context
    yield "held-out text", bits_per_byte(model, corpus.held_out, context)
    for name, data in corpus.held_out_books.items():
        yield name, bits_per_byte(model, data, context)
    limit = len(eval_windows(corpus.held_out, context, None))
    yield f"training text, {limit} windows", bits_per_byte(model, corpus.train, context, limit)


class Trainer:
    """One training run: the model, its optimizer and the clock."""

    def __init__(
        self,
        model: Decoder,
        corpus: Corpus,
        recipe: Recipe,
        out: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.corpus, self.recipe, self.out = model, corpus, recipe, out
        self.optimizer = make_optimizer(model, recipe)
        self.rng = torch.Generator().manual_seed(1)
        self.step = self.num_bytes = 0
        self.clock = clock
        self.began = clock()
        self.forward: Callable[[Tensor], Tensor] = model

    @property
    def progress(self) -> float:
        """Fraction of the time budget spent."""
        return (self.clock() - self.began) / (60 * self.recipe.minutes)

    def run(self) -> None:
        """Train until the budget is spent, exporting at every evaluation."""
        next_eval = 60 * self.recipe.eval_every_minutes
        while self.progress < 1.0:
            loss = self._train_step()
            if self.clock() - self.began >= next_eval:
                next_eval += 60 * self.recipe.eval_every_minutes
                self._checkpoint(loss, limit=32)
            elif self.step % 100 == 0:
                self._log(f"train {loss / math.log(2):.3f}")
        self._checkpoint(loss, limit=None)

    def _train_step(self) -> float:
        recipe, progress = self.recipe, self.progress
        context = context_at(recipe, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step, progress)
        windows = draw_batch(self.corpus.train, context, recipe.batch_tokens, self.rng)
        loss = batch_loss(self.forward, windows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.step, self.num_bytes = self.step + 1, self.num_bytes + windows[:, 1:].numel()
        return float(loss.detach())

    def _checkpoint(self, loss: float, limit: int | None) -> None:
        held_out = bits_per_byte(
            self.model, self.corpus.held_out, self.model.config.max_context, limit
        )
        export(self.model, self.out, steps=str(self.step), held_out_bits=f"{held_out:.4f}")
        self._log(f"train {loss / math.log(2):.3f} held-out {held_out:.4f} bits/byte, exported")

    def _log(self, text: str) -> None:
        minutes = (self.clock() - self.began) / 60
        print(
            f"{minutes:6.1f} min  step {self.step:6d}  {self.num_bytes / 1e6:6.1f} MB  {text}",
            flush=True,
        )


def positive_minutes(text: str) -> float:
    """Return a time budget; anything but a positive number is refused."""
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return minutes


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=positive_minutes, default=70.0, help="training time budget")
    add("--text", type=Path, help="plain text file to read instead of the Bible")
    add("--out", type=Path, default=Path("tiny-kjv.safetensors"))
    add("--threads", type=int, default=2)
    add("--evaluate", type=Path, metavar="FILE", help="measure FILE, do not train")
    add("--compile", action="store_true", help="compile the model; needs a C++ compiler")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or evaluate."""
    parser = make_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    corpus = file_corpus(args.text) if args.text else bible_corpus()
    print(f"train {len(corpus.train):,} bytes, held out {len(corpus.held_out):,} bytes", flush=True)
    try:  # now rather than at the first evaluation, after minutes of training
        eval_windows(corpus.held_out, CONFIG.max_context, limit=1)
    except ValueError as error:
        parser.error(f"--text: {error}")
    if args.evaluate:
        for name, bits in evaluate(load(args.evaluate), corpus):
            print(f"{name}: {bits:.4f}", flush=True)
        return
    recipe = Recipe(args.minutes)
    model = Decoder(CONFIG, recipe.dropout)
    trainer = Trainer(model, corpus, recipe, args.out)
    if args.compile:
        trainer.forward = torch.compile(model, dynamic=False)
    trainer.run()


if __name__ == "__main__":
    main()
