"""The block store: the memory tier over the Redis tier.

The only owner of tier order. All methods are thread-safe; they may block on Redis, never longer
than its timeout a command. Redis traffic runs on pinned pages, outside the memory tier's lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from polarcache.cache_service.index import Entry
from polarcache.cache_service.leases import Lease
from polarcache.cache_service.memory import MemoryTier
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import Namespace
from polarcache.cache_service.tiers.pool import Page
from polarcache.cache_service.tiers.record import RecordError, pack_record, unpack_record
from polarcache.cache_service.tiers.redis import RedisTier
from polarcache.kernels.layout import LAYOUT_VERSION
from polarcache.proto.errors import CapacityError, TierUnavailableError
from polarcache.proto.tensors import bytes_tensor, tensor_bytes

__all__ = ["BlockStore", "Found", "Pinned"]

# One round of eviction or promotion moves about this much, so that Redis sees pipelines.
_BATCH_BYTES = 16 << 20
_ROOM_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """The longest stored prefix of a lookup.

    Attributes:
        in_memory: For each block of the prefix, whether memory holds it; else Redis does.
        lease: Lease on it, None when nothing was found or none was wanted.
        partial: True when Redis did not answer.
    """

    in_memory: list[bool]
    lease: Lease | None
    partial: bool


@dataclass(frozen=True, slots=True)
class Pinned:
    """Blocks held in memory for a reader, until `BlockStore.unpin`.

    Attributes:
        entries: The leading blocks of the asked range that are there.
        miss_reason: Why the next one is not; "" when all are.
    """

    entries: list[Entry]
    miss_reason: str


class BlockStore:
    """Packed blocks by namespace and key.

    Args:
        memory: The memory tier.
        redis: The Redis tier, or None.
        counters: Where to count.
    """

    def __init__(self, memory: MemoryTier, redis: RedisTier | None, counters: Counters) -> None:
        self.memory = memory
        self._redis = redis
        self._counters = counters

    def lookup(
        self, namespace: Namespace, block_keys: Sequence[bytes], lease_s: float | None
    ) -> Found:
        """The longest stored prefix, leased for `lease_s` seconds unless that is None."""
        namespace_id = namespace.namespace_id
        in_redis = [False] * len(block_keys)
        partial = False
        found = self.memory.find(namespace_id, block_keys)
        asked = [i for i, entry in enumerate(found) if entry is None]
        if asked and self._redis is not None:
            try:
                with self._redis_time() as redis:
                    there = redis.exists([(namespace_id, block_keys[i]) for i in asked])
                for i, is_there in zip(asked, there, strict=True):
                    in_redis[i] = is_there
            except TierUnavailableError:
                partial = True
        in_memory, lease = self.memory.lease_prefix(namespace_id, block_keys, in_redis, lease_s)
        self._counters.add("lookup_requests_total")
        self._counters.add("lookup_blocks_total", len(block_keys))
        self._counters.add("lookup_hit_blocks_memory_total", sum(in_memory))
        self._counters.add("lookup_hit_blocks_redis_total", len(in_memory) - sum(in_memory))
        self._counters.add("leases_granted_total", lease is not None)
        return Found(in_memory, lease, partial)

    def pin_for_read(
        self, namespace: Namespace, lease_id: bytes, first_block: int, num_blocks: int
    ) -> Pinned:
        """Holds leased blocks in memory, those only in Redis promoted, until `unpin`.

        Raises:
            LeaseExpiredError: The lease ended, or does not cover the range.
        """
        keys, entries = self.memory.pin_leased(
            namespace.namespace_id, lease_id, first_block, num_blocks
        )
        try:
            reason = self._promote(namespace, keys, entries)
        except BaseException:
            self.memory.unpin(entries)
            raise
        num_whole = next((i for i, entry in enumerate(entries) if entry is None), num_blocks)
        self.memory.unpin(entries[num_whole:])
        self._counters.add("retrieve_missed_blocks_total", num_blocks - num_whole)
        return Pinned([entry for entry in entries[:num_whole] if entry is not None], reason)

    def unpin(self, pinned: Pinned) -> None:
        """Lets go of what `pin_for_read` holds."""
        self.memory.unpin(pinned.entries)

    def absent(self, namespace: Namespace, block_keys: Sequence[bytes]) -> list[int]:
        """Indices of the blocks that no tier holds, ascending; the others count as used."""
        elsewhere = [True] * len(block_keys)
        held, _ = self.memory.lease_prefix(namespace.namespace_id, block_keys, elsewhere, None)
        absent = [i for i, is_held in enumerate(held) if not is_held]
        if absent and self._redis is not None:
            try:
                with self._redis_time() as redis:
                    alive = redis.touch([(namespace.namespace_id, block_keys[i]) for i in absent])
            except TierUnavailableError:
                return absent
            absent = [i for i, is_alive in zip(absent, alive, strict=True) if not is_alive]
        return absent

    def allocate(self, num_bytes: int) -> Page:
        """A page, after evicting what was not used for longest.

        Raises:
            CapacityError: All that could be evicted is pinned, or the block exceeds the tier.
        """
        deadline_s = time.monotonic() + _ROOM_TIMEOUT_S
        while True:
            page = self.memory.allocate(num_bytes)
            if page is not None:
                return page
            victims = self.memory.choose_victims(max(num_bytes, _BATCH_BYTES))
            if victims:
                self._evict(victims)
            elif not self.memory.wait_for_room(deadline_s - time.monotonic()):
                gauges = self.memory.gauges()
                raise CapacityError(
                    f"no room for a block of {num_bytes} bytes: {gauges['memory_used_bytes']} of "
                    f"{gauges['memory_limit_bytes']} bytes are in use, leased or being written"
                )

    def publish(
        self, namespace: Namespace, blocks: Sequence[tuple[bytes, Page]], *, durable: bool
    ) -> int:
        """Makes whole blocks visible, all at once; how many were new.

        Raises:
            TierUnavailableError: `durable` and Redis did not confirm; the blocks are in memory.
        """
        entries, num_new = self.memory.publish(namespace.namespace_id, blocks, in_redis=False)
        self._counters.add("stored_blocks_total", num_new)
        try:
            if durable:
                self._write_to_redis(entries)
        finally:
            self.memory.unpin(entries)
        return num_new

    def persist(self, namespace: Namespace, block_keys: Sequence[bytes]) -> None:
        """Has Redis confirm those of the blocks that memory holds.

        Raises:
            TierUnavailableError: Redis did not confirm.
        """
        entries = self.memory.find_pinned(namespace.namespace_id, block_keys)
        try:
            self._write_to_redis(entries)
        finally:
            self.memory.unpin(entries)

    def delete(self, namespace: Namespace, block_keys: Sequence[bytes]) -> int:
        """Removes blocks from every tier; how many were in one.

        Raises:
            TierUnavailableError: Redis does not answer; memory has forgotten them already.
        """
        removed = self.memory.remove(namespace.namespace_id, block_keys)
        if self._redis is not None:
            with self._redis_time() as redis:
                there = redis.delete([(namespace.namespace_id, key) for key in block_keys])
            removed = [a or b for a, b in zip(removed, there, strict=True)]
        self._counters.add("deleted_blocks_total", sum(removed))
        return sum(removed)

    def clear(self, namespace_id: bytes | None, *, memory: bool, redis: bool) -> tuple[int, int]:
        """Removes all blocks, or one namespace's; blocks from memory and records from Redis."""
        num_blocks = self.memory.remove_all(namespace_id) if memory else 0
        num_records = 0
        if redis and self._redis is not None:
            with self._redis_time() as tier:
                num_records = tier.clear(namespace_id)
        self._counters.add("deleted_blocks_total", num_blocks)
        return num_blocks, num_records

    def set_limit(self, limit_bytes: int) -> None:
        """Sets the bytes that memory may use and spills what is over and not pinned."""
        self.memory.set_limit(limit_bytes)
        while (over := self.memory.over_limit_bytes()) > 0:
            victims = self.memory.choose_victims(min(over, _BATCH_BYTES))
            if not victims:
                return
            self._evict(victims)

    def spill_all(self, timeout_s: float) -> int:
        """Copies memory to Redis, most recently used first; blocks left uncopied at the timeout."""
        end_s = time.monotonic() + timeout_s
        entries = self.memory.pin_all()
        left = len(entries)
        try:
            for batch in _batches(entries):
                if self._redis is None or time.monotonic() > end_s:
                    break
                self._write_to_redis(batch)
                left -= len(batch)
        except TierUnavailableError:
            pass  # The count tells the caller.
        finally:
            self.memory.unpin(entries)
        return left

    def _evict(self, victims: list[Entry]) -> None:
        spilled = False
        try:
            if self._redis is not None:
                self._write_to_redis(victims)
                spilled = True
        except TierUnavailableError:
            pass  # Losing an entry is allowed; it is counted as dropped.
        finally:
            num_dropped = self.memory.drop_victims(victims)
        self._counters.add("evicted_blocks_total", num_dropped)
        self._counters.add("dropped_blocks_total", 0 if spilled else num_dropped)

    def _write_to_redis(self, entries: Sequence[Entry]) -> None:
        """Has Redis hold the blocks; pays for the payload only where Redis lacks it."""
        if self._redis is None:
            raise TierUnavailableError("the service runs without Redis")
        for batch in _batches(entries):
            names = [(entry.namespace_id, entry.block_key) for entry in batch]
            with self._redis_time() as redis:
                copied = [i for i, entry in enumerate(batch) if entry.in_redis]
                alive = redis.touch([names[i] for i in copied])
                for i, is_alive in zip(copied, alive, strict=True):
                    batch[i].in_redis = is_alive
                fresh = [i for i, entry in enumerate(batch) if not entry.in_redis]
                redis.put([(names[i], self._record(batch[i])) for i in fresh])
            for i in fresh:
                batch[i].in_redis = True
            self._counters.add("spilled_blocks_total", len(fresh))
            self._counters.add("spilled_bytes_total", sum(batch[i].page.num_bytes for i in fresh))

    def _record(self, entry: Entry) -> bytes:
        packed = tensor_bytes(self.memory.view(entry.page).cpu())
        return pack_record(entry.namespace_id, entry.block_key, LAYOUT_VERSION, packed)

    def _promote(
        self, namespace: Namespace, keys: Sequence[bytes], entries: list[Entry | None]
    ) -> str:
        """Fills the missing entries from Redis, up to the first that is lost; why it is."""
        missing = [i for i, entry in enumerate(entries) if entry is None]
        per_batch = max(1, _BATCH_BYTES // namespace.codec.packed_block_bytes)
        for start in range(0, len(missing), per_batch):
            batch = missing[start : start + per_batch]
            if self._redis is None:
                return "evicted"
            try:
                with self._redis_time() as redis:
                    records = redis.get([(namespace.namespace_id, keys[i]) for i in batch])
            except TierUnavailableError as error:
                return f"redis unavailable: {error}"
            for i, record in zip(batch, records, strict=True):
                if record is None:
                    self._counters.add("redis_missing_records_total")
                    return "gone from redis"
                try:
                    entries[i] = self._admit(namespace, keys[i], record)
                except RecordError as error:
                    self._discard(namespace, keys[i], error)
                    return str(error)
                except CapacityError as error:
                    return str(error)
        return ""

    def _admit(self, namespace: Namespace, key: bytes, record: bytes) -> Entry:
        num_bytes = namespace.codec.packed_block_bytes
        packed = unpack_record(record, namespace.namespace_id, key, LAYOUT_VERSION, num_bytes)
        page = self.allocate(num_bytes)
        self.memory.view(page).copy_(bytes_tensor(packed))
        if self.memory.view(page).is_cuda:
            torch.cuda.current_stream().synchronize()
        blocks = [(key, page)]
        (entry,), _ = self.memory.publish(namespace.namespace_id, blocks, in_redis=True)
        self._counters.add("promoted_blocks_total")
        self._counters.add("promoted_bytes_total", num_bytes)
        return entry

    def _discard(self, namespace: Namespace, key: bytes, error: RecordError) -> None:
        self._counters.add(f"redis_refused_{error.reason}_total")
        try:
            with self._redis_time() as redis:
                redis.delete([(namespace.namespace_id, key)])
        except TierUnavailableError:
            pass  # It will be refused again, and removed then.

    @contextmanager
    def _redis_time(self) -> Iterator[RedisTier]:
        if self._redis is None:
            raise TierUnavailableError("the service runs without Redis")
        start_ns = time.monotonic_ns()
        try:
            yield self._redis
        except TierUnavailableError:
            self._counters.add("redis_failures_total")
            raise
        finally:
            self._counters.add("tier_redis_ns_total", time.monotonic_ns() - start_ns)


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    batch_bytes = 0
    for entry in entries:
        batch.append(entry)
        batch_bytes += entry.page.num_bytes
        if batch_bytes >= _BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch
