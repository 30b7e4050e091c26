"""The class that SGLang loads: thin, so that everything else can be tested without the engine."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from polarcache.client.sglang.backend import HiCacheBackend

__all__ = ["PolarCacheHiCache"]


class PolarCacheHiCache(HiCacheBackend, HiCacheStorage):
    """PolarCache as SGLang's third cache level, for `--hicache-storage-backend dynamic`.

    The side-pool interface (`batch_*_v2`) stays SGLang's own and refuses: models that need it are
    refused when their pools are registered.
    """

    def get_stats(self) -> Any:
        """SGLang's `StorageMetrics` of the transfers since the last call."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        loads, saves = self.take_transfers()
        return StorageMetrics(
            prefetch_pgs=loads.pages,
            backup_pgs=saves.pages,
            prefetch_bandwidth=loads.gb_per_s,
            backup_bandwidth=saves.gb_per_s,
        )
