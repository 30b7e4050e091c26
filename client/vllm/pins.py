"""Engine blocks that waiting stores keep from being reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PinnedBlocks"]

# A store ends sooner than a preempted request is computed anew; a stalled one does not.
_PATIENCE_S = 0.2


@dataclass(slots=True)
class _Pin:
    block_ids: tuple[int, ...]
    ranks_left: int
    since_s: float


class PinnedBlocks:
    """Holds a reference on each source block of a store job until every rank is done with it.

    Args:
        num_ranks: Workers that take part in a job.
        max_blocks: Most blocks to hold.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        num_ranks: int,
        max_blocks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_ranks = num_ranks
        self._max_blocks = max_blocks
        self._clock = clock
        self._pool: Any = None
        self._pins: dict[int, _Pin] = {}
        self._num_blocks = 0

    def bind(self, block_pool: Any) -> None:
        """Takes vLLM's `BlockPool`, whose blocks are held."""
        self._pool = block_pool

    @property
    def room(self) -> int:
        """Blocks that may be held beyond those that are."""
        return self._max_blocks - self._num_blocks

    def hold(self, job_id: int, block_ids: Sequence[int]) -> None:
        """Holds the blocks of a job."""
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])
        self._pins[job_id] = _Pin(tuple(block_ids), self._num_ranks, self._clock())
        self._num_blocks += len(block_ids)

    def done(self, job_id: int, num_ranks: int) -> None:
        """Takes note that ranks are done with a job; frees its blocks after the last."""
        pin = self._pins.get(job_id)
        if pin is None:
            return
        pin.ranks_left -= num_ranks
        if pin.ranks_left > 0:
            return
        del self._pins[job_id]
        self._num_blocks -= len(pin.block_ids)
        # Last blocks first: what is freed first is evicted first, and prefixes are worth more.
        self._pool.free_blocks(self._pool.blocks[one] for one in reversed(pin.block_ids))

    def will_free_soon(self) -> bool:
        """Whether it is better to wait for held blocks than to preempt a request."""
        newest_s = self._clock() - _PATIENCE_S
        return any(pin.since_s > newest_s for pin in self._pins.values())
