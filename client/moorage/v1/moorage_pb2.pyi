import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_SOURCE_UNSPECIFIED: _ClassVar[ModelSource]
    MODEL_SOURCE_HUGGINGFACE: _ClassVar[ModelSource]
    MODEL_SOURCE_KAGGLE: _ClassVar[ModelSource]
    MODEL_SOURCE_GCS: _ClassVar[ModelSource]
    MODEL_SOURCE_INTERNAL: _ClassVar[ModelSource]
    MODEL_SOURCE_MAXTEXT: _ClassVar[ModelSource]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_ID_UNPARSEABLE: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_FAMILY_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_CONFIG_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_UNSUPPORTED: _ClassVar[ErrorReason]
    ERROR_REASON_SOURCE_NOT_ALLOWED: _ClassVar[ErrorReason]
    ERROR_REASON_SOURCE_UNAVAILABLE: _ClassVar[ErrorReason]
    ERROR_REASON_DISK_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_PATH_REQUIRED: _ClassVar[ErrorReason]
    ERROR_REASON_SOURCE_AUTH_REQUIRED: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_CHECKPOINT_CORRUPT: _ClassVar[ErrorReason]
    ERROR_REASON_DEVICE_BUDGET_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_QUEUE_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_SERVER_DRAINING: _ClassVar[ErrorReason]
    ERROR_REASON_LOAD_CANCELLED: _ClassVar[ErrorReason]
    ERROR_REASON_LEASE_UNKNOWN: _ClassVar[ErrorReason]
    ERROR_REASON_PERMISSION_DENIED: _ClassVar[ErrorReason]
    ERROR_REASON_LIMIT_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_LEASED: _ClassVar[ErrorReason]
    ERROR_REASON_MODEL_NOT_LOADED: _ClassVar[ErrorReason]
    ERROR_REASON_WEIGHTS_VERSION_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_SEQUENCE_TOO_LONG: _ClassVar[ErrorReason]
    ERROR_REASON_OUTPUT_TOO_LARGE: _ClassVar[ErrorReason]
    ERROR_REASON_TOKEN_OUT_OF_RANGE: _ClassVar[ErrorReason]
    ERROR_REASON_ROW_EMPTY: _ClassVar[ErrorReason]
    ERROR_REASON_OUTPUT_NOT_SERVED: _ClassVar[ErrorReason]
    ERROR_REASON_NON_FINITE_OUTPUT: _ClassVar[ErrorReason]
    ERROR_REASON_ACCELERATOR_BUSY: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_REQUEST: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_TOO_SHORT: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_QUEUED: _ClassVar[ModelState]
    MODEL_STATE_RESOLVING: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_DRAINING: _ClassVar[ModelState]
    MODEL_STATE_UNLOADED: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
    MODEL_STATE_CANCELLED: _ClassVar[ModelState]

