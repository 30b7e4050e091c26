"""The worker's side: loads and stores of one rank, in threads."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

from polarcache.client.vllm.cache import EngineCache, Fence
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity
from polarcache.client.vllm.link import StoreLink
from polarcache.client.vllm.loads import Load
from polarcache.client.vllm.plan import IDLE_WAIT_S, StepPlan, StoreJob, WorkerReport
from polarcache.proto.errors import PolarCacheError

__all__ = ["WorkerSide"]

_log = logging.getLogger(__name__)
_DRAIN_S = 5.0


class WorkerSide:
    """Moves blocks between the store and the engine's cache.

    Args:
        identity: The engine as the store sees it.
        config: The connector's options.
        link: Connection to the store, with this rank's namespace.
        rank: Tensor-parallel rank.
        cache: The engine's cache.
    """

    def __init__(
        self,
        identity: EngineIdentity,
        config: ConnectorConfig,
        link: StoreLink,
        rank: int,
        cache: EngineCache,
    ) -> None:
        self._identity = identity
        self._config = config
        self._link = link
        self._rank = rank
        self._cache = cache
        self._layer_index = {name: i for i, name in enumerate(identity.layer_names)}
        self._load_threads = ThreadPoolExecutor(
            config.load_threads, "polarcache-load", _use_any_core
        )
        self._store_threads = ThreadPoolExecutor(
            config.store_threads, "polarcache-store", _use_any_core
        )
        self._loads: list[Load] = []
        self._missing: set[int] = set()
        self._report = WorkerReport()
        self._report_lock = threading.Lock()
        self._stores: set[Future[None]] = set()
        self._some_ended = threading.Event()

    # -- loads ------------------------------------------------------------------------------

    def start_loads(self, plan: StepPlan) -> None:
        """Begins a step's loads."""
        if not plan.loads:
            return
        fence = self._cache.fence()
        identity = self._identity
        for job in plan.loads:
            load = Load(
                job, self._rank, len(identity.layer_names), identity.engine_block_tokens, fence
            )
            self._loads.append(load)
            future = self._load_threads.submit(
                load.run, self._link, self._cache, self._config, self._some_ended
            )
            future.add_done_callback(_log_bug)

    def wait_for_layer(self, layer_name: str) -> None:
        """Waits until a layer of every request in the batch has come."""
        layer = self._layer_index.get(layer_name)
        if layer is None:
            return
        for load in self._loads:
            if not load.job.is_async:
                load.wait_for_layer(layer, self._cache)

    def finish_sync_loads(self) -> None:
        """Waits for the loads of requests in the batch."""
        for load in self._loads:
            if not load.job.is_async:
                load.wait()

    def take_finished_loads(self) -> set[str]:
        """Requests outside of the batch whose load has ended, well or not, since the last call."""
        done = [load for load in self._loads if load.is_done]
        self._loads = [load for load in self._loads if load not in done]
        with self._report_lock:
            for load in done:
                request_id = load.job.request_id
                self._report.loads[request_id] = self._report.loads.get(request_id, 0) + 1
                self._missing.update(load.missing)
                if load.missing:
                    self._report.failed_loads.add(request_id)
                else:
                    self._report.loaded_bytes += load.loaded_bytes
                    self._report.load_s += load.seconds
        return {load.job.request_id for load in done if load.job.is_async}

    def take_missing_blocks(self) -> set[int]:
        """Engine blocks that loads failed to fill, since the last call."""
        missing, self._missing = self._missing, set()
        return missing

    # -- stores -----------------------------------------------------------------------------

    def start_stores(self, plan: StepPlan) -> None:
        """Begins a step's stores, after its forward pass."""
        if not plan.stores:
            return
        fence = self._cache.fence()
        for job in plan.stores:
            future = self._store_threads.submit(self._store, job, fence)
            self._stores.add(future)
            future.add_done_callback(self._stores.discard)
            future.add_done_callback(_log_bug)

    def _store(self, job: StoreJob, fence: Fence) -> None:
        failed = True
        try:
            (namespace,) = self._link.wait(0)
            layers = self._cache.read(job.block_ids, fence)
            result = self._link.client.store(namespace, job.keys, layers, pack=self._config.pack)
            failed = False
            _log.debug("stored %d blocks, %d were there", result.num_stored, result.num_present)
        except PolarCacheError as error:
            _log.warning("store failed: %s: %s", type(error).__name__, error)
            self._link.failed(error)
        finally:
            with self._report_lock:
                self._report.stores[job.job_id] = 1
                if failed:
                    self._report.failed_stores.add(job.request_id)
            self._some_ended.set()

    # -- both -------------------------------------------------------------------------------

    def wait_while_idle(self, plan: StepPlan) -> None:
        """In a step that may wait, waits a little for a load or store to end."""
        if plan.may_wait and (self._loads or self._stores):
            self._some_ended.wait(IDLE_WAIT_S)
        # What ended so far is taken in this step.
        self._some_ended.clear()

    def take_report(self) -> WorkerReport | None:
        """What ended since the last call; None when nothing did."""
        with self._report_lock:
            if self._report.is_empty:
                return None
            report, self._report = self._report, WorkerReport()
            return report

    def close(self) -> None:
        """Lets stores under way end, for five seconds at most, and closes the connection."""
        wait(list(self._stores), _DRAIN_S)
        for threads in (self._load_threads, self._store_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self._link.close()


def _log_bug(future: Future[None]) -> None:
    """Tells of an error that no store can cause; load or store count as failed already."""
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.error("unexpected error in a background thread", exc_info=error)


def _use_any_core() -> None:
    """Lets a background thread run on any core.

    vLLM's CPU worker binds its main thread to one core; threads that it starts would inherit that
    and take the core from the forward pass.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
