"""The client of Octavo, INT8 paged KV-cached decoding as a service.

    import numpy as np
    from octavo_client import Client

    with Client("localhost:50051") as client, client.open_session("tiny") as session:
        model = session.model
        rng = np.random.default_rng(0)

        def draw(*shape):
            return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)

        prompt = (model.num_layers, 100, model.num_kv_heads, model.head_dim)
        session.append(draw(*prompt), draw(*prompt))
        for layer in range(model.num_layers):
            q = draw(1, model.num_q_heads, model.head_dim)
            k, v = (draw(1, model.num_kv_heads, model.head_dim) for _ in "kv")
            print(layer, session.decode(layer, q, k, v).out.shape)

`Client` blocks, `AsyncClient` awaits; apart from that they are the same. Both take and return numpy arrays or torch
tensors (bfloat16 in numpy is `ml_dtypes.bfloat16`). What goes wrong is drawn as a tree in `octavo_client._errors`;
every exception is exported here.
"""

from octavo_client._append import Progress
from octavo_client._async import AsyncClient
from octavo_client._async_session import AsyncSession
from octavo_client._config import Retry, Timeout
from octavo_client._credentials import Tls, Token
from octavo_client._errors import (
    REASONS,
    BadTensor,
    CallTimeout,
    ClientClosed,
    ConnectionLost,
    ContextTooLong,
    DeviceFailure,
    Draining,
    DtypeMismatch,
    DuplicateEntry,
    EmptyStep,
    InterruptedCall,
    LayerNotFound,
    MalformedMessage,
    MessageTooLarge,
    ModelNotFound,
    NonFinite,
    OctavoError,
    OutOfBlocks,
    PositionMismatch,
    QueueFull,
    RefusedError,
    ScaleOverflow,
    SessionExpired,
    SessionLimit,
    SessionLost,
    SessionNotFound,
    ShapeMismatch,
    SharedMemoryUnavailable,
    SnapshotInvalid,
    StepExpired,
    StepTimeout,
    StreamLimit,
    TenantLimit,
    Unauthenticated,
)
from octavo_client._pipeline import Steps, micro_batches
from octavo_client._session import Session
from octavo_client._sync import Client
from octavo_client._transfer import TransferProgress
from octavo_client._types import (
    BatchResult,
    DecodeResult,
    Entry,
    LaunchStats,
    Model,
    PoolStats,
    ServerInfo,
    ServerStats,
    SessionOptions,
    SessionState,
    StageTimes,
    Step,
    StepOptions,
)

__all__ = [
    "REASONS",
    "AsyncClient",
    "AsyncSession",
    "BadTensor",
    "BatchResult",
    "CallTimeout",
    "Client",
    "ClientClosed",
    "ConnectionLost",
    "ContextTooLong",
    "DecodeResult",
    "DeviceFailure",
    "Draining",
    "DtypeMismatch",
    "DuplicateEntry",
    "EmptyStep",
    "Entry",
    "InterruptedCall",
    "LaunchStats",
    "LayerNotFound",
    "MalformedMessage",
    "MessageTooLarge",
    "Model",
    "ModelNotFound",
    "NonFinite",
    "OctavoError",
    "OutOfBlocks",
    "PoolStats",
    "PositionMismatch",
    "Progress",
    "QueueFull",
    "RefusedError",
    "Retry",
    "ScaleOverflow",
    "ServerInfo",
    "ServerStats",
    "Session",
    "SessionExpired",
    "SessionLimit",
    "SessionLost",
    "SessionNotFound",
    "SessionOptions",
    "SessionState",
    "ShapeMismatch",
    "SharedMemoryUnavailable",
    "SnapshotInvalid",
    "StageTimes",
    "Step",
    "StepExpired",
    "StepOptions",
    "StepTimeout",
    "Steps",
    "StreamLimit",
    "TenantLimit",
    "Timeout",
    "Tls",
    "Token",
    "TransferProgress",
    "Unauthenticated",
    "micro_batches",
]
