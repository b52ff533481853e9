"""One valid message of every call, from which hostile ones are made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from google.protobuf.message import Message

from octavo import v1


class ModelShape(NamedTuple):
    """What messages need to know of a model."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def tensor(shape: ModelShape, num_tokens: int, num_heads: int) -> v1.Tensor:
    """Return random float16 rows."""
    values = np.random.default_rng(num_tokens).standard_normal(
        (num_tokens, num_heads, shape.head_dim), np.float32
    )
    data = values.astype(np.float16).tobytes()
    return v1.Tensor(data=data, dtype=v1.DATA_TYPE_FLOAT16, shape=values.shape)


def step(shape: ModelShape, handle: int, num_tokens: int = 2) -> v1.Step:
    """Return a step that appends to layer 0 of an empty session."""
    return v1.Step(
        step_id=1,
        step_key=2,
        session_handles=[handle],
        layers=[0],
        start_pos=[0],
        num_tokens=[num_tokens],
        q=tensor(shape, num_tokens, shape.num_q_heads),
        k=tensor(shape, num_tokens, shape.num_kv_heads),
        v=tensor(shape, num_tokens, shape.num_kv_heads),
        timeout_ms=10_000,
        return_lse=True,
        causal=True,
        return_stage_times=True,
        trace_parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def append_request(shape: ModelShape, handle: int, num_tokens: int = 2) -> v1.AppendRequest:
    """Return an append to layer 0 of an empty session."""
    return v1.AppendRequest(
        session_handle=handle,
        layer=0,
        start_pos=0,
        num_tokens=num_tokens,
        step_key=3,
        k=tensor(shape, num_tokens, shape.num_kv_heads),
        v=tensor(shape, num_tokens, shape.num_kv_heads),
    )


def valid_messages(shape: ModelShape, session_id: str, handle: int) -> dict[str, Message]:
    """Return a message for each call, about one session."""
    return {
        "ServerInfo": v1.ServerInfoRequest(),
        "ServerStats": v1.ServerStatsRequest(),
        "OpenSession": v1.OpenSessionRequest(
            model=shape.name, request_id="fuzz", lease_ms=1000, reserve_tokens=1
        ),
        "GetSession": v1.GetSessionRequest(session_id=session_id),
        "ListSessions": v1.ListSessionsRequest(page_size=2, page_token="1"),
        "KeepAlive": v1.KeepAliveRequest(session_ids=[session_id, "nobody's"]),
        "TruncateSession": v1.TruncateSessionRequest(
            session_id=session_id, length=1, expected_lengths=[1, 0]
        ),
        "CloseSession": v1.CloseSessionRequest(session_id=session_id[:-1]),
        "Append": append_request(shape, handle),
        "Decode": v1.DecodeRequest(step=step(shape, handle)),
        "DecodeOnce": v1.DecodeOnceRequest(step=step(shape, handle)),
        "ExportSession": v1.ExportSessionRequest(session_id=session_id),
        "ImportSession": v1.ImportSessionRequest(
            model=shape.name, request_id="fuzz", data=b"\x10\0\0\0\0\0\0\0{}"
        ),
    }
