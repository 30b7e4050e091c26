"""The class that LMCache loads: tasks, event descriptors and bitmaps around `ObjectStore`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from polarcache.client.lmcache.object_store import ObjectStore
from polarcache.client.lmcache.objects import L2Config

__all__ = ["PolarCacheL2Adapter"]

_log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


class _Tasks(Generic[ResultT]):
    """Tasks of one kind: run in threads, announced by an event descriptor, collected once.

    Args:
        threads: Where they run.
    """

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._notifier = create_event_notifier()
        self._lock = threading.Lock()
        self._last_id = 0
        self._results: dict[int, ResultT] = {}

    def event_fd(self) -> int:
        return int(self._notifier.fileno())

    def submit(self, work: Callable[[], ResultT], failure: ResultT) -> int:
        """Starts a task; `failure` is its result if it raises, which would be a bug."""
        with self._lock:
            self._last_id += 1
            task_id = self._last_id

        def done(future: Future[ResultT]) -> None:
            error = future.exception()
            if error is not None:
                _log.error("PolarCache task failed", exc_info=error)
            with self._lock:
                self._results[task_id] = failure if error is not None else future.result()
            self._notifier.notify()

        self._threads.submit(work).add_done_callback(done)
        return task_id

    def pop(self, task_id: int) -> ResultT | None:
        with self._lock:
            return self._results.pop(task_id, None)

    def pop_all(self) -> dict[int, ResultT]:
        with self._lock:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        self._notifier.close()


class PolarCacheL2Adapter(L2AdapterInterface):
    """PolarCache as LMCache's L2, for `--l2-adapter '{"type": "plugin", ...}'`.

    Lookups take no lock: an object that was evicted between a lookup and its load is a failed
    load, which LMCache recomputes. LMCache's eviction and quotas do not reach into the store,
    which has its own.

    Args:
        params: The `adapter_params`; unknown ones are errors.
        l1_memory_desc: LMCache's description of its memory; not needed.

    Raises:
        InvalidRequestError: An option is missing, unknown or out of range.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()
        config = L2Config.parse("adapter_params", params)
        self._endpoint = config.endpoint
        self._store = ObjectStore(config)
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="polarcache-l2")
        self._stores: _Tasks[L2StoreResult] = _Tasks(self._threads)
        self._lookups: _Tasks[Bitmap] = _Tasks(self._threads)
        self._loads: _Tasks[Bitmap] = _Tasks(self._threads)

    def get_store_event_fd(self) -> int:
        """Signalled when stores end."""
        return self._stores.event_fd()

    def get_lookup_and_lock_event_fd(self) -> int:
        """Signalled when lookups end."""
        return self._lookups.event_fd()

    def get_load_event_fd(self) -> int:
        """Signalled when loads end."""
        return self._loads.event_fd()

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Starts to store objects; the task's id."""

        def store() -> L2StoreResult:
            stored = self._store.store(keys, objects)
            num_bytes = sum(o.get_size() for o, ok in zip(objects, stored, strict=True) if ok)
            return L2StoreResult(all(stored), num_bytes)

        return self._stores.submit(store, L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Results of the stores that ended since the last call."""
        return self._stores.pop_all()

    def submit_lookup_and_lock_task(
        self, keys: list[Any], group_layout_descs: dict[int, Any]
    ) -> int:
        """Starts to look objects up; the task's id."""
        return self._lookups.submit(
            lambda: _bitmap(self._store.lookup(keys, group_layout_descs)), Bitmap(len(keys))
        )

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Which objects are there; None before the task ended and after it was asked."""
        return self._lookups.pop(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Nothing: lookups take no lock."""

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Starts to read into objects; the task's id."""
        return self._loads.submit(
            lambda: _bitmap(self._store.load(keys, objects)), Bitmap(len(keys))
        )

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which objects came; None before the task ended and after it was asked."""
        return self._loads.pop(task_id)

    def report_status(self) -> dict[str, Any]:
        """Whether the store was there when last asked."""
        return {
            "is_healthy": not self._store.is_away,
            "type": type(self).__name__,
            "endpoint": self._endpoint,
        }

    def close(self) -> None:
        """Ends the tasks and the connection."""
        self._store.close()
        self._threads.shutdown(wait=True)
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()


def _bitmap(flags: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(flags))
    for i, flag in enumerate(flags):
        if flag:
            bitmap.set(i)
    return bitmap
