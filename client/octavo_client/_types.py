"""What calls return, and what a batch is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from octavo_client._errors import RefusedError

if TYPE_CHECKING:
    from octavo_client._async_session import AsyncSession
    from octavo_client._session import Session


@dataclass(frozen=True, slots=True)
class Model:
    """A cache shape that the server serves.

    Attributes:
        name: Unique name.
        num_layers: Layers, 0-based.
        num_q_heads: Query heads; head h reads kv head h // (num_q_heads // num_kv_heads).
        num_kv_heads: Key/value heads.
        head_dim: Elements of one head.
        block_size: Tokens of one block.
        max_context: Most tokens that one session may hold.
        num_blocks: Blocks in the pool.
        num_free_blocks: Blocks that no session held when the server was asked.
        sm_scale: [num_layers] softmax scale.
        window: [num_layers] tokens of the sliding window, 0 = none.
        soft_cap: [num_layers] soft cap of the scores, 0 = none.
        sinks: [num_layers, num_q_heads] float32 attention sink logits, or None.
        deterministic: Whether answers are the same bits whatever the batch and the number of threads.
    """

    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_context: int
    num_blocks: int
    num_free_blocks: int
    sm_scale: tuple[float, ...]
    window: tuple[int, ...]
    soft_cap: tuple[float, ...]
    sinks: NDArray[np.float32] | None = field(compare=False)
    deterministic: bool


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server: its backend, its limits, and the models that it caches for.

    Attributes:
        version: Version of the server's software.
        incarnation: Random name of the server process; every session id starts with it.
        backend: Backend in use, such as "cpu".
        backend_description: The backend's own words: instruction set, threads, device.
        models: Models by name, in the order of the server's configuration.
        max_message_bytes: Largest message that the server receives.
        max_steps_in_flight: Steps of one stream that the server works on at once.
        num_sessions: Open sessions when the server was asked.
        max_sessions: Most sessions that the server keeps.
        default_lease_s: Lease of a session that asks for none, in seconds.
        max_lease_s: Longest lease that the server grants.
    """

    version: str
    incarnation: str
    backend: str
    backend_description: str
    models: Mapping[str, Model]
    max_message_bytes: int
    max_steps_in_flight: int
    num_sessions: int
    max_sessions: int
    default_lease_s: float = 0.0
    max_lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LaunchStats:
    """Launches of about one batch size, added up since the server's start. See StageTimes for the stages.

    Attributes:
        max_batch_size: The largest batch size (entries of a launch) counted here, a power of two; the smallest is one
            more than half of it.
        num_launches: Launches: runs of the backend, each for all steps that shared it.
        num_steps: Steps that shared them.
        num_entries: Entries of those steps.
        num_tokens: Tokens of those entries.
        queue_us: Microseconds that every step waited, added up.
        copy_in_us: Of every launch.
        kernel_us: Of every launch.
        copy_out_us: Of every launch, until its last answer was handed over.
        cache_bytes: Bytes of the cache that they read and wrote; over kernel_us, the bandwidth of the kernels.
    """

    max_batch_size: int
    num_launches: int
    num_steps: int
    num_entries: int
    num_tokens: int
    queue_us: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A model's blocks.

    Attributes:
        num_blocks: Blocks in the pool.
        num_free_blocks: Blocks that no session holds.
        block_size: Tokens of one block.
        block_bytes: Bytes of one block in all layers.
    """

    num_blocks: int
    num_free_blocks: int
    block_size: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class ServerStats:
    """What the server has done since its start, in totals that only grow, and what it held when it was asked.

    Attributes:
        num_steps: Steps that launches ran, messages of appends among them.
        num_appended_tokens: Tokens stored, once for each layer.
        launches: Launches by batch size, ascending; sizes that never ran are left out.
        received_bytes: Bytes of the messages that the server received.
        sent_bytes: Bytes of the messages that it sent.
        refusals: Refused calls, steps and entries, by reason; reasons that never came up are left out.
        num_queued: Steps, truncates and closes that waited for their turn.
        max_queued_steps: How many may be queued before a step is refused with QueueFull.
        num_sessions: Open sessions.
        num_streams: Open streams.
        max_streams: Streams that may be open.
        pools: Blocks by model, in the order of the server's configuration.
        device_free_bytes: Bytes that were free on the server's device beside the pools.
        num_opened_sessions: Sessions opened, restored and imported ones among them.
        num_expired_sessions: Sessions closed because their lease ended.
        uptime_s: Seconds since the server's start.
    """

    num_steps: int
    num_appended_tokens: int
    launches: tuple[LaunchStats, ...]
    received_bytes: int
    sent_bytes: int
    refusals: Mapping[str, int]
    num_queued: int
    max_queued_steps: int
    num_sessions: int
    num_streams: int
    max_streams: int
    pools: Mapping[str, PoolStats]
    device_free_bytes: int
    num_opened_sessions: int
    num_expired_sessions: int
    uptime_s: float


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session as the server reported it.

    Attributes:
        session_id: Name for people and for get_session, attach.
        handle: Name on the wire's data calls.
        model: Name of its model.
        lengths: [num_layers] cached tokens.
        num_blocks: Blocks that it holds, those that it reserved among them.
        lease_s: Seconds without use after which the server closes it.
        lease_remaining_s: What is left of them.
        on_disconnect: "keep" or "close"; see SessionOptions.
        reserved_tokens: Tokens whose blocks it holds whatever its length.
    """

    session_id: str
    handle: int
    model: str
    lengths: tuple[int, ...]
    num_blocks: int
    lease_s: float = 0.0
    lease_remaining_s: float = 0.0
    on_disconnect: str = "keep"
    reserved_tokens: int = 0


