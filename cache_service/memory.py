"""The memory tier: pages, the index over them, and the leases that pin them, behind one lock.

Nothing here waits on anything but the lock, except `wait_for_room`. A page is freed when its
block has left the index and its last pin is gone, so a reader never sees another block's bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from polarcache.cache_service.index import BlockIndex, Entry
from polarcache.cache_service.leases import Lease, LeaseTable
from polarcache.cache_service.tiers.pool import Page, PagePool
from polarcache.proto.errors import LeaseExpiredError

__all__ = ["MemoryTier"]


class MemoryTier:
    """Packed blocks in memory. Thread-safe.

    Args:
        pool: Where their pages come from; used by nobody else.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._index = BlockIndex()
        self._leases = LeaseTable()
        self._changed = threading.Condition()
        self._num_victims = 0
        self._num_pinned = 0
        self.leases_expired = 0

    def find(self, namespace_id: bytes, block_keys: Sequence[bytes]) -> list[Entry | None]:
        """The entry of each block, None where there is none."""
        with self._changed:
            return [self._index.get(namespace_id, key) for key in block_keys]

    def find_pinned(self, namespace_id: bytes, block_keys: Sequence[bytes]) -> list[Entry]:
        """The entries of those blocks that are there, each pinned once."""
        with self._changed:
            found = [self._index.get(namespace_id, key) for key in block_keys]
            return self._pin(found)

    def lease_prefix(
        self,
        namespace_id: bytes,
        block_keys: Sequence[bytes],
        elsewhere: Sequence[bool],
        lease_s: float | None,
    ) -> tuple[list[bool], Lease | None]:
        """The longest prefix of blocks that are here or elsewhere.

        Args:
            namespace_id: Namespace of the blocks.
            block_keys: Keys from token 0 on.
            elsewhere: Whether another tier holds each block.
            lease_s: Life of the lease on it; None to take none.

        Returns:
            For each block of the prefix whether it is here, and the lease.
        """
        with self._changed:
            self._expire()
            entries: list[Entry | None] = []
            for key, there in zip(block_keys, elsewhere, strict=True):
                entry = self._index.get(namespace_id, key)
                if entry is None and not there:
                    break
                entries.append(entry)
            self._index.touch_prefix([entry for entry in entries if entry is not None])
            lease = None
            if entries and lease_s is not None:
                self._pin(entries)
                keys = list(block_keys[: len(entries)])
                end_s = time.monotonic() + lease_s
                lease = self._leases.grant(namespace_id, keys, list(entries), end_s)
            return [entry is not None for entry in entries], lease

    def release(self, lease_id: bytes) -> None:
        """Ends a lease, if it lives."""
        with self._changed:
            lease = self._leases.pop(lease_id)
            if lease is not None:
                self._unpin(lease.entries)

    def expire_leases(self) -> None:
        """Ends leases whose time is over."""
        with self._changed:
            self._expire()

    def pin_leased(
        self, namespace_id: bytes, lease_id: bytes, first_block: int, num_blocks: int
    ) -> tuple[list[bytes], list[Entry | None]]:
        """Keys and entries of leased blocks, the entries pinned; None for those not here.

        Raises:
            LeaseExpiredError: The lease ended, or does not cover the range.
        """
        with self._changed:
            self._expire()
            lease = self._leases.get(lease_id, time.monotonic())
            end = first_block + num_blocks
            if lease.namespace_id != namespace_id or end > len(lease.block_keys):
                raise LeaseExpiredError(
                    f"the lease covers {len(lease.block_keys)} blocks of namespace "
                    f"{lease.namespace_id.hex()}, not blocks {first_block} to {end} of "
                    f"{namespace_id.hex()}; look up again"
                )
            keys = lease.block_keys[first_block:end]
            entries = lease.entries[first_block:end]
            for i, entry in enumerate(entries):
                if entry is None:
                    # Another reader may have promoted it meanwhile.
                    entries[i] = self._index.get(namespace_id, keys[i])
            self._pin(entries)
            return keys, entries

    def hold_lease(self, namespace_id: bytes, lease_id: bytes) -> Lease:
        """Keeps a lease from expiring until `let_go_lease`.

        Raises:
            LeaseExpiredError: The lease ended, or is on another namespace.
        """
        with self._changed:
            self._expire()
            lease = self._leases.get(lease_id, time.monotonic())
            if lease.namespace_id != namespace_id:
                raise LeaseExpiredError(
                    f"the lease is on namespace {lease.namespace_id.hex()}, not on "
                    f"{namespace_id.hex()}; look up again"
                )
            lease.num_holds += 1
            return lease

    def let_go_lease(self, lease: Lease) -> None:
        """Ends a hold: the lease expires at its own time, at once if that is over."""
        with self._changed:
            lease.num_holds -= 1
            self._expire()

    def unpin(self, entries: Sequence[Entry | None]) -> None:
        """Takes one pin off each entry."""
        with self._changed:
            self._unpin(entries)

    def view(self, page: Page) -> torch.Tensor:
        """A page's bytes, uint8 [num_bytes], sharing memory with the pool."""
        return self._pool.view(page)

    def allocate(self, num_bytes: int) -> Page | None:
        """A page, or None when there is no room."""
        with self._changed:
            return self._pool.allocate(num_bytes)

    def allocate_free(self, num_bytes: int, most: int) -> list[Page]:
        """As many pages as there is room for, up to `most`."""
        pages: list[Page] = []
        with self._changed:
            while len(pages) < most and (page := self._pool.allocate(num_bytes)) is not None:
                pages.append(page)
        return pages

    def free(self, pages: Sequence[Page]) -> None:
        """Returns pages that never became visible."""
        with self._changed:
            for page in pages:
                self._pool.free(page)
            self._changed.notify_all()

    def publish(
        self, namespace_id: bytes, blocks: Sequence[tuple[bytes, Page]], *, in_redis: bool
    ) -> tuple[list[Entry], int]:
        """Makes blocks visible, all at once.

        A block that is visible already keeps its page, and the new one is freed.

        Args:
            namespace_id: Namespace of the blocks.
            blocks: Their keys and pages, in prefix order.
            in_redis: Whether Redis holds them.

        Returns:
            Their entries, each pinned once, and how many were new.
        """
        num_new = 0
        with self._changed:
            entries: list[Entry] = []
            for key, page in blocks:
                entry = self._index.get(namespace_id, key)
                if entry is None:
                    entry = Entry(namespace_id, key, page, in_redis)
                    self._index.add(entry)
                    num_new += 1
                else:
                    self._pool.free(page)
                entries.append(entry)
            self._pin(entries)
            self._index.touch_prefix(entries)
            return entries, num_new

    def choose_victims(self, num_bytes: int) -> list[Entry]:
        """Unpinned blocks worth `num_bytes`, least recently used first, now pinned once."""
        with self._changed:
            self._expire()
            victims: list[Entry] = []
            chosen_bytes = 0
            for entry in self._index:
                if chosen_bytes >= num_bytes:
                    break
                if entry.pins == 0:
                    victims.append(entry)
                    chosen_bytes += entry.page.extent_bytes
            self._pin(victims)
            self._num_victims += len(victims)
            return victims

    def drop_victims(self, victims: Sequence[Entry]) -> int:
        """Forgets victims that nobody pinned meanwhile; how many."""
        with self._changed:
            self._num_victims -= len(victims)
            dropped = [entry for entry in victims if entry.pins == 1 and not entry.removed]
            for entry in dropped:
                self._index.remove(entry)
            self._unpin(victims)
            return len(dropped)

    def wait_for_room(self, timeout_s: float) -> bool:
        """Waits while another thread evicts; False when none does, or at the timeout."""
        with self._changed:
            return self._num_victims > 0 and self._changed.wait(timeout_s)

    def remove(self, namespace_id: bytes, block_keys: Sequence[bytes]) -> list[bool]:
        """Makes blocks invisible; whether each was visible."""
        with self._changed:
            found = [self._index.get(namespace_id, key) for key in block_keys]
            for entry in found:
                if entry is not None and not entry.removed:
                    self._remove(entry)
            return [entry is not None for entry in found]

    def remove_all(self, namespace_id: bytes | None) -> int:
        """Makes all blocks, or those of one namespace, invisible; how many."""
        with self._changed:
            doomed = [e for e in self._index if namespace_id in (None, e.namespace_id)]
            for entry in doomed:
                self._remove(entry)
            return len(doomed)

    def pin_all(self) -> list[Entry]:
        """All entries, most recently used first, each pinned once."""
        with self._changed:
            entries = list(self._index)[::-1]
            self._pin(entries)
            return entries

    def set_limit(self, limit_bytes: int) -> None:
        """Sets the bytes in use above which `allocate` finds no room."""
        with self._changed:
            self._pool.limit_bytes = min(limit_bytes, self._pool.capacity_bytes)

    @property
    def pool_bytes(self) -> torch.Tensor:
        """All pages, uint8 [capacity_bytes], for kernels that read pinned ones by offset."""
        return self._pool.memory

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the pool."""
        return self._pool.capacity_bytes

    def over_limit_bytes(self) -> int:
        """Bytes in use beyond the limit, negative below it."""
        with self._changed:
            return self._pool.used_bytes - self._pool.limit_bytes

    def gauges(self) -> dict[str, int]:
        """Present values by name."""
        with self._changed:
            self._expire()
            return {
                "memory_blocks": len(self._index),
                "memory_used_bytes": self._pool.used_bytes,
                "memory_limit_bytes": self._pool.limit_bytes,
                "memory_capacity_bytes": self._pool.capacity_bytes,
                "leases": len(self._leases),
                "pinned_blocks": self._num_pinned,
            }

    def blocks_by_namespace(self) -> dict[bytes, int]:
        """Blocks by namespace id."""
        counts: dict[bytes, int] = {}
        with self._changed:
            for entry in self._index:
                counts[entry.namespace_id] = counts.get(entry.namespace_id, 0) + 1
        return counts

    def _expire(self) -> None:
        for lease in self._leases.pop_expired(time.monotonic()):
            self.leases_expired += 1
            self._unpin(lease.entries)

    def _pin(self, entries: Sequence[Entry | None]) -> list[Entry]:
        pinned = [entry for entry in entries if entry is not None]
        for entry in pinned:
            self._num_pinned += entry.pins == 0
            entry.pins += 1
        return pinned

    def _unpin(self, entries: Sequence[Entry | None]) -> None:
        for entry in entries:
            if entry is not None:
                entry.pins -= 1
                self._num_pinned -= entry.pins == 0
                if entry.removed and entry.pins == 0:
                    self._pool.free(entry.page)
        self._changed.notify_all()

    def _remove(self, entry: Entry) -> None:
        self._index.remove(entry)
        if entry.pins == 0:
            self._pool.free(entry.page)
            self._changed.notify_all()
