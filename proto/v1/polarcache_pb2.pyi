from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]

class RopePairing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROPE_PAIRING_UNSPECIFIED: _ClassVar[RopePairing]
    ROPE_PAIRING_HALF: _ClassVar[RopePairing]
    ROPE_PAIRING_INTERLEAVED: _ClassVar[RopePairing]

class BlockFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_FORMAT_UNSPECIFIED: _ClassVar[BlockFormat]
    BLOCK_FORMAT_RAW: _ClassVar[BlockFormat]
    BLOCK_FORMAT_PACKED: _ClassVar[BlockFormat]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_MEMORY: _ClassVar[Tier]
    TIER_REDIS: _ClassVar[Tier]

class HealthStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEALTH_STATUS_UNSPECIFIED: _ClassVar[HealthStatus]
    HEALTH_STATUS_OK: _ClassVar[HealthStatus]
    HEALTH_STATUS_DEGRADED: _ClassVar[HealthStatus]
    HEALTH_STATUS_DRAINING: _ClassVar[HealthStatus]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT32: Dtype
ROPE_PAIRING_UNSPECIFIED: RopePairing
ROPE_PAIRING_HALF: RopePairing
ROPE_PAIRING_INTERLEAVED: RopePairing
BLOCK_FORMAT_UNSPECIFIED: BlockFormat
BLOCK_FORMAT_RAW: BlockFormat
BLOCK_FORMAT_PACKED: BlockFormat
TIER_UNSPECIFIED: Tier
TIER_MEMORY: Tier
TIER_REDIS: Tier
HEALTH_STATUS_UNSPECIFIED: HealthStatus
HEALTH_STATUS_OK: HealthStatus
HEALTH_STATUS_DEGRADED: HealthStatus
HEALTH_STATUS_DRAINING: HealthStatus

class Geometry(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "dtype", "block_tokens", "rope_pairing", "rotary_dim")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    V_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROPE_PAIRING_FIELD_NUMBER: _ClassVar[int]
    ROTARY_DIM_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: Dtype
    block_tokens: int
    rope_pairing: RopePairing
    rotary_dim: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., v_head_dim: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., block_tokens: _Optional[int] = ..., rope_pairing: _Optional[_Union[RopePairing, str]] = ..., rotary_dim: _Optional[int] = ...) -> None: ...

class Namespace(_message.Message):
    __slots__ = ("model", "revision", "lora", "tenant", "salt", "tp_rank", "tp_size", "pp_rank", "pp_size", "geometry", "profile", "calibration")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_RANK_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    lora: str
    tenant: str
    salt: str
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    geometry: Geometry
    profile: str
    calibration: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., lora: _Optional[str] = ..., tenant: _Optional[str] = ..., salt: _Optional[str] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_rank: _Optional[int] = ..., pp_size: _Optional[int] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., profile: _Optional[str] = ..., calibration: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("version", "boot_id", "device", "layout_version", "key_codecs", "value_codecs", "limits", "health", "health_reasons", "local_socket")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    KEY_CODECS_FIELD_NUMBER: _ClassVar[int]
    VALUE_CODECS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    HEALTH_REASONS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    version: str
    boot_id: str
    device: str
    layout_version: int
    key_codecs: _containers.RepeatedScalarFieldContainer[str]
    value_codecs: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    health: HealthStatus
    health_reasons: _containers.RepeatedScalarFieldContainer[str]
    local_socket: str
    def __init__(self, version: _Optional[str] = ..., boot_id: _Optional[str] = ..., device: _Optional[str] = ..., layout_version: _Optional[int] = ..., key_codecs: _Optional[_Iterable[str]] = ..., value_codecs: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., health: _Optional[_Union[HealthStatus, str]] = ..., health_reasons: _Optional[_Iterable[str]] = ..., local_socket: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_block_key_bytes", "max_blocks_per_call", "max_message_bytes", "frame_bytes", "memory_bytes", "max_lease_ms")
    MAX_BLOCK_KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    max_block_key_bytes: int
    max_blocks_per_call: int
    max_message_bytes: int
    frame_bytes: int
    memory_bytes: int
    max_lease_ms: int
    def __init__(self, max_block_key_bytes: _Optional[int] = ..., max_blocks_per_call: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., frame_bytes: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., max_lease_ms: _Optional[int] = ...) -> None: ...

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ...) -> None: ...

