"""A small Llama-style decoder in NumPy, with the attention left to the caller.

The demo keeps the weights, the projections and the sampling on the client, and sends each layer's
q, k and v to a server that holds the KV cache and answers with the attention's output. So
`TinyLlama.forward` takes the attention as a callable. `exact_attention.ExactAttention` is the FP32
one to run in process, and to compare a server's answers with.

Tokens of several sequences travel in one flat axis, `num_tokens`; a token's sequence is known to
the attention alone, its position in that sequence is given in `positions`.

All arithmetic is float32. The weights come from `training/train_demo_model.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

__all__ = [
    "DEFAULT_WEIGHTS",
    "Attend",
    "FloatArray",
    "IntArray",
    "ModelConfig",
    "TinyLlama",
    "decode_text",
    "encode_text",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Weight = npt.NDArray[np.floating]

# (layer, q [num_tokens, num_q_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim])
# -> [num_tokens, num_q_heads, head_dim], all float32. It appends k and v to its cache first, so a
# token attends to itself and to all before it in its sequence.
Attend = Callable[[int, FloatArray, FloatArray, FloatArray], FloatArray]

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "tiny-kjv.safetensors"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes of a decoder; they travel in the weights file's metadata."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    max_context: int
    norm_eps: float


def encode_text(text: str) -> IntArray:
    """Return the UTF-8 bytes of `text` as tokens, `[num_tokens] int64`."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def decode_text(tokens: IntArray) -> str:
    """Return the text of `tokens [num_tokens] int64`; broken UTF-8 becomes U+FFFD."""
    return bytes(tokens.astype(np.uint8)).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, float32; a projection is `[in_size, out_size]`."""

    attn_norm: FloatArray
    qkv_proj: FloatArray  # q, k and v side by side
    o_proj: FloatArray
    mlp_norm: FloatArray
    gate_up_proj: FloatArray  # gate and up side by side
    down_proj: FloatArray


class TinyLlama:
    """The decoder without its attention: RMSNorm, projections, RoPE, SwiGLU, embedding and head."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight]) -> None:
        """Take `weights` by their names in the training script, each `[out_size, in_size]`."""
        self.config = config
        self._embedding = np.asarray(weights["embed.weight"], dtype=np.float32)
        self._final_norm = np.asarray(weights["norm.weight"], dtype=np.float32)
        self._head = _stacked(weights, ["lm_head"])
        self._layers = [_read_layer(weights, f"layers.{i}.") for i in range(config.num_layers)]
        self._cos, self._sin = _rope_tables(config)

    @classmethod
    def load(cls, path: str | Path = DEFAULT_WEIGHTS) -> TinyLlama:
        """Read a safetensors file whose metadata holds the config as JSON under `config`.

        Raises:
            ValueError: The file's metadata has no config.
        """
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "config" not in metadata:
            raise ValueError(f"{path} must have a `config` in its metadata, got {sorted(metadata)}")
        return cls(ModelConfig(**json.loads(metadata["config"])), weights)

    def embed(self, tokens: IntArray) -> FloatArray:
        """Look up `tokens [num_tokens] int64`; returns `[num_tokens, hidden_size] float32`."""
        return self._embedding[tokens]

    def qkv(
        self, layer: int, x: FloatArray, positions: IntArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Compute a layer's query, key and value, with RoPE applied to query and key.

        Args:
            layer: Index of the layer.
            x: `[num_tokens, hidden_size] float32`, the residual stream before the layer.
            positions: `[num_tokens] int64`, each in [0, max_context).

        Returns:
            q `[num_tokens, num_q_heads, head_dim]`, k and v `[num_tokens, num_kv_heads, head_dim]`,
            float32 and contiguous.
        """
        config, weights = self.config, self._layers[layer]
        normed = _rms_norm(x, weights.attn_norm, config.norm_eps)
        heads = (normed @ weights.qkv_proj).reshape(len(x), -1, config.head_dim)
        split = config.num_q_heads + config.num_kv_heads
        rotated = self._rotate(heads[:, :split], positions)
        q, k = np.split(rotated, [config.num_q_heads], axis=1)
        return np.ascontiguousarray(q), np.ascontiguousarray(k), heads[:, split:].copy()

    def finish_layer(self, layer: int, x: FloatArray, attn_out: FloatArray) -> FloatArray:
        """Apply the layer's output projection, its SwiGLU and both residual sums.

        Args:
            layer: Index of the layer.
            x: `[num_tokens, hidden_size] float32`, the residual stream before the layer.
            attn_out: `[num_tokens, num_q_heads, head_dim] float32`.

        Returns:
            `[num_tokens, hidden_size] float32`, the residual stream after the layer.
        """
        weights = self._layers[layer]
        x = x + attn_out.reshape(len(x), -1) @ weights.o_proj
        normed = _rms_norm(x, weights.mlp_norm, self.config.norm_eps)
        gate, up = np.split(normed @ weights.gate_up_proj, 2, axis=1)
        mlp_out: FloatArray = (_silu(gate) * up) @ weights.down_proj
        return x + mlp_out

    def logits(self, x: FloatArray) -> FloatArray:
        """Map `x [num_tokens, hidden_size]` to next-token logits `[num_tokens, vocab_size]`."""
        return _rms_norm(x, self._final_norm, self.config.norm_eps) @ self._head

    def forward(self, tokens: IntArray, positions: IntArray, attend: Attend) -> FloatArray:
        """Run every layer, with `attend` for the attention.

        Args:
            tokens: `[num_tokens] int64`.
            positions: `[num_tokens] int64`, each token's position in its own sequence.
            attend: The attention; it is called once per layer, in order.

        Returns:
            Next-token logits, `[num_tokens, vocab_size] float32`.
        """
        x = self.embed(tokens)
        for layer in range(self.config.num_layers):
            q, k, v = self.qkv(layer, x, positions)
            x = self.finish_layer(layer, x, attend(layer, q, k, v))
        return self.logits(x)

    def _rotate(self, heads: FloatArray, positions: IntArray) -> FloatArray:
        """Apply RoPE (Su et al. 2021) to `heads [num_tokens, num_heads, head_dim]`.

        Dimension i is paired with i + head_dim / 2, as Llama's released weights have it.
        """
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate(
            (first * cos - second * sin, second * cos + first * sin), axis=-1, dtype=np.float32
        )


def _read_layer(weights: Mapping[str, Weight], prefix: str) -> _Layer:
    def stacked(*names: str) -> FloatArray:
        return _stacked(weights, [prefix + name for name in names])

    return _Layer(
        attn_norm=np.asarray(weights[prefix + "attn_norm.weight"], dtype=np.float32),
        qkv_proj=stacked("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        o_proj=stacked("attn.o_proj"),
        mlp_norm=np.asarray(weights[prefix + "mlp_norm.weight"], dtype=np.float32),
        gate_up_proj=stacked("mlp.gate_proj", "mlp.up_proj"),
        down_proj=stacked("mlp.down_proj"),
    )


def _stacked(weights: Mapping[str, Weight], names: Sequence[str]) -> FloatArray:
    """Join projections `[out_size, in_size]` into one `[in_size, sum of out_sizes] float32`."""
    joined = np.concatenate([weights[f"{name}.weight"] for name in names])
    return np.ascontiguousarray(joined.T, dtype=np.float32)


def _rope_tables(config: ModelConfig) -> tuple[FloatArray, FloatArray]:
    """Return the cosines and sines of RoPE's angles, each `[max_context, head_dim / 2]`."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    angles = np.outer(np.arange(config.max_context), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rms_norm(x: FloatArray, gain: FloatArray, eps: float) -> FloatArray:
    """Scale each row of `x [num_tokens, hidden_size]` to unit mean square, then by `gain`."""
    mean_square: FloatArray = np.square(x).mean(axis=-1, keepdims=True)
    scale: FloatArray = 1 / np.sqrt(mean_square + np.float32(eps))
    return x * scale * gain


def _silu(x: FloatArray) -> FloatArray:
    """Return x * sigmoid(x); the tanh form cannot overflow."""
    half = np.float32(0.5)
    gate: FloatArray = half + half * np.tanh(half * x)
    return x * gate
