"""A step as the engine takes and answers it, and the checks that need no turn: those against the model's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo_server.backends.base import HostArray
from octavo_server.errors import OctavoError, Reason, mismatch
from octavo_server.model import ModelSpec
from octavo_server.stats import StageTimes
from octavo_server.tenant import Tenant


@dataclass(frozen=True, slots=True, eq=False)
class StepOrigin:
    """Where steps come from: one stream or call. It stands for its client where clients take turns.

    Attributes:
        tenant: Whose sessions the steps may name.
        is_gone: Asked when a step's turn comes; the steps of one that has gone are dropped, unapplied and unanswered.
        is_stream: Whether it is a Decode stream, with whose end sessions may close.
    """

    tenant: Tenant
    is_gone: Callable[[], bool] = lambda: False
    is_stream: bool = False


class StepRequest(NamedTuple):
    """A ragged batch of entries; entry e is (handles[e], layers[e], start_pos[e], num_tokens[e]).

    Attributes:
        handles: [num_entries] session handles.
        layers: [num_entries] layers.
        start_pos: [num_entries] positions of the entries' first tokens.
        num_tokens: [num_entries] tokens of the entries.
        step_key: Same on a retry; 0 = never a replay.
        q: [total_tokens, num_q_heads, head_dim], or None to append only.
        k: [total_tokens, num_kv_heads, head_dim], or None to attend only.
        v: Like k.
        timeout_ms: Longest wait in the queue; 0 = for ever.
        return_lse: Whether the answer carries the log-sum-exp.
        is_causal: Whether token i attends to [0, start_pos + i], else to the whole cache.
        return_stage_times: Whether the answer says what the step cost.
    """

    handles: Sequence[int]
    layers: Sequence[int]
    start_pos: Sequence[int]
    num_tokens: Sequence[int]
    step_key: int = 0
    q: HostArray | None = None
    k: HostArray | None = None
    v: HostArray | None = None
    timeout_ms: int = 0
    return_lse: bool = False
    is_causal: bool = True
    return_stage_times: bool = False

    @property
    def num_entries(self) -> int:
        """Entries of the step."""
        return len(self.handles)

    @property
    def total_tokens(self) -> int:
        """Rows of every tensor."""
        return sum(self.num_tokens)

    @property
    def tensors(self) -> list[tuple[str, HostArray]]:
        """The tensors that are there, each with its name."""
        named = (("q", self.q), ("k", self.k), ("v", self.v))
        return [(name, tensor) for name, tensor in named if tensor is not None]


@dataclass(slots=True, eq=False)
class StepAnswer:
    """What became of a step.

    Attributes:
        out: [total_tokens, num_q_heads, head_dim] in q's dtype, zeros for refused entries; None without q or on error.
        lse: [total_tokens, num_q_heads] float32 when asked for.
        entry_errors: Why an entry was refused, by entry index.
        error: Why the whole step was refused.
        stage_times: What the step cost, when asked for and a launch ran it.
    """

    out: HostArray | None = None
    lse: NDArray[np.float32] | None = None
    entry_errors: dict[int, OctavoError] = field(default_factory=dict)
    error: OctavoError | None = None
    stage_times: StageTimes | None = None


MAX_ENTRIES = 4096
"""Entries of one step; a larger batch goes in several steps, which share launches all the same."""


def check_entries(request: StepRequest) -> None:
    """Check the entry arrays against each other and against the rows of the tensors.

    Raises:
        OctavoError: EMPTY_STEP, SHAPE_MISMATCH or DUPLICATE_ENTRY.
    """
    num_entries = request.num_entries
    if num_entries == 0:
        raise mismatch(Reason.EMPTY_STEP, "session_handles", "at least one entry", "none")
    if num_entries > MAX_ENTRIES:
        expected = f"at most {MAX_ENTRIES} entries"
        raise mismatch(Reason.SHAPE_MISMATCH, "session_handles", expected, num_entries)
    for name in ("layers", "start_pos", "num_tokens"):
        length = len(getattr(request, name))
        if length != num_entries:
            expected = f"{num_entries} values, one a session handle"
            raise mismatch(Reason.SHAPE_MISMATCH, name, expected, f"{length} values")
    if 0 in request.num_tokens:
        raise mismatch(Reason.SHAPE_MISMATCH, "num_tokens", "at least 1 in every entry", 0)
    total_tokens = request.total_tokens
    for name, tensor in request.tensors:
        if len(tensor) != total_tokens:
            expected = f"of {total_tokens} tokens, as num_tokens says"
            raise mismatch(Reason.SHAPE_MISMATCH, name, expected, f"{len(tensor)} tokens")
    if (
        num_entries > 1
        and len(set(zip(request.handles, request.layers, strict=True))) < num_entries
    ):
        raise _duplicate(request)


def check_tensors(request: StepRequest, spec: ModelSpec) -> None:
    """Check q, k and v against each other and the model; their rows were checked with the entries.

    Raises:
        OctavoError: SHAPE_MISMATCH or DTYPE_MISMATCH.
    """
    if (request.k is None) != (request.v is None):
        missing, given = ("k", "v") if request.k is None else ("v", "k")
        raise mismatch(Reason.SHAPE_MISMATCH, missing, f"there because {given} is there", "nothing")
    if not request.is_causal and request.k is not None:
        raise mismatch(Reason.SHAPE_MISMATCH, "causal", "true in a step with k and v", "false")
    tensors = request.tensors
    dtype = tensors[0][1].dtype
    for name, tensor in tensors:
        num_heads = spec.num_q_heads if name == "q" else spec.num_kv_heads
        if tensor.shape[1:] != (num_heads, spec.head_dim):
            expected_shape = [len(tensor), num_heads, spec.head_dim]
            raise mismatch(Reason.SHAPE_MISMATCH, name, expected_shape, list(tensor.shape))
    if any(tensor.dtype != dtype for _, tensor in tensors):
        actual = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors)
        raise mismatch(Reason.DTYPE_MISMATCH, "q, k, v", "of one dtype", actual)


def _duplicate(request: StepRequest) -> OctavoError:
    keys = list(zip(request.handles, request.layers, strict=True))
    handle, layer = next(key for key in keys if keys.count(key) > 1)
    expected = "each (session, layer) at most once in a step"
    actual = f"session handle {handle} layer {layer} twice"
    return mismatch(Reason.DUPLICATE_ENTRY, "entries", expected, actual)
