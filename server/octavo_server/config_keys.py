"""The keys of the configuration, each declared once: `ServerConfig` is the server's, `ModelKeys` one model's."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_server.config_schema import (
    Kind,
    address,
    boolean,
    byte_size,
    integer,
    number,
    one_of,
    per_layer,
    required,
    setting,
    show_bytes,
    size_bytes,
    text,
)
from octavo_server.model import BLOCK_SIZES, MAX_HEAD_DIM, ModelSpec

MAX_TOKENS = 2**30
"""Most tokens of a context or a window, so that positions stay within int32."""
NO_HOST = "none"
"""The host of a server that listens on its Unix socket alone."""

MAX_LEASE_S = 10 * 365 * 86_400.0
"""Longer than any process lives, and below what the clocks' arithmetic holds."""

_MAX_HEADS = 1024
_LOG_LEVELS = ("debug", "info", "warning", "error")
_BACKENDS = ("auto", "cpu", "cuda", "reference")


@dataclass(frozen=True, slots=True)
class MemorySize:
    """The size of a pool: bytes, or a fraction of what is free when it is allocated."""

    bytes: int | None = None
    fraction: float | None = None

    def resolve(self, free_bytes: int) -> int:
        """Return the size in bytes while `free_bytes` are free."""
        if self.bytes is not None:
            return self.bytes
        return int(free_bytes * (self.fraction or 0.0))


def _memory() -> Kind:
    def parse(value: object) -> MemorySize:
        if isinstance(value, str):
            percent = value.strip().removesuffix("%")
            if percent != value.strip():
                return _fraction(float(percent) / 100)
            num_bytes = size_bytes(value)
            if not num_bytes:
                raise ValueError
            return MemorySize(bytes=num_bytes)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        return _fraction(float(value))

    expected = 'a size such as "4GiB", or a share of the free memory such as "50%" or 0.5'
    return Kind(expected, parse, show=_show_memory)


def _fraction(fraction: float) -> MemorySize:
    if not 0.0 < fraction <= 1.0:
        raise ValueError
    return MemorySize(fraction=fraction)


def _show_memory(size: MemorySize) -> str:
    return f"{size.fraction:.0%}" if size.bytes is None else show_bytes(size.bytes)


def _path() -> Kind:
    return text("the path of a file or folder, or nothing", r"[^\0]*")


DEFAULT_MEMORY = MemorySize(fraction=0.5)
"""The size of the pools, all together, of the models that give neither num_blocks nor memory."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model to serve and the size of its pool: exactly one of num_blocks and memory is given."""

    spec: ModelSpec
    num_blocks: int | None = None
    memory: MemorySize | None = None


