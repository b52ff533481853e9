"""An example orchestrator: a decoder that runs here, with its KV cache and attention on a server.

The orchestrator holds the weights and runs embedding, projections, RoPE, MLP, head and sampling. The
server holds K and V and attends. A prompt's attention runs here, and its K and V go up at once; then
every new token costs one step per layer, and one step serves all sequences:

    model = TinyLlama.load()
    with Client("localhost:50051") as client, Orchestrator(client, model, num_seqs=2) as orchestrator:
        logits = orchestrator.prefill([encode_text("In the beginning"), encode_text("And God")])
        for _ in range(100):
            tokens = logits.argmax(axis=-1)
            logits = orchestrator.step(tokens)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from octavo_client import Client, Entry, Progress, Session
from octavo_client.demo.exact_attention import ExactAttention
from octavo_client.demo.model import FloatArray, IntArray, TinyLlama

__all__ = ["MODEL_NAME", "Orchestrator", "Prefill", "RemoteAttention", "prefill"]

MODEL_NAME = "tiny-kjv"
"""Name of the demo's model on a server."""

WIRE_DTYPE = np.dtype(np.float16)
"""What q, k, v and the answers travel as: the precision that most models compute in."""


class Prefill(NamedTuple):
    """A prompt after its forward pass.

    Attributes:
        logits: `[vocab_size] float32`, of the token after the prompt.
        k: `[num_layers, prompt_len, num_kv_heads, head_dim] float32`.
        v: Like `k`.
    """

    logits: FloatArray
    k: FloatArray
    v: FloatArray


class RemoteAttention:
    """Causal attention on a server, one Decode step per layer for all sequences; an `Attend`.

    Used like `ExactAttention`, and with the same results but for the INT8 cache:

        model.forward(tokens, attention.begin([1, 1]), attention)
    """

    def __init__(
        self,
        client: Client,
        sessions: Sequence[Session],
        dtype: npt.DTypeLike = WIRE_DTYPE,
    ) -> None:
        """Attend in `sessions`, one for each sequence; q, k and v travel as `dtype`."""
        self.step_seconds: list[float] = []  # of each layer's step, from q to the answer
        self._client = client
        self._sessions = tuple(sessions)
        self._dtype = np.dtype(dtype)
        self._counts: tuple[int, ...] = ()

    def begin(self, num_tokens: Sequence[int]) -> IntArray:
        """Announce a ragged step of `num_tokens[i]` new tokens for sequence i, zero allowed.

        Returns:
            The positions of the step's tokens, `[sum(num_tokens)] int64`, sequence after sequence.
        """
        starts = [session.lengths[0] for session in self._sessions]
        self._counts = tuple(num_tokens)
        runs = [start + np.arange(n) for start, n in zip(starts, self._counts, strict=True)]
        return np.concatenate(runs).astype(np.int64)

    def __call__(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        """Send q, k and v of a layer's new tokens; return the attention's output, as `Attend` says."""
        entries = [
            Entry(session, layer, num_tokens)
            for session, num_tokens in zip(self._sessions, self._counts, strict=True)
            if num_tokens
        ]
        started = time.perf_counter()
        result = self._client.decode_batch(entries, *(x.astype(self._dtype) for x in (q, k, v)))
        self.step_seconds.append(time.perf_counter() - started)
        out: npt.NDArray[Any] = result.raise_for_errors().out
        return out.astype(np.float32)


class Orchestrator:
    """Decodes several sequences of one model at once; a context manager that closes its sessions."""

    def __init__(
        self, client: Client, model: TinyLlama, num_seqs: int, model_name: str = MODEL_NAME
    ) -> None:
        """Open `num_seqs` sessions of the server's model `model_name`, whose shape is `model`'s."""
        self._model = model
        with ExitStack() as stack:
            self.sessions = tuple(
                stack.enter_context(client.open_session(model_name)) for _ in range(num_seqs)
            )
            self._open_sessions = stack.pop_all()
        self.attention = RemoteAttention(client, self.sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._open_sessions.__exit__(*exc_info)

    def prefill(
        self, prompts: Sequence[IntArray], progress: Progress = lambda _done, _total: None
    ) -> FloatArray:
        """Run the prompts here and upload their K and V.

        Args:
            prompts: One `[prompt_len] int64` per sequence, none empty.
            progress: Called with the prompt tokens uploaded, and all of them.

        Returns:
            Logits of each sequence's next token, `[num_seqs, vocab_size] float32`.
        """
        logits = []
        num_uploaded, num_tokens = 0, sum(map(len, prompts))
        for session, prompt in zip(self.sessions, prompts, strict=True):
            progress(num_uploaded, num_tokens)
            filled = prefill(self._model, prompt)
            session.append(filled.k.astype(WIRE_DTYPE), filled.v.astype(WIRE_DTYPE))
            num_uploaded += len(prompt)
            logits.append(filled.logits)
        progress(num_uploaded, num_tokens)
        return np.stack(logits)

    def step(self, tokens: IntArray) -> FloatArray:
        """Append one token to each sequence, `[num_seqs] int64`.

        Returns:
            Logits of each sequence's next token, `[num_seqs, vocab_size] float32`.
        """
        positions = self.attention.begin([1] * len(self.sessions))
        return self._model.forward(tokens, positions, self.attention)

    def generate(
        self,
        logits: FloatArray,
        num_new_tokens: int,
        sampler: Callable[[FloatArray], IntArray],
    ) -> Iterator[IntArray]:
        """Draw tokens after `logits`, those of `prefill`; yield each step's, `[num_seqs] int64`."""
        tokens = sampler(logits)
        yield tokens
        for _ in range(num_new_tokens - 1):
            tokens = sampler(self.step(tokens))
            yield tokens


def prefill(model: TinyLlama, prompt: IntArray) -> Prefill:
    """Run a prompt `[prompt_len] int64` with exact attention in process, and keep its K and V."""
    attention = ExactAttention(model.config)
    cached: list[tuple[FloatArray, FloatArray]] = []

    def attend(layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        cached.append((k, v))
        return attention(layer, q, k, v)

    logits = model.forward(prompt, attention.begin([len(prompt)]), attend)
    keys, values = zip(*cached, strict=True)
    return Prefill(logits[-1], np.stack(keys), np.stack(values))
