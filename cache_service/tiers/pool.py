"""The memory tier's page pool: packed blocks in one torch allocation.

A page holds one packed block. Pages of one namespace have one size; several namespaces share the
pool, so free room is kept as extents that merge with their neighbours. A page never moves, so a
kernel can address it by its offset.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import torch

__all__ = ["PAGE_ALIGNMENT_BYTES", "Page", "PagePool"]

PAGE_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Page:
    """A place in the pool.

    Attributes:
        offset: First byte, a multiple of `PAGE_ALIGNMENT_BYTES`.
        num_bytes: Bytes that the block uses.
        checksums: Of those consecutive layers that came with one, as they came: xxh3-64 by first
            layer and number of layers. A reader gets the storing worker's, so that it also tells
            of bytes that changed in memory.
    """

    offset: int
    num_bytes: int
    checksums: dict[tuple[int, int], int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def extent_bytes(self) -> int:
        """Bytes taken from the pool."""
        return -(-self.num_bytes // PAGE_ALIGNMENT_BYTES) * PAGE_ALIGNMENT_BYTES


class PagePool:
    """Allocates pages from one byte tensor. Not thread-safe: the store's lock guards it.

    Args:
        capacity_bytes: Size of the allocation; rounded down to the page alignment.
        device: torch device of the allocation. Host memory is committed as it is first written.
    """

    def __init__(self, capacity_bytes: int, device: torch.device) -> None:
        self.capacity_bytes = capacity_bytes // PAGE_ALIGNMENT_BYTES * PAGE_ALIGNMENT_BYTES
        self.limit_bytes = self.capacity_bytes
        self.used_bytes = 0
        self.memory = torch.empty(self.capacity_bytes, dtype=torch.uint8, device=device)
        self._start_of_end: dict[int, int] = {}
        self._end_of_start: dict[int, int] = {}
        # Free extents by size: few sizes, many extents of each.
        self._sizes: list[int] = []
        self._starts_of_size: dict[int, dict[int, None]] = {}
        if self.capacity_bytes:
            self._add_free(0, self.capacity_bytes)

    def allocate(self, num_bytes: int) -> Page | None:
        """A page of `num_bytes`, or None when no free extent within the limit is long enough."""
        extent = Page(0, num_bytes).extent_bytes
        if self.used_bytes + extent > self.limit_bytes:
            return None
        position = bisect.bisect_left(self._sizes, extent)
        if position == len(self._sizes):
            return None
        start = next(iter(self._starts_of_size[self._sizes[position]]))
        end = self._remove_free(start)
        if end > start + extent:
            self._add_free(start + extent, end)
        self.used_bytes += extent
        return Page(start, num_bytes)

    def free(self, page: Page) -> None:
        """Returns a page's extent, merged with free neighbours."""
        start, end = page.offset, page.offset + page.extent_bytes
        self.used_bytes -= page.extent_bytes
        before = self._start_of_end.get(start)
        if before is not None:
            self._remove_free(before)
            start = before
        if end in self._end_of_start:
            end = self._remove_free(end)
        self._add_free(start, end)

    def view(self, page: Page) -> torch.Tensor:
        """The page's bytes, uint8 [num_bytes], sharing memory with the pool."""
        return self.memory[page.offset : page.offset + page.num_bytes]

    def _add_free(self, start: int, end: int) -> None:
        self._end_of_start[start] = end
        self._start_of_end[end] = start
        size = end - start
        if size not in self._starts_of_size:
            bisect.insort(self._sizes, size)
            self._starts_of_size[size] = {}
        self._starts_of_size[size][start] = None

    def _remove_free(self, start: int) -> int:
        end = self._end_of_start.pop(start)
        del self._start_of_end[end]
        size = end - start
        starts = self._starts_of_size[size]
        del starts[start]
        if not starts:
            del self._starts_of_size[size]
            self._sizes.pop(bisect.bisect_left(self._sizes, size))
        return end