DEFAULT_MAX_QUEUED_STEPS = 1024
"""Sixteen steps of each of 64 streams. Of one session of an 8B model they hold 12 MiB, of 64 sessions 0.75 GiB; in a
longer queue they would only wait longer."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `octavo-server serve` runs: the server's keys, and its models."""

    host: str = setting(
        "127.0.0.1",
        text("an address", r"\S+"),
        "Address to listen on; none = no port, only unix_socket.",
    )
    port: int = setting(
        50051, integer(0, 65535), "Port to listen on; 0 takes a free one, and prints it."
    )
    unix_socket: str = setting(
        "",
        text("the path of a file, or nothing", r"[^\0]*"),
        "Unix socket to listen on as well, as unix:PATH; only the server's user may connect.",
    )
    backend: str = setting(
        "auto", one_of(*_BACKENDS), "What runs the kernels; auto takes the fastest that works here."
    )
    num_threads: int = setting(0, integer(0, 1024), "Threads of the kernels; 0 = one a core.")
    pin_threads: bool = setting(
        False, boolean(), "Bind each thread of the cpu kernels to a core of its own."
    )
    max_sessions: int = setting(1024, integer(1, 2**20), "Most open sessions.")
    max_streams: int = setting(64, integer(1, 4096), "Most Decode and Append streams at a time.")
    max_steps_in_flight: int = setting(
        32, integer(1, 4096), "Steps of one stream that are worked on before more are read."
    )
    max_queued_steps: int = setting(
        DEFAULT_MAX_QUEUED_STEPS,
        integer(1, 2**20),
        "Most steps that wait for their launch; one more is refused.",
    )
    max_unary_calls: int = setting(64, integer(1, 1024), "Most unary calls at a time.")
    max_message_bytes: int = setting(
        64 * 2**20, byte_size(64 * 2**10, 2047 * 2**20), "Largest message that a client may send."
    )
    shared_memory: bool = setting(
        False, boolean(), "Share memory with clients on this machine that ask for it."
    )
    shared_memory_bytes: int = setting(
        32 * 2**20, byte_size(2**20, 2**32), "Memory shared with each stream that asks for it."
    )
    lease_s: float = setting(
        900.0, number(0.1, MAX_LEASE_S), "Seconds without use after which a session is closed."
    )
    max_lease_s: float = setting(
        86_400.0, number(0.1, MAX_LEASE_S), "Longest lease that a client may ask for."
    )
    tenant_max_sessions: int = setting(
        0, integer(0, 2**20), "Most open sessions of one tenant; 0 = no limit of its own."
    )
    tenant_max_tokens: int = setting(
        0, integer(0, 2**40), "Most tokens that one tenant's blocks may hold; 0 = no limit."
    )
    tenant_max_bytes: int = setting(
        0, byte_size(0, 2**50), "Most bytes of one tenant's blocks; 0 = no limit."
    )
    tls_cert: str = setting("", _path(), "PEM file with the server's certificate chain: TLS.")
    tls_key: str = setting("", _path(), "PEM file with its private key.")
    tls_client_ca: str = setting(
        "", _path(), "PEM file with the authorities whose certificates clients must show."
    )
    tenants: str = setting(
        "", _path(), "YAML file with the tenants and the hashes of their tokens."
    )
    allow_plaintext: bool = setting(
        False, boolean(), "Serve in plain text on an address that is not loopback."
    )
    metrics_address: str = setting(
        "", address(), "Address for Prometheus to scrape; port 0 takes a free one."
    )
    health_address: str = setting(
        "", address(), "Address that answers health checks alone, in plain text, without a token."
    )
    allow_plaintext_monitoring: bool = setting(
        False, boolean(), "Let those two be addresses that are not loopback."
    )
    otlp_endpoint: str = setting(
        "", text("a URL, or nothing", r"(https?://\S+)?"), "Where to send OpenTelemetry traces."
    )
    trace_sample_ratio: float = setting(
        0.01, number(0, 1), "Share of the steps without a traced parent that are traced."
    )
    snapshot_dir: str = setting(
        "", _path(), "Folder that keeps the sessions over a restart; one server's alone."
    )
    drain_timeout_s: float = setting(
        30.0, number(0, 3600), "Seconds that accepted work has to finish after SIGTERM."
    )
    log_level: str = setting("info", one_of(*_LOG_LEVELS), "Least important logs to write.")
    log_format: str = setting("text", one_of("text", "json"), "How a line of the logs is written.")
    models: tuple[ModelConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model, as written."""

    name: str = required(
        text("a name of letters, digits and . _ : / -", r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}"),
        "What clients call the model; unique.",
    )
    num_layers: int = required(integer(1, 1024), "Layers.")
    num_q_heads: int = required(integer(1, _MAX_HEADS), "Query heads, a multiple of num_kv_heads.")
    num_kv_heads: int = required(integer(1, _MAX_HEADS), "Key/value heads.")
    head_dim: int = required(integer(8, MAX_HEAD_DIM, multiple_of=8), "Elements of one head.")
    max_context: int = required(integer(1, MAX_TOKENS), "Most tokens of one session.")
    block_size: int = setting(32, one_of(*BLOCK_SIZES), "Tokens of one block.")
    num_blocks: int | None = setting(
        None, integer(1, 2**31 - 1), "Size of the pool in blocks; instead of memory."
    )
    memory: MemorySize | None = setting(  # noqa: RUF009 - makes a field, not a value
        None,
        _memory(),
        f"Size of the pool; models without it and num_blocks share {_show_memory(DEFAULT_MEMORY)}.",
    )
    sm_scale: float | tuple[float, ...] | None = setting(
        None, per_layer(number(1e-6, 1e6)), "Softmax scale; 1/sqrt(head_dim) without it."
    )
    window: int | tuple[int, ...] = setting(
        0,
        per_layer(integer(0, MAX_TOKENS)),
        "Sliding window in tokens, its own token included; 0 = none.",
    )
    soft_cap: float | tuple[float, ...] = setting(
        0.0, per_layer(number(1e-3, 1e6, or_zero=True)), "Soft cap of the scores; 0 = none."
    )
    sinks: str | None = setting(
        None,
        text("the path of a safetensors file", r".+"),
        "safetensors file with the sink logits: tensor `sinks`, or its only one, "
        "float32 [num_layers, num_q_heads]. The path starts from the YAML file's folder.",
    )
    deterministic: bool = setting(
        False, boolean(), "Answers are the same bits whatever the batch and the number of threads."
    )
