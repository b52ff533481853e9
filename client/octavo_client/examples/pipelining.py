"""What a pipeline of micro-batches gains: decoding in alternated rounds, whole batch against micro-batches.

    python -m octavo_client.examples.pipelining                     a GPU's part is waited for
    python -m octavo_client.examples.pipelining --compute numpy     it is computed, on the cores the server needs too
    python -m octavo_client.examples.pipelining --delay-us 250      a network's delay each way

The attention's shape is Llama 3.1 8B's (32 query heads, 8 kv heads, head_dim 128), the weights are random. By default
what an orchestrator's GPU would do is waited for: --layer-us per layer for the whole batch, half of it for half the
batch. A GPU needs none of the host's cores, and a batch bound by compute can be cut like that; --fixed-us is what
does not shrink, such as the time to read the weights. Without --target a server is started here, and shares the
machine's cores with this process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from octavo_client import Client, Entry, Session, Step, Steps, micro_batches
from octavo_client.demo.local_server import local_server
from octavo_client.examples.delay_proxy import delay_proxy

__all__ = ["main"]

MODEL = "pipelining"
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN, INTERMEDIATE = 512, 1408
BLOCK_SIZE = 32

FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
Rows = tuple[HalfArray, HalfArray, HalfArray]
"""q [num_tokens, num_q_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim]."""


class Compute(Protocol):
    """All of a layer but its attention, of x [num_tokens, hidden]."""

    def before(self, x: FloatArray) -> Rows:
        """Project to q, k and v."""

    def after(self, x: FloatArray, out: HalfArray) -> FloatArray:
        """Project the attention's output and run the MLP."""


class NumpyCompute:
    """Computes; every layer has the same random weights, float32."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def weights(rows: int, columns: int) -> FloatArray:
            drawn = rng.standard_normal((rows, columns), np.float32)
            return drawn / np.float32(rows**0.5)

        self._qkv = weights(HIDDEN, (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        self._o = weights(NUM_Q_HEADS * HEAD_DIM, HIDDEN)
        self._up, self._down = weights(HIDDEN, 2 * INTERMEDIATE), weights(INTERMEDIATE, HIDDEN)

    def before(self, x: FloatArray) -> Rows:
        """Project to q, k and v."""
        return split_heads(_normed(x) @ self._qkv)

    def after(self, x: FloatArray, out: HalfArray) -> FloatArray:
        """Project the attention's output and run the MLP."""
        x = x + out.reshape(len(x), -1).astype(np.float32) @ self._o
        gate, up = np.split(_normed(x) @ self._up, 2, axis=1)
        mlp: FloatArray = (gate * up / (1 + np.exp(-gate))) @ self._down
        return x + mlp


