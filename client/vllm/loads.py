"""One load: blocks from the store into the engine's cache, layer after layer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

from polarcache.client._types import LayerTensors, Match, Namespace, Tier
from polarcache.client.vllm.cache import EngineCache, Fence
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.link import StoreLink
from polarcache.client.vllm.plan import LoadJob
from polarcache.proto.errors import PolarCacheError

__all__ = ["Load"]

_log = logging.getLogger(__name__)


class Load:
    """A load under way. `run` is called in a thread, everything else in the engine's.

    Attributes:
        job: What to load.
        missing: Engine blocks that did not come; complete once `is_done`.
        loaded_bytes: Bytes of keys and values that came.
        seconds: How long it took.

    Args:
        job: What to load.
        rank: This worker's tensor-parallel rank.
        num_layers: Layers of the cache.
        engine_block_tokens: Tokens of an engine block.
        fence: After it the engine no more touches the blocks.
    """

    def __init__(
        self, job: LoadJob, rank: int, num_layers: int, engine_block_tokens: int, fence: Fence
    ) -> None:
        self.job = job
        self.missing: tuple[int, ...] = job.block_ids
        self.loaded_bytes = 0
        self.seconds = 0.0
        self._prefix = job.prefixes[rank]
        self._engine_block_tokens = engine_block_tokens
        self._fence = fence
        self._layer_fences: list[Fence] = []
        self._num_layers = num_layers
        self._is_done = False
        self._changed = threading.Condition()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._is_done

    def wait(self) -> None:
        """Waits until it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_done)

    def wait_for_layer(self, layer: int, cache: EngineCache) -> None:
        """Waits until a layer has come or the load has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_done or len(self._layer_fences) > layer)
        if len(self._layer_fences) > layer:
            cache.wait_in_engine(self._layer_fences[layer])

    def run(
        self,
        link: StoreLink,
        cache: EngineCache,
        config: ConnectorConfig,
        some_ended: threading.Event,
    ) -> None:
        """Loads. Never raises what the store may cause: what is missing is computed.

        Args:
            link: Connection to the store.
            cache: The engine's cache.
            config: The connector's options.
            some_ended: Set once this load has ended.
        """
        began_s = time.monotonic()
        match: Match | None = None
        try:
            (namespace,) = link.wait(config.lookup_timeout_ms / 1000)
            match = self._match(namespace)
            self._run(link, cache, config, match)
        except PolarCacheError as error:
            _log.warning("load failed: %s: %s", type(error).__name__, error)
            link.failed(error)
        finally:
            self.seconds = time.monotonic() - began_s
            with self._changed:
                self._is_done = True
                self._changed.notify_all()
            some_ended.set()
            # The engine does not wait for this.
            if match is not None:
                self._release(link, match)

    def _run(
        self, link: StoreLink, cache: EngineCache, config: ConnectorConfig, match: Match
    ) -> None:
        block_ids: tuple[int, ...] = ()
        for layer, (keys, values) in enumerate(self._layers(link, match, config)):
            num_blocks = max(0, len(keys) - self.job.skip_tokens) // self._engine_block_tokens
            block_ids = self.job.block_ids[:num_blocks]
            fence: Fence = None
            if block_ids:
                keys, values = keys[self.job.skip_tokens :], values[self.job.skip_tokens :]
                fence = cache.write(layer, block_ids, keys, values, self._fence)
                self.loaded_bytes += keys.nbytes + values.nbytes
            with self._changed:
                self._layer_fences.append(fence)
                self._changed.notify_all()
        cache.finish_writes()
        if len(self._layer_fences) == self._num_layers:
            self.missing = self.job.block_ids[len(block_ids) :]

    def _layers(
        self, link: StoreLink, match: Match, config: ConnectorConfig
    ) -> Iterator[LayerTensors]:
        job = self.job
        if config.pack == "worker":
            return iter(
                link.client.retrieve(
                    match, first_block=job.first_block, num_blocks=job.num_blocks, pack="worker"
                ).layers
            )
        return link.client.retrieve_layers(
            match, first_block=job.first_block, num_blocks=job.num_blocks
        )

    def _match(self, namespace: Namespace) -> Match:
        prefix = self._prefix
        # Which tier holds a block matters to nobody here.
        memory: Tier = "memory"
        tiers = (memory,) * prefix.num_blocks
        return Match(namespace, tiers, prefix.lease_id, prefix.lease_ms, partial=False)

    def _release(self, link: StoreLink, match: Match) -> None:
        try:
            link.client.release(match)
        except PolarCacheError as error:
            # The lease ends by itself.
            _log.debug("release failed: %s: %s", type(error).__name__, error)
