"""Requests built and responses read: the shared, pure half of the sync and the asyncio client."""

from __future__ import annotations

import os
import secrets
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from types import MappingProxyType
from typing import Protocol

import numpy as np

from octavo.v1 import octavo_pb2 as pb
from octavo_client._config import check_seconds
from octavo_client._errors import RefusedError
from octavo_client._status import error_from_status
from octavo_client._types import (
    LaunchStats,
    Model,
    PoolStats,
    ServerInfo,
    ServerStats,
    SessionOptions,
    SessionState,
    StageTimes,
)


class HasSessionId(Protocol):
    """A sync or an asyncio session."""

    @property
    def session_id(self) -> str:
        """Name for people."""


_MAX_POSITION = 2**32 - 1
"""What the wire's fields hold."""

PAGE_SIZE = 1000
"""Sessions asked for at once when listing."""

MAX_RENEWED = 4096
"""Sessions that one KeepAlive may name."""

_MAX_MS = 2**63 - 1
"""No lease is longer; the server shortens it anyway."""

_POLICIES = {"keep": pb.DISCONNECT_POLICY_KEEP, "close": pb.DISCONNECT_POLICY_CLOSE}


def check_span(name: str, start_pos: int, num_tokens: int = 0) -> None:
    """Check that positions fit the wire, those after `num_tokens` tokens too.

    Raises:
        ValueError: One does not.
        TypeError: It is no integer.
    """
    if index(start_pos) < 0:
        raise ValueError(f"{name} must be 0 or more, got {start_pos}")
    if start_pos + num_tokens > _MAX_POSITION:
        raise ValueError(
            f"{name} must be at most {_MAX_POSITION - num_tokens}, got {start_pos}; "
            "no cache is longer"
        )


_KEYS_AT_ONCE = 64

_keys: deque[int] = deque()
"""Drawn ahead: asking the system takes as long for 64 as for one, and longer than all else of a step's message."""

# Two processes with the same keys would take each other's appends for replays of their own.
os.register_at_fork(after_in_child=_keys.clear)


def random_key() -> int:
    """Return a random step key, never 0, which would mean none."""
    try:
        return _keys.pop() or 1
    except IndexError:
        drawn = secrets.token_bytes(_KEYS_AT_ONCE * 8)
        _keys.extend(struct.unpack(f"{_KEYS_AT_ONCE}Q", drawn))
        return _keys.pop() or 1


def open_request(model: str, options: SessionOptions) -> pb.OpenSessionRequest:
    """Return the request for a new session; sent again, it opens no second one.

    Raises:
        ValueError, TypeError: An option is none that a session can have.
    """
    lease_s = options.get("lease_s")
    reserve_tokens = options.get("reserve_tokens", 0)
    check_span("reserve_tokens", reserve_tokens)
    return pb.OpenSessionRequest(
        model=model,
        request_id=secrets.token_hex(16),
        lease_ms=0 if lease_s is None else milliseconds("lease_s", lease_s),
        disconnect_policy=_disconnect_policy(options.get("on_disconnect", "keep")),
        reserve_tokens=reserve_tokens,
    )


def import_request(model: str, options: SessionOptions) -> pb.ImportSessionRequest:
    """Return the first message of an import, without data; sent again, it opens no second session.

    Raises:
        ValueError, TypeError: An option is none that a session can have.
    """
    opening = open_request(model, options)
    is_asked = "on_disconnect" in options
    return pb.ImportSessionRequest(
        model=model,
        request_id=opening.request_id,
        lease_ms=opening.lease_ms,
        disconnect_policy=opening.disconnect_policy
        if is_asked
        else pb.DISCONNECT_POLICY_UNSPECIFIED,
        reserve_tokens=opening.reserve_tokens,
    )


def milliseconds(name: str, seconds: float) -> int:
    """Return a time as the wire has it, at least 1 ms.

    Raises:
        ValueError, TypeError: It is no positive, finite number of seconds.
    """
    check_seconds(name, seconds)
    return min(max(round(seconds * 1000), 1), _MAX_MS)


def _disconnect_policy(name: str) -> pb.DisconnectPolicy:
    try:
        return _POLICIES[name]
    except KeyError:
        raise ValueError(f"on_disconnect must be 'keep' or 'close', got {name!r}") from None


def renewals(sessions: Iterable[HasSessionId]) -> Iterator[pb.KeepAliveRequest]:
    """Yield the requests that renew the leases of sessions, as many a request as it may name."""
    session_ids = [session.session_id for session in sessions]
    for start in range(0, len(session_ids), MAX_RENEWED):
        yield pb.KeepAliveRequest(session_ids=session_ids[start : start + MAX_RENEWED])