@dataclass(frozen=True, slots=True)
class WaitingCompute:
    """Waits as long as a GPU would take, half before the attention and half after; the values are x repeated.

    Attributes:
        row_s: Seconds for a token's row in a layer.
        fixed_s: Seconds for a layer of any micro-batch.
    """

    row_s: float
    fixed_s: float

    def before(self, x: FloatArray) -> Rows:
        """Wait, and make q, k and v of x."""
        self._wait(len(x))
        return split_heads(np.tile(x, (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM // HIDDEN))

    def after(self, x: FloatArray, out: HalfArray) -> FloatArray:
        """Wait, and make the next x of the attention's output."""
        self._wait(len(x))
        mixed: FloatArray = x + out.reshape(len(x), -1, HIDDEN).mean(axis=1, dtype=np.float32)
        return _normed(mixed)

    def _wait(self, num_rows: int) -> None:
        time.sleep((self.fixed_s + num_rows * self.row_s) / 2)


def split_heads(rows: FloatArray) -> Rows:
    """Cut [num_tokens, num_heads * head_dim] into q, k and v, in the wire's dtype."""
    heads = rows.astype(np.float16).reshape(len(rows), -1, HEAD_DIM)
    q, k, v = np.split(heads, [NUM_Q_HEADS, NUM_Q_HEADS + NUM_KV_HEADS], axis=1)
    return np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)


def _normed(x: FloatArray) -> FloatArray:
    normed: FloatArray = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(1e-5))
    return normed


@dataclass(frozen=True, slots=True)
class Decoder:
    """A batch of sessions, and the model that decodes them.

    Attributes:
        client: The sessions' client.
        sessions: One for each row of x.
        compute: The model without its attention.
        x: [num_sessions, hidden] float32, what every round begins with.
        num_tokens: Tokens of a round.
    """

    client: Client
    sessions: Sequence[Session]
    compute: Compute
    x: FloatArray
    num_tokens: int

    def decode(self, rows: slice) -> Steps[FloatArray]:
        """Decode a micro-batch: this is the model code, and it knows nothing of pipelines."""
        x, sessions = self.x[rows], self.sessions[rows]
        for _ in range(self.num_tokens):
            for layer in range(sessions[0].model.num_layers):
                entries = [Entry(session, layer) for session in sessions]
                result = yield Step(entries, *self.compute.before(x))
                x = self.compute.after(x, result.raise_for_errors().out)
        return x

    def round(self, num_parts: int) -> tuple[float, FloatArray]:
        """Decode a round; return its seconds and the last x. Afterwards the sessions are as they were."""
        length = self.sessions[0].lengths[0]
        started = time.perf_counter()
        parts = micro_batches(len(self.sessions), num_parts)
        found = self.client.pipeline(self.decode(rows) for rows in parts)
        seconds = time.perf_counter() - started
        for session in self.sessions:
            session.truncate(length)
        return seconds, np.concatenate(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status: 0, or 1 where the answers differ."""
    args = _parse(argv)
    with ExitStack() as stack:
        # One thread for BLAS: the server beside it needs the other cores.
        stack.enter_context(threadpool_limits(1, user_api="blas"))
        target = args.target or stack.enter_context(
            local_server(["--model", model_flag(args)], lambda _news: None)
        )
        if args.delay_us:
            target = stack.enter_context(delay_proxy(target, args.delay_us))
        client = stack.enter_context(Client(target))
        sessions = [stack.enter_context(client.open_session(MODEL)) for _ in range(args.sessions)]
        fill(sessions, args.context)
        x = np.random.default_rng(1).standard_normal((args.sessions, HIDDEN), np.float32)
        return compare(Decoder(client, sessions, _compute(args), x, args.tokens), args)


def model_flag(args: argparse.Namespace) -> str:
    """Return what `octavo-server serve --model` takes."""
    max_context = args.context + args.tokens
    keys = {
        "name": MODEL,
        "num_layers": args.layers,
        "num_q_heads": NUM_Q_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "max_context": max_context,
        "num_blocks": args.sessions * -(-max_context // BLOCK_SIZE),
    }
    return ",".join(f"{key}={value}" for key, value in keys.items())


def fill(sessions: Sequence[Session], num_tokens: int) -> None:
    """Append a random prompt to each session."""
    rng = np.random.default_rng(2)
    shape = (2, sessions[0].model.num_layers, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    k, v = rng.standard_normal(shape, np.float32).astype(np.float16)
    for session in sessions:
        session.append(k, v)


def compare(decoder: Decoder, args: argparse.Namespace) -> int:
    """Decode in alternated rounds, print what was found; returns the exit status."""
    parts = (1, args.micro_batches)
    for num_parts in parts:
        decoder.round(num_parts)  # warm
    seconds: dict[int, list[float]] = {num_parts: [] for num_parts in parts}
    last: dict[int, FloatArray] = {}
    for _ in range(args.rounds):
        for num_parts in parts:
            taken, last[num_parts] = decoder.round(num_parts)
            seconds[num_parts].append(taken)
    num_layer_steps = args.tokens * args.layers
    for num_parts in parts:
        ms = median(seconds[num_parts]) * 1e3 / num_layer_steps
        print(f"{num_parts} micro-batch{'es' * (num_parts > 1)}: {ms:.2f} ms a layer")
    gains = sorted(a / b for a, b in zip(*(seconds[n] for n in parts), strict=True))
    print(
        f"{args.micro_batches} micro-batches are {median(gains):.2f}x as fast as the whole batch "
        f"({gains[0]:.2f} to {gains[-1]:.2f}, {args.rounds} rounds)"
    )
    one, other = (last[num_parts] for num_parts in parts)
    difference = float(np.abs(one - other).max() / np.abs(one).max())
    print(f"largest difference of their results: {difference:.1e} of the largest value")
    return 0 if difference < args.tolerance else 1


def _compute(args: argparse.Namespace) -> Compute:
    if args.compute == "numpy":
        return NumpyCompute()
    return WaitingCompute(args.layer_us / 1e6 / args.sessions, args.fixed_us / 1e6)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--target", metavar="HOST:PORT", help="a server; without it, one is started here")
    add("--compute", choices=("wait", "numpy"), default="wait", help="how (%(default)s)")
    add("--layer-us", type=int, default=2000, help="waited a layer, whole batch (%(default)s)")
    add("--fixed-us", type=int, default=0, help="waited besides, any micro-batch (%(default)s)")
    add("--delay-us", type=int, default=0, help="the network's, each way (%(default)s)")
    add("--sessions", type=int, default=32, help="of the batch (%(default)s)")
    add("--context", type=int, default=512, help="tokens of each (%(default)s)")
    add("--layers", type=int, default=4, help="(%(default)s)")
    add("--tokens", type=int, default=8, help="of a round (%(default)s)")
    add("--rounds", type=int, default=8, help="(%(default)s)")
    add("--micro-batches", type=int, default=2, help="(%(default)s)")
    add("--tolerance", type=float, default=0.05, help="of the results (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.sessions, args.context, args.layers, args.tokens, args.rounds) < 1:
        parser.error("--sessions, --context, --layers, --tokens and --rounds must be 1 or more")
    if not 2 <= args.micro_batches <= args.sessions:
        parser.error(f"--micro-batches must be from 2 to {args.sessions}, as --sessions allows")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