class SessionOptions(TypedDict, total=False):
    """How a session is opened.

    Attributes:
        lease_s: Seconds without a step, an append, a truncate or a keep_alive after which the server closes the
            session; it shortens what is longer than its longest. None = the server's default.
        on_disconnect: "keep" (default): the session stays until its lease ends, and the client goes on with it once it
            is connected again. "close": the server closes it when the connection that last carried a step of it ends,
            also where the client would have connected again.
        reserve_tokens: Tokens whose blocks are taken at once and kept until the session is closed, so that none of its
            first so many tokens is ever refused for want of blocks; 0 = none (default).
    """

    lease_s: float | None
    on_disconnect: Literal["keep", "close"]
    reserve_tokens: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a batch: the new tokens of one layer of one session.

    Attributes:
        session: An open session of the client that runs the batch.
        layer: 0-based layer.
        num_tokens: Rows of q, and of k and v, that are the entry's.
        start_pos: Position of the first of them; None = the layer's length, or without k and v the position that makes
            the last query the last cached token.
    """

    session: Session | AsyncSession
    layer: int
    num_tokens: int = 1
    start_pos: int | None = None


class StepOptions(TypedDict, total=False):
    """What every decode call takes besides its tensors.

    Attributes:
        causal: Whether token i attends up to position start_pos + i (default); False, without k and v only: every query
            attends to all that is cached.
        return_lse: Whether the result carries the log-sum-exp; False by default.
        stage_times: Whether the result says what the step cost on the server; False by default.
        timeout: Seconds from submit to result, positive and finite; None = Timeout.step_s (default).
    """

    causal: bool
    return_lse: bool
    stage_times: bool
    timeout: float | None


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What one step cost on the server, in microseconds.

    The stages follow each other without a gap: their sum is the time from when the server read the step to when its
    answer was there. What is left of the time from submit to result is the wire's and the client's. Steps that shared a
    launch, one run of the server's backend, have copy_in_us and kernel_us in common.

    Attributes:
        queue_us: From when the server read the step until its launch was begun: checks, and the launches before.
        batch_size: Entries that shared the launch, of this step and of others, refused ones included.
        batch_tokens: Tokens of those entries.
        copy_in_us: Admitting the entries, laying the launch out, and joining the tensors of its steps.
        kernel_us: In the backend, copies to and from a device of its own included.
        copy_out_us: From there until the step's answer was cut out, after those of the steps before it in the launch.
    """

    queue_us: int
    batch_size: int
    batch_tokens: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step as a task of Client.pipeline yields it: what decode_batch takes.

    Attributes:
        entries: What the rows of q, k and v belong to, one after the other.
        q: [total_tokens, num_q_heads, head_dim] float16, bfloat16 or float32, numpy or torch.
        k: [total_tokens, num_kv_heads, head_dim] of q's dtype, to be appended; None = only read.
        v: As k.
        options: See StepOptions.
    """

    entries: Sequence[Entry]
    q: Any
    k: Any | None = None
    v: Any | None = None
    options: StepOptions = field(default_factory=StepOptions)


@dataclass(frozen=True, slots=True, eq=False)
class DecodeResult:
    """The answer to one entry.

    Attributes:
        out: [num_tokens, num_q_heads, head_dim] attention output, q's dtype and kind. A numpy array is read-only.
        lse: [num_tokens, num_q_heads] float32 natural-log sum of exponentials of the attended scores, attention sinks
            excluded; None when it was not asked for.
        stage_times: What the step cost on the server; None when it was not asked for, or when no launch ran the step.
    """

    out: Any
    lse: Any | None
    stage_times: StageTimes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """The answer to a batch.

    Attributes:
        out: [total_tokens, num_q_heads, head_dim] attention output of all entries one after the other, q's dtype and
            kind; zeros for refused entries. A numpy array is read-only.
        lse: [total_tokens, num_q_heads] float32, or None when it was not asked for.
        errors: Refused entries, by entry index.
        slices: Rows of each entry, so that out[slices[i]] is entry i's.
        stage_times: What the step cost on the server; None when it was not asked for, or when no launch ran the step.
    """

    out: Any
    lse: Any | None
    errors: Mapping[int, RefusedError]
    slices: tuple[slice, ...]
    stage_times: StageTimes | None = None

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, entry_idx: int) -> DecodeResult:
        """Return one entry's answer.

        Raises:
            RefusedError: The entry was refused.
        """
        rows = self.slices[entry_idx]
        error = self.errors.get(entry_idx % len(self.slices))
        if error is not None:
            raise error
        lse = None if self.lse is None else self.lse[rows]
        return DecodeResult(self.out[rows], lse, self.stage_times)

    def raise_for_errors(self) -> BatchResult:
        """Raise the first refused entry's error; return self when there is none."""
        for entry_idx in sorted(self.errors):
            raise self.errors[entry_idx]
        return self
