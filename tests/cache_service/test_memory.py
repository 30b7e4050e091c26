import time

import pytest
import torch

from polarcache.cache_service.memory import MemoryTier
from polarcache.cache_service.tiers.pool import PAGE_ALIGNMENT_BYTES, PagePool
from polarcache.proto.errors import LeaseExpiredError

NS = bytes(16)
KEYS = [b"a", b"b", b"c", b"d"]
NOWHERE = [False] * 4


@pytest.fixture
def memory() -> MemoryTier:
    """Four blocks that fill the tier."""
    tier = MemoryTier(PagePool(4 * PAGE_ALIGNMENT_BYTES, torch.device("cpu")))
    add(tier, KEYS)
    return tier


def add(tier: MemoryTier, keys: list[bytes]) -> int:
    blocks = []
    for key in keys:
        page = tier.allocate(10)
        assert page is not None
        blocks.append((key, page))
    entries, num_new = tier.publish(NS, blocks, in_redis=False)
    tier.unpin(entries)
    return num_new


def test_a_prefix_ends_at_the_first_block_that_is_nowhere(memory: MemoryTier) -> None:
    memory.remove(NS, [b"c"])
    assert memory.lease_prefix(NS, KEYS, NOWHERE, None)[0] == [True, True]
    elsewhere = [False, False, True, False]
    assert memory.lease_prefix(NS, KEYS, elsewhere, None)[0] == [True, True, False, True]
    assert memory.lease_prefix(NS, [b"x"], [False], 1.0) == ([], None)


def test_only_free_pages_are_allocated_at_once(memory: MemoryTier) -> None:
    assert memory.allocate_free(10, 2) == []
    memory.remove(NS, [b"b", b"c", b"d"])
    assert len(memory.allocate_free(10, 2)) == 2
    memory.free(memory.allocate_free(PAGE_ALIGNMENT_BYTES, 9))
    assert memory.gauges()["memory_used_bytes"] == 3 * PAGE_ALIGNMENT_BYTES
    assert memory.gauges()["memory_blocks"] == 1


def test_a_prefix_is_evicted_from_its_end(memory: MemoryTier) -> None:
    victims = memory.choose_victims(2 * PAGE_ALIGNMENT_BYTES)
    assert [entry.block_key for entry in victims] == [b"d", b"c"]
    assert memory.drop_victims(victims) == 2
    assert memory.lease_prefix(NS, KEYS, NOWHERE, None)[0] == [True, True]
    assert memory.gauges()["memory_used_bytes"] == 2 * PAGE_ALIGNMENT_BYTES


def test_leased_blocks_are_no_victims(memory: MemoryTier) -> None:
    _, lease = memory.lease_prefix(NS, KEYS[:3], NOWHERE[:3], 60.0)
    assert lease is not None
    assert [e.block_key for e in memory.choose_victims(1 << 20)] == [b"d"]
    memory.release(lease.lease_id)
    assert len(memory.choose_victims(1 << 20)) == 3


def test_a_victim_that_is_leased_meanwhile_stays(memory: MemoryTier) -> None:
    victims = memory.choose_victims(1 << 20)
    memory.lease_prefix(NS, KEYS[:1], NOWHERE[:1], 60.0)
    assert memory.drop_victims(victims) == 3
    assert memory.find(NS, [b"a"])[0] is not None


def test_a_removed_block_s_page_lives_until_its_last_reader(memory: MemoryTier) -> None:
    _, lease = memory.lease_prefix(NS, KEYS, NOWHERE, 60.0)
    assert lease is not None
    _, entries = memory.pin_leased(NS, lease.lease_id, 0, 2)
    assert memory.remove(NS, KEYS) == [True] * 4
    memory.release(lease.lease_id)
    assert memory.gauges()["memory_used_bytes"] == 2 * PAGE_ALIGNMENT_BYTES
    memory.unpin(entries)
    assert memory.gauges()["memory_used_bytes"] == 0


def test_an_expired_lease_reads_nothing_and_pins_nothing(memory: MemoryTier) -> None:
    _, lease = memory.lease_prefix(NS, KEYS, NOWHERE, 0.01)
    assert lease is not None
    assert memory.gauges()["pinned_blocks"] == 4
    time.sleep(0.02)
    with pytest.raises(LeaseExpiredError):
        memory.pin_leased(NS, lease.lease_id, 0, 1)
    assert memory.gauges()["pinned_blocks"] == 0
    assert memory.leases_expired == 1


def test_a_lease_covers_its_namespace_and_range_alone(memory: MemoryTier) -> None:
    _, lease = memory.lease_prefix(NS, KEYS[:2], NOWHERE[:2], 60.0)
    assert lease is not None
    for namespace_id, first, count in ((NS, 0, 3), (NS, 2, 1), (b"x" * 16, 0, 1)):
        with pytest.raises(LeaseExpiredError, match="covers 2 blocks"):
            memory.pin_leased(namespace_id, lease.lease_id, first, count)
    with pytest.raises(LeaseExpiredError, match="never given"):
        memory.pin_leased(NS, b"", 0, 1)


def test_publishing_a_present_block_keeps_its_page(memory: MemoryTier) -> None:
    memory.remove(NS, [b"d"])
    before = memory.find(NS, [b"a"])[0]
    page = memory.allocate(10)
    assert page is not None
    entries, num_new = memory.publish(NS, [(b"a", page)], in_redis=False)
    memory.unpin(entries)
    assert num_new == 0
    assert memory.find(NS, [b"a"])[0] is before
    assert memory.gauges()["memory_used_bytes"] == 3 * PAGE_ALIGNMENT_BYTES


def test_remove_all_of_a_namespace(memory: MemoryTier) -> None:
    assert memory.remove_all(b"x" * 16) == 0
    assert memory.remove_all(NS) == 4
    assert memory.gauges()["memory_blocks"] == 0