class FirstToken(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIRST_TOKEN_UNSPECIFIED: _ClassVar[FirstToken]
    FIRST_TOKEN_NAN: _ClassVar[FirstToken]
    FIRST_TOKEN_ZERO: _ClassVar[FirstToken]

class LogitScale(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOGIT_SCALE_UNSPECIFIED: _ClassVar[LogitScale]
    LOGIT_SCALE_RAW: _ClassVar[LogitScale]
    LOGIT_SCALE_SCALED: _ClassVar[LogitScale]

class SegmentMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEGMENT_MODE_UNSPECIFIED: _ClassVar[SegmentMode]
    SEGMENT_MODE_ISOLATED: _ClassVar[SegmentMode]
MODEL_SOURCE_UNSPECIFIED: ModelSource
MODEL_SOURCE_HUGGINGFACE: ModelSource
MODEL_SOURCE_KAGGLE: ModelSource
MODEL_SOURCE_GCS: ModelSource
MODEL_SOURCE_INTERNAL: ModelSource
MODEL_SOURCE_MAXTEXT: ModelSource
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_MODEL_ID_UNPARSEABLE: ErrorReason
ERROR_REASON_MODEL_FAMILY_UNKNOWN: ErrorReason
ERROR_REASON_CONFIG_UNKNOWN: ErrorReason
ERROR_REASON_CHECKPOINT_UNSUPPORTED: ErrorReason
ERROR_REASON_SOURCE_NOT_ALLOWED: ErrorReason
ERROR_REASON_SOURCE_UNAVAILABLE: ErrorReason
ERROR_REASON_DISK_FULL: ErrorReason
ERROR_REASON_MODEL_PATH_REQUIRED: ErrorReason
ERROR_REASON_SOURCE_AUTH_REQUIRED: ErrorReason
ERROR_REASON_CHECKPOINT_NOT_FOUND: ErrorReason
ERROR_REASON_CHECKPOINT_MISMATCH: ErrorReason
ERROR_REASON_CHECKPOINT_CORRUPT: ErrorReason
ERROR_REASON_DEVICE_BUDGET_EXCEEDED: ErrorReason
ERROR_REASON_QUEUE_FULL: ErrorReason
ERROR_REASON_SERVER_DRAINING: ErrorReason
ERROR_REASON_LOAD_CANCELLED: ErrorReason
ERROR_REASON_LEASE_UNKNOWN: ErrorReason
ERROR_REASON_PERMISSION_DENIED: ErrorReason
ERROR_REASON_LIMIT_EXCEEDED: ErrorReason
ERROR_REASON_MODEL_LEASED: ErrorReason
ERROR_REASON_MODEL_NOT_LOADED: ErrorReason
ERROR_REASON_WEIGHTS_VERSION_MISMATCH: ErrorReason
ERROR_REASON_SEQUENCE_TOO_LONG: ErrorReason
ERROR_REASON_OUTPUT_TOO_LARGE: ErrorReason
ERROR_REASON_TOKEN_OUT_OF_RANGE: ErrorReason
ERROR_REASON_ROW_EMPTY: ErrorReason
ERROR_REASON_OUTPUT_NOT_SERVED: ErrorReason
ERROR_REASON_NON_FINITE_OUTPUT: ErrorReason
ERROR_REASON_ACCELERATOR_BUSY: ErrorReason
ERROR_REASON_INVALID_REQUEST: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_DEADLINE_TOO_SHORT: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_QUEUED: ModelState
MODEL_STATE_RESOLVING: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_DRAINING: ModelState
MODEL_STATE_UNLOADED: ModelState
MODEL_STATE_FAILED: ModelState
MODEL_STATE_CANCELLED: ModelState
FIRST_TOKEN_UNSPECIFIED: FirstToken
FIRST_TOKEN_NAN: FirstToken
FIRST_TOKEN_ZERO: FirstToken
LOGIT_SCALE_UNSPECIFIED: LogitScale
LOGIT_SCALE_RAW: LogitScale
LOGIT_SCALE_SCALED: LogitScale
SEGMENT_MODE_UNSPECIFIED: SegmentMode
SEGMENT_MODE_ISOLATED: SegmentMode

class ModelSpec(_message.Message):
    __slots__ = ("model_id", "source", "model_path", "revision", "model_download_path", "dtype", "compute_dtype", "options")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DOWNLOAD_PATH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    source: ModelSource
    model_path: str
    revision: str
    model_download_path: str
    dtype: str
    compute_dtype: str
    options: _containers.ScalarMap[str, str]
    def __init__(self, model_id: _Optional[str] = ..., source: _Optional[_Union[ModelSource, str]] = ..., model_path: _Optional[str] = ..., revision: _Optional[str] = ..., model_download_path: _Optional[str] = ..., dtype: _Optional[str] = ..., compute_dtype: _Optional[str] = ..., options: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ModelName(_message.Message):
    __slots__ = ("model_id", "model_name", "model_family", "model_version", "model_config_category", "model_config_id")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FAMILY_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_CONFIG_CATEGORY_FIELD_NUMBER: _ClassVar[int]
    MODEL_CONFIG_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model_name: str
    model_family: str
    model_version: str
    model_config_category: str
    model_config_id: str
    def __init__(self, model_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_family: _Optional[str] = ..., model_version: _Optional[str] = ..., model_config_category: _Optional[str] = ..., model_config_id: _Optional[str] = ...) -> None: ...

class ConfigSummary(_message.Message):
    __slots__ = ("family", "num_layers", "vocab_size", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim", "num_parameters")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EMBED_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    family: str
    num_layers: int
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int
    def __init__(self, family: _Optional[str] = ..., num_layers: _Optional[int] = ..., vocab_size: _Optional[int] = ..., embed_dim: _Optional[int] = ..., hidden_dim: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., num_parameters: _Optional[int] = ...) -> None: ...

class DeviceBytes(_message.Message):
    __slots__ = ("device_id", "bytes")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    device_id: int
    bytes: int
    def __init__(self, device_id: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ResolveNameRequest(_message.Message):
    __slots__ = ("model", "check_source", "estimate")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHECK_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    model: ModelSpec
    check_source: bool
    estimate: bool
    def __init__(self, model: _Optional[_Union[ModelSpec, _Mapping]] = ..., check_source: bool = ..., estimate: bool = ...) -> None: ...

class ResolveNameResponse(_message.Message):
    __slots__ = ("name", "checked", "loadable", "reason", "message", "config", "revision", "device_bytes", "preset_differences", "budget")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    LOADABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRESET_DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    name: ModelName
    checked: _containers.RepeatedScalarFieldContainer[str]
    loadable: bool
    reason: str
    message: str
    config: ConfigSummary
    revision: str
    device_bytes: _containers.RepeatedCompositeFieldContainer[DeviceBytes]
    preset_differences: _containers.RepeatedScalarFieldContainer[str]
    budget: BudgetEstimate
    def __init__(self, name: _Optional[_Union[ModelName, _Mapping]] = ..., checked: _Optional[_Iterable[str]] = ..., loadable: bool = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., config: _Optional[_Union[ConfigSummary, _Mapping]] = ..., revision: _Optional[str] = ..., device_bytes: _Optional[_Iterable[_Union[DeviceBytes, _Mapping]]] = ..., preset_differences: _Optional[_Iterable[str]] = ..., budget: _Optional[_Union[BudgetEstimate, _Mapping]] = ...) -> None: ...

class BudgetEstimate(_message.Message):
    __slots__ = ("needed_bytes", "free_bytes", "fits", "evicted")
    NEEDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    needed_bytes: int
    free_bytes: int
    fits: bool
    evicted: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, needed_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., fits: bool = ..., evicted: _Optional[_Iterable[str]] = ...) -> None: ...

class ListSupportedModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SupportedModel(_message.Message):
    __slots__ = ("model_config_id", "model_config_category", "config")
    MODEL_CONFIG_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_CONFIG_CATEGORY_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    model_config_id: str
    model_config_category: str
    config: ConfigSummary
    def __init__(self, model_config_id: _Optional[str] = ..., model_config_category: _Optional[str] = ..., config: _Optional[_Union[ConfigSummary, _Mapping]] = ...) -> None: ...

class ListSupportedModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[SupportedModel]
    def __init__(self, models: _Optional[_Iterable[_Union[SupportedModel, _Mapping]]] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model", "lease", "cancel_if_abandoned")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_IF_ABANDONED_FIELD_NUMBER: _ClassVar[int]
    model: ModelSpec
    lease: LeaseSpec
    cancel_if_abandoned: bool
    def __init__(self, model: _Optional[_Union[ModelSpec, _Mapping]] = ..., lease: _Optional[_Union[LeaseSpec, _Mapping]] = ..., cancel_if_abandoned: bool = ...) -> None: ...

class LeaseSpec(_message.Message):
    __slots__ = ("client", "duration")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    client: str
    duration: _duration_pb2.Duration
    def __init__(self, client: _Optional[str] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "client", "duration", "time_left")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    id: str
    client: str
    duration: _duration_pb2.Duration
    time_left: _duration_pb2.Duration
    def __init__(self, id: _Optional[str] = ..., client: _Optional[str] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("progress", "model", "lease")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    progress: LoadProgress
    model: Model
    lease: Lease
    def __init__(self, progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("stage", "done", "total", "rate")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    stage: str
    done: int
    total: int
    rate: float
    def __init__(self, stage: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., rate: _Optional[float] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("state", "stages", "waiters", "elapsed")
    STATE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    WAITERS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    state: ModelState
    stages: _containers.RepeatedCompositeFieldContainer[StageProgress]
    waiters: int
    elapsed: _duration_pb2.Duration
    def __init__(self, state: _Optional[_Union[ModelState, str]] = ..., stages: _Optional[_Iterable[_Union[StageProgress, _Mapping]]] = ..., waiters: _Optional[int] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("handle", "state", "name", "spec", "revision", "path", "config", "dtype", "compute_dtype", "device_bytes", "load_time", "load_duration", "last_use_time", "forward_count", "token_count", "progress", "preset_differences", "tokenizer", "leases", "history", "running_count", "reserved_bytes", "weights_digest", "client", "buckets")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    LOAD_DURATION_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_TIME_FIELD_NUMBER: _ClassVar[int]
    FORWARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PRESET_DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    RUNNING_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    handle: str
    state: ModelState
    name: ModelName
    spec: ModelSpec
    revision: str
    path: str
    config: ConfigSummary
    dtype: str
    compute_dtype: str
    device_bytes: _containers.RepeatedCompositeFieldContainer[DeviceBytes]
    load_time: _timestamp_pb2.Timestamp
    load_duration: _duration_pb2.Duration
    last_use_time: _timestamp_pb2.Timestamp
    forward_count: int
    token_count: int
    progress: LoadProgress
    preset_differences: _containers.RepeatedScalarFieldContainer[str]
    tokenizer: TokenizerFacts
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    history: _containers.RepeatedCompositeFieldContainer[StateChange]
    running_count: int
    reserved_bytes: int
    weights_digest: str
    client: str
    buckets: _containers.RepeatedCompositeFieldContainer[Bucket]
    def __init__(self, handle: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., name: _Optional[_Union[ModelName, _Mapping]] = ..., spec: _Optional[_Union[ModelSpec, _Mapping]] = ..., revision: _Optional[str] = ..., path: _Optional[str] = ..., config: _Optional[_Union[ConfigSummary, _Mapping]] = ..., dtype: _Optional[str] = ..., compute_dtype: _Optional[str] = ..., device_bytes: _Optional[_Iterable[_Union[DeviceBytes, _Mapping]]] = ..., load_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., load_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., last_use_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., forward_count: _Optional[int] = ..., token_count: _Optional[int] = ..., progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., preset_differences: _Optional[_Iterable[str]] = ..., tokenizer: _Optional[_Union[TokenizerFacts, _Mapping]] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., history: _Optional[_Iterable[_Union[StateChange, _Mapping]]] = ..., running_count: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., weights_digest: _Optional[str] = ..., client: _Optional[str] = ..., buckets: _Optional[_Iterable[_Union[Bucket, _Mapping]]] = ...) -> None: ...

class ParameterLayout(_message.Message):
    __slots__ = ("name", "shape", "dtype", "axes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    axes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., axes: _Optional[_Iterable[str]] = ...) -> None: ...

class StateChange(_message.Message):
    __slots__ = ("state", "time")
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    state: ModelState
    time: _timestamp_pb2.Timestamp
    def __init__(self, state: _Optional[_Union[ModelState, str]] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class TokenizerFacts(_message.Message):
    __slots__ = ("files", "bos_id", "eos_ids", "pad_id", "has_chat_template")
    FILES_FIELD_NUMBER: _ClassVar[int]
    BOS_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_IDS_FIELD_NUMBER: _ClassVar[int]
    PAD_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedScalarFieldContainer[str]
    bos_id: int
    eos_ids: _containers.RepeatedScalarFieldContainer[int]
    pad_id: int
    has_chat_template: bool
    def __init__(self, files: _Optional[_Iterable[str]] = ..., bos_id: _Optional[int] = ..., eos_ids: _Optional[_Iterable[int]] = ..., pad_id: _Optional[int] = ..., has_chat_template: bool = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: str
    def __init__(self, handle: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "layout")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    model: Model
    layout: _containers.RepeatedCompositeFieldContainer[ParameterLayout]
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., layout: _Optional[_Iterable[_Union[ParameterLayout, _Mapping]]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("handle", "lease_id", "force")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    handle: str
    lease_id: str
    force: bool
    def __init__(self, handle: _Optional[str] = ..., lease_id: _Optional[str] = ..., force: bool = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("device_bytes",)
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_bytes: _containers.RepeatedCompositeFieldContainer[DeviceBytes]
    def __init__(self, device_bytes: _Optional[_Iterable[_Union[DeviceBytes, _Mapping]]] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchModelsRequest(_message.Message):
    __slots__ = ("epoch", "sequence")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    sequence: int
    def __init__(self, epoch: _Optional[str] = ..., sequence: _Optional[int] = ...) -> None: ...

class WatchModelsResponse(_message.Message):
    __slots__ = ("epoch", "sequence", "snapshot", "changed")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    sequence: int
    snapshot: ModelList
    changed: Model
    def __init__(self, epoch: _Optional[str] = ..., sequence: _Optional[int] = ..., snapshot: _Optional[_Union[ModelList, _Mapping]] = ..., changed: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class OutputSpec(_message.Message):
    __slots__ = ("names", "top_k", "candidates", "layer", "positions")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    candidates: Candidates
    layer: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., candidates: _Optional[_Union[Candidates, _Mapping]] = ..., layer: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("ids", "ids_by_position", "count")
    IDS_FIELD_NUMBER: _ClassVar[int]
    IDS_BY_POSITION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    ids_by_position: bytes
    count: int
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., ids_by_position: _Optional[bytes] = ..., count: _Optional[int] = ...) -> None: ...

class Semantics(_message.Message):
    __slots__ = ("temperature", "head_dtype", "first_token", "logit_scale", "segments")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    head_dtype: str
    first_token: FirstToken
    logit_scale: LogitScale
    segments: SegmentMode
    def __init__(self, temperature: _Optional[float] = ..., head_dtype: _Optional[str] = ..., first_token: _Optional[_Union[FirstToken, str]] = ..., logit_scale: _Optional[_Union[LogitScale, str]] = ..., segments: _Optional[_Union[SegmentMode, str]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("handle", "token_ids", "row_lengths", "segment_ids", "outputs", "semantics", "from_positions", "expected_weights_version", "request_id", "received_bytes")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ROW_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SEMANTICS_FIELD_NUMBER: _ClassVar[int]
    FROM_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    handle: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    row_lengths: _containers.RepeatedScalarFieldContainer[int]
    segment_ids: _containers.RepeatedScalarFieldContainer[int]
    outputs: OutputSpec
    semantics: Semantics
    from_positions: _containers.RepeatedScalarFieldContainer[int]
    expected_weights_version: int
    request_id: str
    received_bytes: int
    def __init__(self, handle: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., row_lengths: _Optional[_Iterable[int]] = ..., segment_ids: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Union[OutputSpec, _Mapping]] = ..., semantics: _Optional[_Union[Semantics, _Mapping]] = ..., from_positions: _Optional[_Iterable[int]] = ..., expected_weights_version: _Optional[int] = ..., request_id: _Optional[str] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("name", "dtype", "shape", "row_lengths")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ROW_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    row_lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., row_lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardHeader(_message.Message):
    __slots__ = ("handle", "model_id", "revision", "dtype", "compute_dtype", "tensors", "queue_time", "execute_time", "semantics", "weights_digest", "weights_version", "mesh", "buckets", "pad_time", "transfer_time", "request_id", "server_version")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_TIME_FIELD_NUMBER: _ClassVar[int]
    SEMANTICS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    PAD_TIME_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TIME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    handle: str
    model_id: str
    revision: str
    dtype: str
    compute_dtype: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    queue_time: _duration_pb2.Duration
    execute_time: _duration_pb2.Duration
    semantics: Semantics
    weights_digest: str
    weights_version: int
    mesh: _containers.RepeatedCompositeFieldContainer[MeshAxis]
    buckets: _containers.RepeatedCompositeFieldContainer[Bucket]
    pad_time: _duration_pb2.Duration
    transfer_time: _duration_pb2.Duration
    request_id: str
    server_version: str
    def __init__(self, handle: _Optional[str] = ..., model_id: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., compute_dtype: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ..., queue_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., execute_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., semantics: _Optional[_Union[Semantics, _Mapping]] = ..., weights_digest: _Optional[str] = ..., weights_version: _Optional[int] = ..., mesh: _Optional[_Iterable[_Union[MeshAxis, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[Bucket, _Mapping]]] = ..., pad_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., transfer_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., request_id: _Optional[str] = ..., server_version: _Optional[str] = ...) -> None: ...

class ForwardProgress(_message.Message):
    __slots__ = ("rows_done", "rows", "queued_tokens")
    ROWS_DONE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    rows_done: int
    rows: int
    queued_tokens: int
    def __init__(self, rows_done: _Optional[int] = ..., rows: _Optional[int] = ..., queued_tokens: _Optional[int] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("tensor", "offset", "crc32c", "data")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    crc32c: int
    data: bytes
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("header", "chunk", "progress")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    header: ForwardHeader
    chunk: TensorChunk
    progress: ForwardProgress
    def __init__(self, header: _Optional[_Union[ForwardHeader, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., progress: _Optional[_Union[ForwardProgress, _Mapping]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Device(_message.Message):
    __slots__ = ("id", "kind", "model_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: int
    kind: str
    model_bytes: int
    def __init__(self, id: _Optional[int] = ..., kind: _Optional[str] = ..., model_bytes: _Optional[int] = ...) -> None: ...

class MeshAxis(_message.Message):
    __slots__ = ("name", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Bucket(_message.Message):
    __slots__ = ("rows", "length")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    rows: int
    length: int
    def __init__(self, rows: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_sequence_length", "max_output_bytes", "max_queued_tokens", "answer_retention", "max_retained_bytes", "max_requests", "max_client_requests", "max_client_tokens", "max_connections", "max_models", "max_client_models", "max_leases", "max_client_leases", "max_waiting_bytes")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_RETENTION_FIELD_NUMBER: _ClassVar[int]
    MAX_RETAINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_CLIENT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_CLIENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_CLIENT_MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASES_FIELD_NUMBER: _ClassVar[int]
    MAX_CLIENT_LEASES_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_sequence_length: int
    max_output_bytes: int
    max_queued_tokens: int
    answer_retention: _duration_pb2.Duration
    max_retained_bytes: int
    max_requests: int
    max_client_requests: int
    max_client_tokens: int
    max_connections: int
    max_models: int
    max_client_models: int
    max_leases: int
    max_client_leases: int
    max_waiting_bytes: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_sequence_length: _Optional[int] = ..., max_output_bytes: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., answer_retention: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_retained_bytes: _Optional[int] = ..., max_requests: _Optional[int] = ..., max_client_requests: _Optional[int] = ..., max_client_tokens: _Optional[int] = ..., max_connections: _Optional[int] = ..., max_models: _Optional[int] = ..., max_client_models: _Optional[int] = ..., max_leases: _Optional[int] = ..., max_client_leases: _Optional[int] = ..., max_waiting_bytes: _Optional[int] = ...) -> None: ...

class Activity(_message.Message):
    __slots__ = ("requests", "forwards_under_way", "queued_tokens", "leases", "forwards", "tokens", "batches", "batch_tokens", "batch_slots", "loads", "refusals", "errors")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    forwards_under_way: int
    queued_tokens: int
    leases: int
    forwards: int
    tokens: int
    batches: int
    batch_tokens: int
    batch_slots: int
    loads: _containers.RepeatedCompositeFieldContainer[Count]
    refusals: _containers.RepeatedCompositeFieldContainer[Count]
    errors: _containers.RepeatedCompositeFieldContainer[RecentError]
    def __init__(self, requests: _Optional[int] = ..., forwards_under_way: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., leases: _Optional[int] = ..., forwards: _Optional[int] = ..., tokens: _Optional[int] = ..., batches: _Optional[int] = ..., batch_tokens: _Optional[int] = ..., batch_slots: _Optional[int] = ..., loads: _Optional[_Iterable[_Union[Count, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[Count, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[RecentError, _Mapping]]] = ...) -> None: ...

class Count(_message.Message):
    __slots__ = ("name", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    count: int
    def __init__(self, name: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RecentError(_message.Message):
    __slots__ = ("time", "method", "reason", "message", "request_id", "client")
    TIME_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    method: str
    reason: str
    message: str
    request_id: str
    client: str
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., method: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., request_id: _Optional[str] = ..., client: _Optional[str] = ...) -> None: ...

class OutputProfile(_message.Message):
    __slots__ = ("outputs", "size")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    size: int
    def __init__(self, outputs: _Optional[_Iterable[str]] = ..., size: _Optional[int] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "platform", "devices", "mesh", "buckets", "limits", "sources", "outputs", "start_time", "memory", "profiles", "compiles_after_ready", "activity")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    COMPILES_AFTER_READY_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    version: str
    platform: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    mesh: _containers.RepeatedCompositeFieldContainer[MeshAxis]
    buckets: _containers.RepeatedCompositeFieldContainer[Bucket]
    limits: Limits
    sources: _containers.RepeatedScalarFieldContainer[ModelSource]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    start_time: _timestamp_pb2.Timestamp
    memory: Memory
    profiles: _containers.RepeatedCompositeFieldContainer[OutputProfile]
    compiles_after_ready: int
    activity: Activity
    def __init__(self, version: _Optional[str] = ..., platform: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., mesh: _Optional[_Iterable[_Union[MeshAxis, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[Bucket, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[ModelSource, str]]] = ..., outputs: _Optional[_Iterable[str]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., profiles: _Optional[_Iterable[_Union[OutputProfile, _Mapping]]] = ..., compiles_after_ready: _Optional[int] = ..., activity: _Optional[_Union[Activity, _Mapping]] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("budget_bytes", "reserved_bytes", "live_bytes", "host_pool_bytes")
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    budget_bytes: int
    reserved_bytes: int
    live_bytes: _containers.RepeatedCompositeFieldContainer[DeviceBytes]
    host_pool_bytes: int
    def __init__(self, budget_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., live_bytes: _Optional[_Iterable[_Union[DeviceBytes, _Mapping]]] = ..., host_pool_bytes: _Optional[int] = ...) -> None: ...