class OpenNamespaceResponse(_message.Message):
    __slots__ = ("namespace_id", "profile", "raw_slice_bytes", "packed_slice_bytes", "key_bits", "value_bits", "boot_id")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    RAW_SLICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PACKED_SLICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_BITS_FIELD_NUMBER: _ClassVar[int]
    VALUE_BITS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    profile: str
    raw_slice_bytes: int
    packed_slice_bytes: int
    key_bits: float
    value_bits: float
    boot_id: str
    def __init__(self, namespace_id: _Optional[bytes] = ..., profile: _Optional[str] = ..., raw_slice_bytes: _Optional[int] = ..., packed_slice_bytes: _Optional[int] = ..., key_bits: _Optional[float] = ..., value_bits: _Optional[float] = ..., boot_id: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace_id", "block_keys", "lease_ms", "no_lease")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    NO_LEASE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ms: int
    no_lease: bool
    def __init__(self, namespace_id: _Optional[bytes] = ..., block_keys: _Optional[_Iterable[bytes]] = ..., lease_ms: _Optional[int] = ..., no_lease: bool = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("tiers", "lease_id", "lease_ms", "partial")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    lease_id: bytes
    lease_ms: int
    partial: bool
    def __init__(self, tiers: _Optional[_Iterable[_Union[Tier, str]]] = ..., lease_id: _Optional[bytes] = ..., lease_ms: _Optional[int] = ..., partial: bool = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("block_index", "first_layer", "num_layers", "checksum")
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    block_index: int
    first_layer: int
    num_layers: int
    checksum: int
    def __init__(self, block_index: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class RegionRange(_message.Message):
    __slots__ = ("offset", "length")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class StoreRequest(_message.Message):
    __slots__ = ("begin", "spans", "region", "commit", "padding", "payload")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    begin: StoreBegin
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    region: RegionRange
    commit: bool
    padding: bytes
    payload: bytes
    def __init__(self, begin: _Optional[_Union[StoreBegin, _Mapping]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., region: _Optional[_Union[RegionRange, _Mapping]] = ..., commit: bool = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class StoreBegin(_message.Message):
    __slots__ = ("namespace_id", "block_keys", "format", "durable")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    format: BlockFormat
    durable: bool
    def __init__(self, namespace_id: _Optional[bytes] = ..., block_keys: _Optional[_Iterable[bytes]] = ..., format: _Optional[_Union[BlockFormat, str]] = ..., durable: bool = ...) -> None: ...

class StoreResponse(_message.Message):
    __slots__ = ("ready", "released", "result")
    READY_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ready: StoreReady
    released: RegionRange
    result: StoreResult
    def __init__(self, ready: _Optional[_Union[StoreReady, _Mapping]] = ..., released: _Optional[_Union[RegionRange, _Mapping]] = ..., result: _Optional[_Union[StoreResult, _Mapping]] = ...) -> None: ...

class StoreReady(_message.Message):
    __slots__ = ("wanted",)
    WANTED_FIELD_NUMBER: _ClassVar[int]
    wanted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, wanted: _Optional[_Iterable[int]] = ...) -> None: ...

class StoreResult(_message.Message):
    __slots__ = ("num_stored", "num_present")
    NUM_STORED_FIELD_NUMBER: _ClassVar[int]
    NUM_PRESENT_FIELD_NUMBER: _ClassVar[int]
    num_stored: int
    num_present: int
    def __init__(self, num_stored: _Optional[int] = ..., num_present: _Optional[int] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("begin", "released")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    begin: RetrieveBegin
    released: RegionRange
    def __init__(self, begin: _Optional[_Union[RetrieveBegin, _Mapping]] = ..., released: _Optional[_Union[RegionRange, _Mapping]] = ...) -> None: ...

class RetrieveBegin(_message.Message):
    __slots__ = ("namespace_id", "lease_id", "first_block", "num_blocks", "format", "regions")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    lease_id: bytes
    first_block: int
    num_blocks: int
    format: BlockFormat
    regions: _containers.RepeatedCompositeFieldContainer[RegionRange]
    def __init__(self, namespace_id: _Optional[bytes] = ..., lease_id: _Optional[bytes] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., format: _Optional[_Union[BlockFormat, str]] = ..., regions: _Optional[_Iterable[_Union[RegionRange, _Mapping]]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("header", "spans", "region", "padding", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: RetrieveHeader
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    region: RegionRange
    padding: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[RetrieveHeader, _Mapping]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., region: _Optional[_Union[RegionRange, _Mapping]] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class RetrieveHeader(_message.Message):
    __slots__ = ("num_blocks", "miss_reason")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MISS_REASON_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    miss_reason: str
    def __init__(self, num_blocks: _Optional[int] = ..., miss_reason: _Optional[str] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("begin", "request_id", "layer", "num_tokens", "position", "timeout_ms", "region", "queries")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    begin: AttendBegin
    request_id: int
    layer: int
    num_tokens: int
    position: int
    timeout_ms: int
    region: RegionRange
    queries: bytes
    def __init__(self, begin: _Optional[_Union[AttendBegin, _Mapping]] = ..., request_id: _Optional[int] = ..., layer: _Optional[int] = ..., num_tokens: _Optional[int] = ..., position: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., region: _Optional[_Union[RegionRange, _Mapping]] = ..., queries: _Optional[bytes] = ...) -> None: ...

class AttendBegin(_message.Message):
    __slots__ = ("namespace_id", "lease_id", "prefix_tokens", "num_q_heads", "query_dtype", "scale", "logit_soft_cap", "sliding_window", "sink_tokens")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    QUERY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    SLIDING_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    lease_id: bytes
    prefix_tokens: int
    num_q_heads: int
    query_dtype: Dtype
    scale: float
    logit_soft_cap: float
    sliding_window: int
    sink_tokens: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., lease_id: _Optional[bytes] = ..., prefix_tokens: _Optional[int] = ..., num_q_heads: _Optional[int] = ..., query_dtype: _Optional[_Union[Dtype, str]] = ..., scale: _Optional[float] = ..., logit_soft_cap: _Optional[float] = ..., sliding_window: _Optional[int] = ..., sink_tokens: _Optional[int] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("request_id", "ready", "error", "queue_ns", "kernel_ns", "batch_requests", "out", "lse")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_NS_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    ready: AttendReady
    error: AttendError
    queue_ns: int
    kernel_ns: int
    batch_requests: int
    out: bytes
    lse: bytes
    def __init__(self, request_id: _Optional[int] = ..., ready: _Optional[_Union[AttendReady, _Mapping]] = ..., error: _Optional[_Union[AttendError, _Mapping]] = ..., queue_ns: _Optional[int] = ..., kernel_ns: _Optional[int] = ..., batch_requests: _Optional[int] = ..., out: _Optional[bytes] = ..., lse: _Optional[bytes] = ...) -> None: ...

class AttendReady(_message.Message):
    __slots__ = ("prefix_tokens", "max_request_tokens")
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefix_tokens: int
    max_request_tokens: int
    def __init__(self, prefix_tokens: _Optional[int] = ..., max_request_tokens: _Optional[int] = ...) -> None: ...

class AttendError(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class AttendLayerRequest(_message.Message):
    __slots__ = ("begin", "layer", "num_tokens", "position", "queries")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    begin: AttendBegin
    layer: int
    num_tokens: int
    position: int
    queries: bytes
    def __init__(self, begin: _Optional[_Union[AttendBegin, _Mapping]] = ..., layer: _Optional[int] = ..., num_tokens: _Optional[int] = ..., position: _Optional[int] = ..., queries: _Optional[bytes] = ...) -> None: ...

class AttendLayerResponse(_message.Message):
    __slots__ = ("out", "lse")
    OUT_FIELD_NUMBER: _ClassVar[int]
    LSE_FIELD_NUMBER: _ClassVar[int]
    out: bytes
    lse: bytes
    def __init__(self, out: _Optional[bytes] = ..., lse: _Optional[bytes] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    def __init__(self, lease_id: _Optional[bytes] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("namespace_id", "block_keys")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace_id: _Optional[bytes] = ..., block_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("num_deleted",)
    NUM_DELETED_FIELD_NUMBER: _ClassVar[int]
    num_deleted: int
    def __init__(self, num_deleted: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("counters", "gauges", "boot_id", "uptime_s")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class GaugesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    GAUGES_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    gauges: _containers.ScalarMap[str, int]
    boot_id: str
    uptime_s: float
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ..., gauges: _Optional[_Mapping[str, int]] = ..., boot_id: _Optional[str] = ..., uptime_s: _Optional[float] = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceInfo]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceInfo, _Mapping]]] = ...) -> None: ...

class NamespaceInfo(_message.Message):
    __slots__ = ("namespace_id", "namespace", "memory_blocks", "packed_block_bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PACKED_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    namespace: Namespace
    memory_blocks: int
    packed_block_bytes: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., memory_blocks: _Optional[int] = ..., packed_block_bytes: _Optional[int] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("namespace_id", "tiers")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    def __init__(self, namespace_id: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[Tier, str]]] = ...) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("memory_blocks", "redis_records")
    MEMORY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REDIS_RECORDS_FIELD_NUMBER: _ClassVar[int]
    memory_blocks: int
    redis_records: int
    def __init__(self, memory_blocks: _Optional[int] = ..., redis_records: _Optional[int] = ...) -> None: ...

class SetMemoryLimitRequest(_message.Message):
    __slots__ = ("limit_bytes",)
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    limit_bytes: int
    def __init__(self, limit_bytes: _Optional[int] = ...) -> None: ...

class SetMemoryLimitResponse(_message.Message):
    __slots__ = ("limit_bytes", "used_bytes")
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    limit_bytes: int
    used_bytes: int
    def __init__(self, limit_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...
