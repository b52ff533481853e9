from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]

class DisconnectPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISCONNECT_POLICY_UNSPECIFIED: _ClassVar[DisconnectPolicy]
    DISCONNECT_POLICY_KEEP: _ClassVar[DisconnectPolicy]
    DISCONNECT_POLICY_CLOSE: _ClassVar[DisconnectPolicy]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_FLOAT32: DataType
DISCONNECT_POLICY_UNSPECIFIED: DisconnectPolicy
DISCONNECT_POLICY_KEEP: DisconnectPolicy
DISCONNECT_POLICY_CLOSE: DisconnectPolicy

class Tensor(_message.Message):
    __slots__ = ("data", "dtype", "shape", "region_offset")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    REGION_OFFSET_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    region_offset: int
    def __init__(self, data: _Optional[bytes] = ..., dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., region_offset: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "block_size", "max_context", "num_blocks", "num_free_blocks", "sm_scale", "window", "soft_cap", "sinks", "deterministic")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SM_SCALE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_context: int
    num_blocks: int
    num_free_blocks: int
    sm_scale: _containers.RepeatedScalarFieldContainer[float]
    window: _containers.RepeatedScalarFieldContainer[int]
    soft_cap: _containers.RepeatedScalarFieldContainer[float]
    sinks: _containers.RepeatedScalarFieldContainer[float]
    deterministic: bool
    def __init__(self, name: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_q_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., max_context: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., sm_scale: _Optional[_Iterable[float]] = ..., window: _Optional[_Iterable[int]] = ..., soft_cap: _Optional[_Iterable[float]] = ..., sinks: _Optional[_Iterable[float]] = ..., deterministic: _Optional[bool] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "session_handle", "model", "lengths", "num_blocks", "lease_ms", "lease_remaining_ms", "disconnect_policy", "reserved_tokens")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_HANDLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    DISCONNECT_POLICY_FIELD_NUMBER: _ClassVar[int]
    RESERVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    session_handle: int
    model: str
    lengths: _containers.RepeatedScalarFieldContainer[int]
    num_blocks: int
    lease_ms: int
    lease_remaining_ms: int
    disconnect_policy: DisconnectPolicy
    reserved_tokens: int
    def __init__(self, session_id: _Optional[str] = ..., session_handle: _Optional[int] = ..., model: _Optional[str] = ..., lengths: _Optional[_Iterable[int]] = ..., num_blocks: _Optional[int] = ..., lease_ms: _Optional[int] = ..., lease_remaining_ms: _Optional[int] = ..., disconnect_policy: _Optional[_Union[DisconnectPolicy, str]] = ..., reserved_tokens: _Optional[int] = ...) -> None: ...

class ServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfoResponse(_message.Message):
    __slots__ = ("version", "incarnation", "backend", "backend_description", "models", "max_message_bytes", "max_steps_in_flight", "num_sessions", "max_sessions", "default_lease_ms", "max_lease_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BACKEND_DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    version: str
    incarnation: str
    backend: str
    backend_description: str
    models: _containers.RepeatedCompositeFieldContainer[Model]
    max_message_bytes: int
    max_steps_in_flight: int
    num_sessions: int
    max_sessions: int
    default_lease_ms: int
    max_lease_ms: int
    def __init__(self, version: _Optional[str] = ..., incarnation: _Optional[str] = ..., backend: _Optional[str] = ..., backend_description: _Optional[str] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., max_message_bytes: _Optional[int] = ..., max_steps_in_flight: _Optional[int] = ..., num_sessions: _Optional[int] = ..., max_sessions: _Optional[int] = ..., default_lease_ms: _Optional[int] = ..., max_lease_ms: _Optional[int] = ...) -> None: ...

class ServerStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerStatsResponse(_message.Message):
    __slots__ = ("num_steps", "num_appended_tokens", "launches", "received_bytes", "sent_bytes", "refusals", "num_queued", "max_queued_steps", "num_sessions", "num_streams", "max_streams", "pools", "device_free_bytes", "num_opened_sessions", "num_expired_sessions", "uptime_s")
    class RefusalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_APPENDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAUNCHES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_OPENED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPIRED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_appended_tokens: int
    launches: _containers.RepeatedCompositeFieldContainer[LaunchStats]
    received_bytes: int
    sent_bytes: int
    refusals: _containers.ScalarMap[str, int]
    num_queued: int
    max_queued_steps: int
    num_sessions: int
    num_streams: int
    max_streams: int
    pools: _containers.RepeatedCompositeFieldContainer[PoolStats]
    device_free_bytes: int
    num_opened_sessions: int
    num_expired_sessions: int
    uptime_s: float
    def __init__(self, num_steps: _Optional[int] = ..., num_appended_tokens: _Optional[int] = ..., launches: _Optional[_Iterable[_Union[LaunchStats, _Mapping]]] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., refusals: _Optional[_Mapping[str, int]] = ..., num_queued: _Optional[int] = ..., max_queued_steps: _Optional[int] = ..., num_sessions: _Optional[int] = ..., num_streams: _Optional[int] = ..., max_streams: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[PoolStats, _Mapping]]] = ..., device_free_bytes: _Optional[int] = ..., num_opened_sessions: _Optional[int] = ..., num_expired_sessions: _Optional[int] = ..., uptime_s: _Optional[float] = ...) -> None: ...

