"""One step from a caller's arrays to the wire and back: checked, placed, read. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from octavo.v1 import octavo_pb2 as pb
from octavo_client import _tensors
from octavo_client._config import check_seconds
from octavo_client._encoding import Parts, Result, encode_decode, encode_tensors, num_bytes
from octavo_client._errors import (
    ClientClosed,
    OctavoError,
    RefusedError,
    StepTimeout,
    message_too_large,
)
from octavo_client._mirror import Mirror
from octavo_client._shared_memory import PlacedTensors, SharedMemory
from octavo_client._status import error_from_status
from octavo_client._tensors import HostArray, ToCaller
from octavo_client._tracing import trace_parent
from octavo_client._types import BatchResult, Model, StepOptions
from octavo_client._wire import check_span, random_key, read_stage_times

_FIELDS = {
    "q": pb.Step.Q_FIELD_NUMBER,
    "k": pb.Step.K_FIELD_NUMBER,
    "v": pb.Step.V_FIELD_NUMBER,
}

_FLAGS = ("causal", "return_lse", "stage_times")
_OPTIONS = frozenset(StepOptions.__annotations__)

_MAX_START_POS_BYTES = 5
_MAX_HEADER_BYTES = 96
"""Room for what is filled in when the step is placed and sent: positions, step_id, timeout_ms, the answer's place."""

_LSE_BYTES = 4


class Placement(NamedTuple):
    """One entry: where its tokens go. `start_pos` None = where the session's mirror says."""

    mirror: Mirror
    layer: int
    num_tokens: int
    start_pos: int | None


