"""The class that vLLM loads: thin, so that everything else can be tested without the engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as ops
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from polarcache.client.vllm.cache import EngineCache
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity, engine_identity
from polarcache.client.vllm.layouts import CacheLayout, KeyThenValue, TransposedKeys, check_shape
from polarcache.client.vllm.link import StoreLink
from polarcache.client.vllm.lookups import Lookups
from polarcache.client.vllm.pins import PinnedBlocks
from polarcache.client.vllm.plan import StepPlan, WorkerReport
from polarcache.client.vllm.scheduler import SchedulerSide
from polarcache.client.vllm.worker import WorkerSide
from polarcache.proto.errors import PolarCacheError, UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["PolarCacheConnector"]

_log = logging.getLogger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Carries a step's plan to the workers."""

    plan: StepPlan


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):
    """Carries a worker's report to the scheduler."""

    report: WorkerReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        """What two workers report together."""
        if not isinstance(other, ReportMetadata):
            raise TypeError(f"expected ReportMetadata, got {type(other).__name__}")
        return ReportMetadata(self.report + other.report)


class PolarCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads prompts' blocks from a PolarCache store and stores what the engine computes.

    vLLM makes one for its scheduler and one for each worker.

    Args:
        vllm_config: The engine's configuration.
        role: Scheduler or worker.
        kv_cache_config: The engine's cache.

    Raises:
        UnsupportedError: This kind of model or parallelism cannot be stored yet.
        InvalidRequestError: An option is wrong, or block hashes start from a random seed.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_where_vllm_does()
        transfer = self._kv_transfer_config
        self._config = ConnectorConfig.from_extra_config(transfer.kv_connector_extra_config)
        self._identity = engine_identity(vllm_config, kv_cache_config, self._config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            if transfer.kv_load_failure_policy != "recompute" and transfer.is_kv_consumer:
                _log.warning(
                    'kv_load_failure_policy is "%s": requests whose load fails end with an error. '
                    'Set it to "recompute".',
                    transfer.kv_load_failure_policy,
                )
            # It moves no blocks.
            config = self._config.model_copy(update={"shared_memory_bytes": 0})
            self._link = StoreLink(config, self._identity.specs)
            self._lookups = Lookups(self._link, self._config)
            max_pinned = int(self._config.max_pinned * kv_cache_config.num_blocks)
            self._pins = PinnedBlocks(len(self._identity.specs), max_pinned)
            self._scheduler = SchedulerSide(
                self._identity,
                self._config,
                self._link,
                self._lookups,
                self._pins,
                may_load=transfer.is_kv_consumer,
                may_store=transfer.is_kv_producer,
            )
        else:
            self._rank = get_tensor_model_parallel_rank()
            self._link = StoreLink(self._config, self._identity.specs[self._rank :][:1])

    # -- both sides -------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a lost store is a miss later on."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether layers must be able to wait inside of the forward pass."""
        return ConnectorConfig.from_extra_config(extra_config).load == "layerwise"

    def shutdown(self) -> None:
        """Ends threads and connections."""
        if self._worker is not None:
            self._worker.close()
            return
        if self._scheduler is not None:
            self._lookups.close()
        self._link.close()

    # -- worker -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Takes the engine's cache.

        Raises:
            UnsupportedError: It is laid out in a way that is not known.
        """
        identity = self._identity
        layers = [kv_caches[name] for name in identity.layer_names]
        for name, layer in zip(identity.layer_names, layers, strict=True):
            check_shape(name, layer, identity.layout, identity.engine_block_tokens)
        cache = EngineCache(layers, _cache_layout(layers[0], identity))
        self._worker = WorkerSide(identity, self._config, self._link, self._rank, cache)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begins the step's loads."""
        self._on_worker().start_loads(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Waits for a layer, where loads are layer-wise."""
        self._on_worker().wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Does nothing: whole blocks are stored after the step."""

    def wait_for_save(self) -> None:
        """Begins the step's stores, whose blocks the scheduler holds until they are done."""
        worker = self._on_worker()
        worker.finish_sync_loads()
        worker.start_stores(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended."""
        worker = self._on_worker()
        worker.wait_while_idle(self._plan())
        return None, worker.take_finished_loads() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Engine blocks that must be computed after all."""
        return self._on_worker().take_missing_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What this worker finished."""
        report = self._on_worker().take_report()
        return None if report is None else ReportMetadata(report)

    # -- scheduler --------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Takes the pool of the blocks that stores hold."""
        self._pins.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """Begins a request's lookup."""
        self._on_scheduler().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded, None while the lookup is under way."""
        return self._on_scheduler().matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plans a request's load."""
        (block_ids,) = blocks.get_block_ids()
        self._on_scheduler().allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The step's plan."""
        return StepMetadata(self._on_scheduler().plan(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Takes the workers' reports."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, ReportMetadata):
            self._on_scheduler().reported(meta.report)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forgets a request; its blocks are free but for those that stores hold."""
        self._on_scheduler().finished(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`."""
        return self.request_finished(request, block_ids[0])

    def has_pending_block_frees(self) -> bool:
        """Whether stores are about to free blocks."""
        return self._pins.will_free_soon()

    def reset_cache(self) -> bool | None:
        """Removes the blocks of this engine's namespaces from the store, for all who share them."""
        if not self._link.namespaces:
            return False
        try:
            for namespace in self._link.namespaces:
                self._link.client.clear(namespace)
        except PolarCacheError as error:
            self._link.failed(error)
            return False
        return True

    # -- inside -----------------------------------------------------------------------------

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, StepMetadata):
            raise TypeError(f"expected StepMetadata, got {type(metadata).__name__}")
        return metadata.plan

    def _on_scheduler(self) -> SchedulerSide:
        if self._scheduler is None:
            raise RuntimeError("this connector is a worker's, not the scheduler's")
        return self._scheduler

    def _on_worker(self) -> WorkerSide:
        if self._worker is None:
            raise RuntimeError("register_kv_caches must come first, on a worker's connector")
        return self._worker


def _log_where_vllm_does() -> None:
    """Sends this package's messages to vLLM's log: nobody else configures them."""
    ours, theirs = logging.getLogger("polarcache.client.vllm"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = False


def _cache_layout(cache: torch.Tensor, identity: EngineIdentity) -> CacheLayout:
    if cache.device.type == "cuda":
        return KeyThenValue(identity.layout.head_dim)
    if cache.device.type == "cpu":
        return _cpu_layout(identity)
    raise UnsupportedError(f"the connector works on CUDA and CPU, not on {cache.device.type}")


def _cpu_layout(identity: EngineIdentity) -> CacheLayout:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    layout = identity.layout
    dtype = getattr(torch, layout.dtype)
    isa = _get_attn_isa(dtype, identity.engine_block_tokens, layout.head_dim)
    if isa != "vec" or layout.head_dim != layout.v_head_dim:
        raise UnsupportedError(
            f'on CPU the connector knows the cache of vLLM\'s "vec" attention with equal key and '
            f'value channels; this engine uses "{isa}" with {layout.head_dim} and '
            f"{layout.v_head_dim}. With AMX use --dtype float16 or float32"
        )

    def write(
        keys: torch.Tensor,
        values: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)

    cpu_layout = TransposedKeys(write)
    cpu_layout.check(layout, identity.engine_block_tokens)
    return cpu_layout
