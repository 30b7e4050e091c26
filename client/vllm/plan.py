"""What scheduler and workers tell each other, step by step. Plain data, no vLLM, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["IDLE_WAIT_S", "LeasedPrefix", "LoadJob", "StepPlan", "StoreJob", "WorkerReport"]

KeyT = TypeVar("KeyT")

# While the engine computes nothing, each side of the connector waits so long, at most, in a step
# for what the engine waits for: vLLM would only spin, holding the interpreter's lock and the core
# that background threads need. Short, for a new request waits as well.
IDLE_WAIT_S = 0.01


@dataclass(frozen=True, slots=True)
class LeasedPrefix:
    """One rank's lease on a stored prefix.

    Attributes:
        lease_id: From the lookup.
        lease_ms: Life of the lease, milliseconds.
        num_blocks: Stored blocks under the lease.
    """

    lease_id: bytes
    lease_ms: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Stored blocks to bring into the engine's cache.

    Attributes:
        request_id: The engine's name of the request.
        prefixes: The lease of each tensor-parallel rank.
        first_block: First stored block to read.
        num_blocks: Stored blocks to read.
        skip_tokens: Leading tokens of the first block that the engine has already.
        block_ids: Engine blocks that the other tokens go to, in order.
        is_async: Whether the request waits outside of the batch until the load is done.
    """

    request_id: str
    prefixes: tuple[LeasedPrefix, ...]
    first_block: int
    num_blocks: int
    skip_tokens: int
    block_ids: tuple[int, ...]
    is_async: bool


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Engine blocks to store once the step is computed.

    Attributes:
        job_id: Counts up, one for each job.
        request_id: The engine's name of the request.
        keys: Keys of the stored blocks.
        block_ids: Engine blocks that hold them, in order. Held until every rank has reported.
    """

    job_id: int
    request_id: str
    keys: tuple[bytes, ...]
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the workers shall do in one step.

    Attributes:
        loads: Loads to begin.
        stores: Stores to begin.
        may_wait: Whether there is nothing to compute and no lookup to wait for, so that a worker
            may wait for a transfer to end.
    """

    loads: tuple[LoadJob, ...] = ()
    stores: tuple[StoreJob, ...] = ()
    may_wait: bool = False


@dataclass(slots=True)
class WorkerReport:
    """What one worker, or all of them together, finished since the last step.

    Attributes:
        stores: Ranks that ended each store job, well or not.
        failed_stores: Requests of which a store failed.
        loads: Ranks that ended each request's load, well or not.
        failed_loads: Requests of which a load failed, at least in part.
        loaded_bytes: Bytes of keys and values that came.
        load_s: Seconds spent on loads that brought them.
    """

    stores: dict[int, int] = field(default_factory=dict)
    failed_stores: set[str] = field(default_factory=set)
    loads: dict[str, int] = field(default_factory=dict)
    failed_loads: set[str] = field(default_factory=set)
    loaded_bytes: int = 0
    load_s: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.stores or self.loads)

    def __add__(self, other: WorkerReport) -> WorkerReport:
        """What two workers report together."""
        return WorkerReport(
            stores=_sum(self.stores, other.stores),
            failed_stores=self.failed_stores | other.failed_stores,
            loads=_sum(self.loads, other.loads),
            failed_loads=self.failed_loads | other.failed_loads,
            loaded_bytes=self.loaded_bytes + other.loaded_bytes,
            load_s=self.load_s + other.load_s,
        )


def _sum(one: dict[KeyT, int], other: dict[KeyT, int]) -> dict[KeyT, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