def read_leases(response: pb.KeepAliveResponse) -> dict[str, RefusedError]:
    """Return why sessions were not renewed, by session id; those that were are left out."""
    return {
        lease.session_id: error_from_status(lease.error)
        for lease in response.leases
        if lease.HasField("error")
    }


def truncate_request(
    session_id: str, length: int, expected_lengths: Sequence[int]
) -> pb.TruncateSessionRequest:
    """Return the request to truncate a session; empty `expected_lengths` = no guard.

    Raises:
        ValueError: The length is negative, or longer than any session.
        TypeError: It is no integer.
    """
    check_span("length", length)
    return pb.TruncateSessionRequest(
        session_id=session_id, length=length, expected_lengths=expected_lengths
    )


def read_server_info(response: pb.ServerInfoResponse) -> ServerInfo:
    """Return the server's description of itself."""
    models = {model.name: _read_model(model) for model in response.models}
    return ServerInfo(
        version=response.version,
        incarnation=response.incarnation,
        backend=response.backend,
        backend_description=response.backend_description,
        models=MappingProxyType(models),
        max_message_bytes=response.max_message_bytes,
        max_steps_in_flight=response.max_steps_in_flight,
        num_sessions=response.num_sessions,
        max_sessions=response.max_sessions,
        default_lease_s=response.default_lease_ms / 1000,
        max_lease_s=response.max_lease_ms / 1000,
    )


def read_server_stats(response: pb.ServerStatsResponse) -> ServerStats:
    """Return what the server has done and holds."""
    pools = {
        pool.model: PoolStats(
            pool.num_blocks, pool.num_free_blocks, pool.block_size, pool.block_bytes
        )
        for pool in response.pools
    }
    return ServerStats(
        num_steps=response.num_steps,
        num_appended_tokens=response.num_appended_tokens,
        launches=tuple(map(_read_launches, response.launches)),
        received_bytes=response.received_bytes,
        sent_bytes=response.sent_bytes,
        refusals=MappingProxyType(dict(sorted(response.refusals.items()))),
        num_queued=response.num_queued,
        max_queued_steps=response.max_queued_steps,
        num_sessions=response.num_sessions,
        num_streams=response.num_streams,
        max_streams=response.max_streams,
        pools=MappingProxyType(pools),
        device_free_bytes=response.device_free_bytes,
        num_opened_sessions=response.num_opened_sessions,
        num_expired_sessions=response.num_expired_sessions,
        uptime_s=response.uptime_s,
    )


def read_session(session: pb.Session) -> SessionState:
    """Return a session as the server reported it."""
    return SessionState(
        session_id=session.session_id,
        handle=session.session_handle,
        model=session.model,
        lengths=tuple(session.lengths),
        num_blocks=session.num_blocks,
        lease_s=session.lease_ms / 1000,
        lease_remaining_s=session.lease_remaining_ms / 1000,
        on_disconnect=(
            "close" if session.disconnect_policy == pb.DISCONNECT_POLICY_CLOSE else "keep"
        ),
        reserved_tokens=session.reserved_tokens,
    )


def read_stage_times(result: pb.StepResult) -> StageTimes | None:
    """Return what a step cost, where its result says so."""
    if not result.HasField("stage_times"):
        return None
    times = result.stage_times
    return StageTimes(
        queue_us=times.queue_us,
        batch_size=times.batch_size,
        batch_tokens=times.batch_tokens,
        copy_in_us=times.copy_in_us,
        kernel_us=times.kernel_us,
        copy_out_us=times.copy_out_us,
    )


def _read_launches(launches: pb.LaunchStats) -> LaunchStats:
    return LaunchStats(
        max_batch_size=launches.max_batch_size,
        num_launches=launches.num_launches,
        num_steps=launches.num_steps,
        num_entries=launches.num_entries,
        num_tokens=launches.num_tokens,
        queue_us=launches.queue_us,
        copy_in_us=launches.copy_in_us,
        kernel_us=launches.kernel_us,
        copy_out_us=launches.copy_out_us,
        cache_bytes=launches.cache_bytes,
    )


def _read_model(model: pb.Model) -> Model:
    sinks = np.array(model.sinks, dtype=np.float32).reshape(-1, model.num_q_heads)
    return Model(
        name=model.name,
        num_layers=model.num_layers,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=model.block_size,
        max_context=model.max_context,
        num_blocks=model.num_blocks,
        num_free_blocks=model.num_free_blocks,
        sm_scale=tuple(model.sm_scale),
        window=tuple(model.window),
        soft_cap=tuple(model.soft_cap),
        sinks=sinks if sinks.size else None,
        deterministic=model.deterministic,
    )