@dataclass(slots=True, eq=False)
class Draft:
    """A checked step that is on its way to be sent.

    Attributes:
        header: The message without its tensors; positions, step_id and timeout_ms are filled in later.
        tensors: q, and k and v: as encoded fields of the message, in parts, over the caller's arrays until `keep`; or
            copied to shared memory.
        has_kv: Whether the step appends.
        placements: Its entries.
        to_caller: Turns an answer into the caller's kind of array.
        timeout_s: Seconds from submit to result.
        sent_bytes: Size of the message when it was last sent.
    """

    header: pb.Step
    tensors: Parts | PlacedTensors
    has_kv: bool
    placements: Sequence[Placement]
    to_caller: ToCaller
    timeout_s: float
    sent_bytes: int = field(default=0, init=False)
    _is_settled: bool = field(default=False, init=False)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The (session handle, layer) of each entry."""
        return [(placement.mirror.handle, placement.layer) for placement in self.placements]

    @property
    def stale(self) -> list[Mirror]:
        """Mirrors to refresh before the step can be placed."""
        stale = [p.mirror for p in self.placements if p.mirror.is_stale and p.start_pos is None]
        return list(dict.fromkeys(stale))

    def place(self) -> None:
        """Fill in the positions and note what is now in flight.

        Raises:
            ClientClosed: A session was closed meanwhile.
            ValueError: A query has no position: fewer tokens are cached than it brings.
        """
        starts = [self._start_pos(placement) for placement in self.placements]
        self.header.start_pos.extend(starts)
        if self.has_kv:
            for placement, start_pos in zip(self.placements, starts, strict=True):
                placement.mirror.begin(placement.layer, start_pos + placement.num_tokens)

    def encode(self, step_id: int, timeout_ms: int) -> bytes:
        """Return the message, once the step is placed."""
        self.header.step_id = step_id
        self.header.timeout_ms = timeout_ms
        tensors = self.tensors
        if isinstance(tensors, PlacedTensors):
            message = encode_decode(self.header, tensors.encode(self.header))
        else:
            message = encode_decode(self.header, tensors)
            self.tensors = [memoryview(message)[-num_bytes(tensors) :]]
        self.sent_bytes = len(message)
        return message

    def keep(self) -> None:
        """Copy the tensors, which the caller may change from now on; `encode` does so too."""
        if not isinstance(self.tensors, PlacedTensors):
            self.tensors = [b"".join(self.tensors)]

    def read(self, result: Result) -> BatchResult:
        """Return a step's answer as the caller's kind of array, and note what is stored.

        Raises:
            OctavoError: The server's answer makes no sense.
        """
        head = result.head
        errors = {e.entry_idx: error_from_status(e.error) for e in head.entry_errors}
        self._settle(errors)
        return BatchResult(*self._arrays(result), errors, self._slices(), read_stage_times(head))

    def fail(self, error: OctavoError) -> None:
        """Note that the whole step failed; what its answer said before stays."""
        self._settle(dict.fromkeys(range(len(self.placements)), error))

    def _start_pos(self, placement: Placement) -> int:
        mirror, layer, num_tokens, start_pos = placement
        if mirror.is_closed:
            raise ClientClosed(f"session {mirror.session_id} was closed; open a new one")
        if start_pos is not None:
            return start_pos
        length = mirror.length(layer)
        if self.has_kv:
            return length
        if self.header.HasField("causal"):
            return 0
        if length < num_tokens:
            raise ValueError(
                f"{num_tokens} causal queries without k and v need as many cached tokens, "
                f"layer {layer} of session {mirror.session_id} has {length}"
            )
        return length - num_tokens

    def _settle(self, errors: dict[int, RefusedError] | dict[int, OctavoError]) -> None:
        if not self.has_kv or self._is_settled:
            return
        self._is_settled = True
        starts = self.header.start_pos
        for entry_idx, placement in enumerate(self.placements):
            end = starts[entry_idx] + placement.num_tokens
            placement.mirror.settle(placement.layer, end, errors.get(entry_idx))

    def _arrays(self, result: Result) -> tuple[Any, Any | None]:
        tensors = self.tensors
        read = tensors.read if isinstance(tensors, PlacedTensors) else _tensors.from_wire
        try:
            out = read(result.out)
            lse = None if result.lse is None else read(result.lse)
        except ValueError as error:
            raise OctavoError(f"the server's answer makes no sense: {error}") from error
        return self.to_caller(out), None if lse is None else self.to_caller(lse)

    def _slices(self) -> tuple[slice, ...]:
        ends = list(itertools.accumulate([p.num_tokens for p in self.placements], initial=0))
        return tuple(map(slice, ends, ends[1:]))


def draft_step(
    placements: Sequence[Placement],
    tensors: tuple[Any, Any | None, Any | None],
    options: StepOptions,
    *,
    default_timeout_s: float,
    max_message_bytes: int,
    memory: SharedMemory | None = None,
) -> Draft:
    """Check a step and build its message; nothing that it lets through can fail to be sent.

    Args:
        placements: Its entries, one or more.
        tensors: q, k and v of all entries one after the other; k and v both or neither.
        options: Flags and timeout.
        default_timeout_s: Timeout unless the options have one.
        max_message_bytes: Largest message that the server receives; a step in shared memory must fit it too, for it may
            have to be sent again without.
        memory: What the client shares with the server.

    Raises:
        ValueError: An entry, a shape or a timeout that cannot be.
        TypeError: A tensor of another kind or dtype; an option that does not exist or is of another type.
        ClientClosed: An entry of a closed session.
        MessageTooLarge: The step is over the server's limit.
    """
    _check_options(options)
    model = _check_placements(placements)
    arrays = _host_arrays(tensors)
    _check_arrays(arrays, model, sum(placement.num_tokens for placement in placements))
    header = _header(placements, options)
    fields = {_FIELDS[name]: array for name, array in arrays.items()}
    encoded = encode_tensors(fields)
    message_bytes = (
        num_bytes(encoded)
        + header.ByteSize()
        + _MAX_HEADER_BYTES
        + _MAX_START_POS_BYTES * len(placements)
    )
    if message_bytes > max_message_bytes:
        raise message_too_large(message_bytes, max_message_bytes)
    placed = None if memory is None else _place(fields, header, memory)
    timeout_s = options.get("timeout")
    timeout_s = default_timeout_s if timeout_s is None else timeout_s
    to_caller = _tensors.like(tensors[0])
    return Draft(header, placed or encoded, "k" in arrays, placements, to_caller, timeout_s)


def timed_out(draft: Draft, may_be_applied: bool) -> StepTimeout:
    """Return the exception of a step that had no answer in time."""
    return StepTimeout(f"no answer within {draft.timeout_s:g} s", may_be_applied)


def _check_options(options: StepOptions) -> None:
    if not options:
        return
    unknown = options.keys() - _OPTIONS
    if unknown:
        names, known = ", ".join(sorted(unknown)), ", ".join(sorted(_OPTIONS))
        raise TypeError(f"a step has no option {names}; it has {known}")
    for name in _FLAGS:
        value = options.get(name, False)
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    timeout_s = options.get("timeout")
    if timeout_s is not None:
        check_seconds("timeout", timeout_s)


def _check_placements(placements: Sequence[Placement]) -> Model:
    if not placements:
        raise ValueError("a step needs at least one entry, got none")
    model = placements[0].mirror.model
    for placement in placements:
        _check_placement(placement, model)
    if len(placements) > 1 and len({(p.mirror, p.layer) for p in placements}) < len(placements):
        raise ValueError("a step must have one entry per session and layer; send two steps")
    return model


def _check_placement(placement: Placement, model: Model) -> None:
    mirror, layer, num_tokens, start_pos = placement
    if mirror.is_closed:
        raise ClientClosed(f"session {mirror.session_id} was closed; open a new one")
    if mirror.model.name != model.name:
        raise ValueError(f"a step is of one model, got {model.name!r} and {mirror.model.name!r}")
    check_layer(layer, model)
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be 1 or more, got {num_tokens}")
    if start_pos is not None:
        check_span("start_pos", start_pos, num_tokens)


def check_layer(layer: int, model: Model) -> None:
    """Check that a model has a layer.

    Raises:
        ValueError: It has not.
    """
    if not 0 <= layer < model.num_layers:
        raise ValueError(
            f"layer must be from 0 to {model.num_layers - 1} in model {model.name!r}, got {layer}"
        )


def _host_arrays(tensors: tuple[Any, Any | None, Any | None]) -> dict[str, HostArray]:
    q, k, v = tensors
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together; without both, the step only reads")
    named = {"q": q} if k is None else {"q": q, "k": k, "v": v}
    return {name: _tensors.to_host(name, value) for name, value in named.items()}


def _check_arrays(arrays: dict[str, HostArray], model: Model, num_tokens: int) -> None:
    dtype = arrays["q"].dtype
    for name, array in arrays.items():
        num_heads = model.num_q_heads if name == "q" else model.num_kv_heads
        shape = (num_tokens, num_heads, model.head_dim)
        if array.shape != shape:
            _tensors.check_shape(name, array, shape)
        if array.dtype != dtype:
            _tensors.check_dtype(name, array, dtype)


def _place(
    fields: dict[int, HostArray], header: pb.Step, memory: SharedMemory
) -> PlacedTensors | None:
    q = fields[pb.Step.Q_FIELD_NUMBER]
    lse_bytes = q.shape[0] * q.shape[1] * _LSE_BYTES if header.return_lse else 0
    return memory.place(fields, q.nbytes, lse_bytes)


def _header(placements: Sequence[Placement], options: StepOptions) -> pb.Step:
    header = pb.Step(
        step_key=random_key(),
        session_handles=[placement.mirror.handle for placement in placements],
        layers=[placement.layer for placement in placements],
        num_tokens=[placement.num_tokens for placement in placements],
        return_lse=bool(options.get("return_lse", False)),
        return_stage_times=bool(options.get("stage_times", False)),
        trace_parent=trace_parent(),
    )
    if not options.get("causal", True):
        header.causal = False
    return header
