"""The scheduler's side: which blocks to load and to store, request by request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.gate import LoadGate
from polarcache.client.vllm.identity import EngineIdentity
from polarcache.client.vllm.link import StoreLink
from polarcache.client.vllm.lookups import FoundPrefix, Lookup, Lookups
from polarcache.client.vllm.pins import PinnedBlocks
from polarcache.client.vllm.plan import (
    IDLE_WAIT_S,
    LoadJob,
    StepPlan,
    StoreJob,
    WorkerReport,
)
from polarcache.client.vllm.recent import RecentKeys

__all__ = ["SchedulerSide"]

# Keys in one lookup; the service takes as many in one call.
_MAX_KEYS = 16_384


@dataclass(slots=True)
class _Tracked:
    """What is known of one request.

    Attributes:
        request: vLLM's request.
        lookup: Lookup that has not led to a load yet.
        offer: Tokens that the engine had when it was offered a load, and tokens offered.
        num_stored: Leading stored blocks that need no store: found, or given to the workers.
        may_load: False once a load has failed: the request is computed.
        may_store: False once a store has failed: what follows would lack its prefix.
        loads_left: Ranks that have not ended the request's load.
    """

    request: Any
    lookup: Lookup | None = None
    offer: tuple[int, int] = (0, 0)
    num_stored: int = 0
    may_load: bool = True
    may_store: bool = True
    loads_left: int = 0


class SchedulerSide:
    """Decides what is loaded and stored. All methods are called by the engine's scheduler.

    Args:
        identity: The engine as the store sees it.
        config: The connector's options.
        link: Connection to the store, with the namespaces of all ranks.
        lookups: Lookups in the background.
        pins: Blocks held for stores.
        may_load: Whether the engine's kv_role lets it load.
        may_store: Whether the engine's kv_role lets it store.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        identity: EngineIdentity,
        config: ConnectorConfig,
        link: StoreLink,
        lookups: Lookups,
        pins: PinnedBlocks,
        *,
        may_load: bool = True,
        may_store: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._config = config
        self._link = link
        self._lookups = lookups
        self._pins = pins
        self._may_load = may_load
        self._may_store = may_store
        self._gate = LoadGate(config.min_load_bytes_per_s)
        self._block_tokens = identity.layout.block_tokens
        self._recent = RecentKeys()
        self._seen_namespaces = link.namespaces
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[LoadJob] = []
        self._clock = clock
        self._computing: set[str] = set()
        self._wait_left_s = IDLE_WAIT_S
        self._has_awaited = False
        self._next_job_id = 0

    # -- lookup and load --------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Begins the lookup of a request before it is its turn."""
        tracked = self._track(request)
        if self._is_worth_a_lookup(tracked, 0):
            tracked.lookup = self._lookups.start(self._keys(request, self._loadable(request)))

    def matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those the engine has; None while that is not known.

        The second value tells whether the load runs while the request waits.
        """
        tracked = self._track(request)
        if not self._is_worth_a_lookup(tracked, num_computed_tokens):
            self._drop_lookup(tracked)
            return 0, False
        keys = self._keys(request, self._loadable(request))
        if tracked.lookup is None:
            tracked.lookup = self._lookups.start(keys)
        found = self._result(tracked.lookup)
        if found is not None and self._lookups.is_stale(found):
            self._drop_lookup(tracked)
            tracked.lookup, found = self._lookups.start(keys), None
        if found is None:
            self._has_awaited = True
            return None, False
        tracked.num_stored = max(tracked.num_stored, found.num_blocks)
        self._recent.add(keys[: found.num_blocks])
        # All but the last token at most: from it the engine computes the first new one.
        end = min(found.num_blocks * self._block_tokens, request.num_tokens - 1)
        tokens = end - num_computed_tokens
        if tokens < self._config.min_load_tokens or not self._gate.is_open():
            tracked.offer = (0, 0)
            return 0, False
        tracked.offer = (num_computed_tokens, tokens)
        return tokens, self._config.load == "async"

    def allocated(self, request: Any, block_ids: list[int], num_external_tokens: int) -> None:
        """Plans the load of a request whose blocks are allocated, if it was taken up."""
        tracked = self._track(request)
        lookup, tracked.lookup = tracked.lookup, None
        (had, offered), tracked.offer = tracked.offer, (0, 0)
        if lookup is None:
            return
        if num_external_tokens == 0 or num_external_tokens != offered:
            self._lookups.drop(lookup)
            return
        self._gate.passed()
        self._loads.append(
            self._load_job(request.request_id, lookup.future.result(), had, offered, block_ids)
        )
        tracked.loads_left = len(self._identity.specs)

    def finished(self, request_id: str) -> None:
        """Forgets a request."""
        self._computing.discard(request_id)
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            self._drop_lookup(tracked)

    # -- steps ------------------------------------------------------------------------------

    def plan(self, scheduler_output: Any) -> StepPlan:
        """What the workers shall do in the step that was scheduled."""
        loads, self._loads = tuple(self._loads), []
        stores = tuple(self._store_jobs(scheduler_output)) if self._may_store else ()
        self._computing.update(scheduler_output.num_scheduled_tokens)
        may_wait = not (scheduler_output.num_scheduled_tokens or self._has_awaited)
        self._wait_left_s, self._has_awaited = IDLE_WAIT_S, False
        return StepPlan(loads, stores, may_wait)

    def reported(self, report: WorkerReport) -> None:
        """Takes note of what the workers finished."""
        for job_id, num_ranks in report.stores.items():
            self._pins.done(job_id, num_ranks)
        if report.failed_stores or report.failed_loads:
            self._recent.clear()
        for request_id in report.failed_stores & self._tracked.keys():
            self._tracked[request_id].may_store = False
        for request_id in report.loads.keys() & self._tracked.keys():
            self._tracked[request_id].loads_left -= report.loads[request_id]
        for request_id in report.failed_loads & self._tracked.keys():
            tracked = self._tracked[request_id]
            # What the lookup found is not there after all: it is computed, and stored again.
            tracked.may_load, tracked.num_stored = False, 0
        if report.loaded_bytes:
            self._gate.measured(report.loaded_bytes, report.load_s)

    # -- inside -----------------------------------------------------------------------------

    def _track(self, request: Any) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = _Tracked(request)
        return tracked

    def _result(self, lookup: Lookup) -> FoundPrefix | None:
        """A lookup's result, waited for a little while the engine computes nothing."""
        found = self._lookups.result(lookup)
        if found is None and not self._computing and self._wait_left_s > 0:
            began_s = self._clock()
            self._lookups.wait(lookup, self._wait_left_s)
            self._wait_left_s -= self._clock() - began_s
            found = self._lookups.result(lookup)
        return found

    def _loadable(self, request: Any) -> int:
        """Stored blocks of a request that may be loaded."""
        return int(request.num_tokens) // self._block_tokens

    def _is_worth_a_lookup(self, tracked: _Tracked, num_computed_tokens: int) -> bool:
        request = tracked.request
        end = min(self._loadable(request) * self._block_tokens, request.num_tokens - 1)
        most = end - num_computed_tokens
        return bool(
            self._may_load
            and tracked.may_load
            and self._link.namespaces
            and most >= self._config.min_load_tokens
            and not request.skip_reading_prefix_cache
        )

    def _keys(self, request: Any, num_blocks: int, first: int = 0) -> list[bytes]:
        """Keys of stored blocks: a block is named by the hash of its last engine block."""
        per_key = self._identity.blocks_per_key
        num_blocks = min(num_blocks, len(request.block_hashes) // per_key, first + _MAX_KEYS)
        return [
            bytes(request.block_hashes[(i + 1) * per_key - 1]) for i in range(first, num_blocks)
        ]

    def _drop_lookup(self, tracked: _Tracked) -> None:
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is not None:
            self._lookups.drop(lookup)

    def _load_job(
        self, request_id: str, found: FoundPrefix, had: int, offered: int, block_ids: list[int]
    ) -> LoadJob:
        first_block, skip_tokens = divmod(had, self._block_tokens)
        end = had + offered
        engine_block = self._identity.engine_block_tokens
        return LoadJob(
            request_id=request_id,
            prefixes=found.leased(),
            first_block=first_block,
            num_blocks=-(-end // self._block_tokens) - first_block,
            skip_tokens=skip_tokens,
            block_ids=tuple(block_ids[had // engine_block : -(-end // engine_block)]),
            is_async=self._config.load == "async",
        )

    def _store_jobs(self, scheduler_output: Any) -> Iterable[StoreJob]:
        if self._link.namespaces is not self._seen_namespaces:
            self._seen_namespaces = self._link.namespaces
            self._recent.clear()
        if not self._seen_namespaces:
            return
        block_state = scheduler_output.kv_connector_block_state
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            # Behind a load that may fail, the step may compute on what is not there.
            if tracked is None or not tracked.may_store or tracked.loads_left > 0:
                continue
            keys = self._new_keys(tracked, num_tokens)
            if not keys:
                continue
            per_key = self._identity.blocks_per_key
            first = tracked.num_stored * per_key
            (block_ids,) = block_state.get_block_ids(request_id)
            tracked.num_stored += len(keys)
            job = StoreJob(
                job_id=self._next_job_id,
                request_id=request_id,
                keys=tuple(keys),
                block_ids=tuple(block_ids[first : first + len(keys) * per_key]),
            )
            self._next_job_id += 1
            self._recent.add(job.keys)
            self._pins.hold(job.job_id, job.block_ids)
            yield job

    def _new_keys(self, tracked: _Tracked, num_scheduled_tokens: int) -> list[bytes]:
        """Keys of the blocks that are whole after the step and not stored, as far as pins go."""
        request = tracked.request
        num_tokens = request.num_computed_tokens + num_scheduled_tokens
        if not self._config.store_generated:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        keys = self._keys(request, num_tokens // self._block_tokens, tracked.num_stored)
        num_known = next((i for i, key in enumerate(keys) if key not in self._recent), len(keys))
        tracked.num_stored += num_known
        keys = keys[num_known:]
        return keys[: max(0, self._pins.room // self._identity.blocks_per_key)]