class LaunchStats(_message.Message):
    __slots__ = ("max_batch_size", "num_launches", "num_steps", "num_entries", "num_tokens", "queue_us", "copy_in_us", "kernel_us", "copy_out_us", "cache_bytes")
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAUNCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COPY_IN_US_FIELD_NUMBER: _ClassVar[int]
    KERNEL_US_FIELD_NUMBER: _ClassVar[int]
    COPY_OUT_US_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, max_batch_size: _Optional[int] = ..., num_launches: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_entries: _Optional[int] = ..., num_tokens: _Optional[int] = ..., queue_us: _Optional[int] = ..., copy_in_us: _Optional[int] = ..., kernel_us: _Optional[int] = ..., copy_out_us: _Optional[int] = ..., cache_bytes: _Optional[int] = ...) -> None: ...

class PoolStats(_message.Message):
    __slots__ = ("model", "num_blocks", "num_free_blocks", "block_size", "block_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    num_blocks: int
    num_free_blocks: int
    block_size: int
    block_bytes: int
    def __init__(self, model: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("model", "request_id", "lease_ms", "disconnect_policy", "reserve_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    DISCONNECT_POLICY_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    request_id: str
    lease_ms: int
    disconnect_policy: DisconnectPolicy
    reserve_tokens: int
    def __init__(self, model: _Optional[str] = ..., request_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., disconnect_policy: _Optional[_Union[DisconnectPolicy, str]] = ..., reserve_tokens: _Optional[int] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class KeepAliveRequest(_message.Message):
    __slots__ = ("session_ids",)
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class KeepAliveResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("session_id", "remaining_ms", "error")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    remaining_ms: int
    error: _status_pb2.Status
    def __init__(self, session_id: _Optional[str] = ..., remaining_ms: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class TruncateSessionRequest(_message.Message):
    __slots__ = ("session_id", "length", "expected_lengths")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    length: int
    expected_lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[str] = ..., length: _Optional[int] = ..., expected_lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class TruncateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ("num_freed_blocks",)
    NUM_FREED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_freed_blocks: int
    def __init__(self, num_freed_blocks: _Optional[int] = ...) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("session_handle", "layer", "start_pos", "num_tokens", "step_key", "k", "v")
    SESSION_HANDLE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_POS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_KEY_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    session_handle: int
    layer: int
    start_pos: int
    num_tokens: int
    step_key: int
    k: Tensor
    v: Tensor
    def __init__(self, session_handle: _Optional[int] = ..., layer: _Optional[int] = ..., start_pos: _Optional[int] = ..., num_tokens: _Optional[int] = ..., step_key: _Optional[int] = ..., k: _Optional[_Union[Tensor, _Mapping]] = ..., v: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class AppendResponse(_message.Message):
    __slots__ = ("num_messages", "session")
    NUM_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    num_messages: int
    session: Session
    def __init__(self, num_messages: _Optional[int] = ..., session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step_id", "step_key", "session_handles", "layers", "start_pos", "num_tokens", "q", "k", "v", "timeout_ms", "return_lse", "causal", "return_stage_times", "waits_for_answer", "out_region_offset", "lse_region_offset", "trace_parent")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_KEY_FIELD_NUMBER: _ClassVar[int]
    SESSION_HANDLES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    START_POS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    RETURN_LSE_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_FIELD_NUMBER: _ClassVar[int]
    RETURN_STAGE_TIMES_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_ANSWER_FIELD_NUMBER: _ClassVar[int]
    OUT_REGION_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LSE_REGION_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TRACE_PARENT_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    step_key: int
    session_handles: _containers.RepeatedScalarFieldContainer[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    start_pos: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    q: Tensor
    k: Tensor
    v: Tensor
    timeout_ms: int
    return_lse: bool
    causal: bool
    return_stage_times: bool
    waits_for_answer: bool
    out_region_offset: int
    lse_region_offset: int
    trace_parent: str
    def __init__(self, step_id: _Optional[int] = ..., step_key: _Optional[int] = ..., session_handles: _Optional[_Iterable[int]] = ..., layers: _Optional[_Iterable[int]] = ..., start_pos: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., q: _Optional[_Union[Tensor, _Mapping]] = ..., k: _Optional[_Union[Tensor, _Mapping]] = ..., v: _Optional[_Union[Tensor, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., return_lse: _Optional[bool] = ..., causal: _Optional[bool] = ..., return_stage_times: _Optional[bool] = ..., waits_for_answer: _Optional[bool] = ..., out_region_offset: _Optional[int] = ..., lse_region_offset: _Optional[int] = ..., trace_parent: _Optional[str] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "out", "lse", "entry_errors", "error", "stage_times")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    ENTRY_ERRORS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STAGE_TIMES_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    out: Tensor
    lse: Tensor
    entry_errors: _containers.RepeatedCompositeFieldContainer[EntryError]
    error: _status_pb2.Status
    stage_times: StageTimes
    def __init__(self, step_id: _Optional[int] = ..., out: _Optional[_Union[Tensor, _Mapping]] = ..., lse: _Optional[_Union[Tensor, _Mapping]] = ..., entry_errors: _Optional[_Iterable[_Union[EntryError, _Mapping]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., stage_times: _Optional[_Union[StageTimes, _Mapping]] = ...) -> None: ...

class StageTimes(_message.Message):
    __slots__ = ("queue_us", "batch_size", "batch_tokens", "copy_in_us", "kernel_us", "copy_out_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COPY_IN_US_FIELD_NUMBER: _ClassVar[int]
    KERNEL_US_FIELD_NUMBER: _ClassVar[int]
    COPY_OUT_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    batch_size: int
    batch_tokens: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int
    def __init__(self, queue_us: _Optional[int] = ..., batch_size: _Optional[int] = ..., batch_tokens: _Optional[int] = ..., copy_in_us: _Optional[int] = ..., kernel_us: _Optional[int] = ..., copy_out_us: _Optional[int] = ...) -> None: ...

class EntryError(_message.Message):
    __slots__ = ("entry_idx", "error")
    ENTRY_IDX_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    entry_idx: int
    error: _status_pb2.Status
    def __init__(self, entry_idx: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("step", "region")
    STEP_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    step: Step
    region: RegionRequest
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., region: _Optional[_Union[RegionRequest, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("result", "region")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    result: StepResult
    region: RegionResponse
    def __init__(self, result: _Optional[_Union[StepResult, _Mapping]] = ..., region: _Optional[_Union[RegionResponse, _Mapping]] = ...) -> None: ...

class RegionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RegionResponse(_message.Message):
    __slots__ = ("process_id", "fd", "name", "num_bytes", "error")
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    process_id: int
    fd: int
    name: str
    num_bytes: int
    error: _status_pb2.Status
    def __init__(self, process_id: _Optional[int] = ..., fd: _Optional[int] = ..., name: _Optional[str] = ..., num_bytes: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class DecodeOnceRequest(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: Step
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class DecodeOnceResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: StepResult
    def __init__(self, result: _Optional[_Union[StepResult, _Mapping]] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("model", "request_id", "lease_ms", "disconnect_policy", "reserve_tokens", "data")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    DISCONNECT_POLICY_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    model: str
    request_id: str
    lease_ms: int
    disconnect_policy: DisconnectPolicy
    reserve_tokens: int
    data: bytes
    def __init__(self, model: _Optional[str] = ..., request_id: _Optional[str] = ..., lease_ms: _Optional[int] = ..., disconnect_policy: _Optional[_Union[DisconnectPolicy, str]] = ..., reserve_tokens: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...
