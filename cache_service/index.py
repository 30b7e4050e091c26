"""Which blocks the memory tier holds, how recently each was used, and who pins it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from polarcache.cache_service.tiers.pool import Page

__all__ = ["BlockIndex", "Entry"]


@dataclass(slots=True, eq=False)
class Entry:
    """A visible block in the memory tier.

    Attributes:
        namespace_id: Namespace of the block.
        block_key: Key of the block.
        page: Where its packed bytes are.
        in_redis: True when Redis confirmed a copy at some time; it may have expired since.
        pins: Leases and readers that need the page. A pinned page is never freed.
        removed: True once the block left the index; its page is freed with its last pin.
    """

    namespace_id: bytes
    block_key: bytes
    page: Page
    in_redis: bool = False
    pins: int = 0
    removed: bool = field(default=False)


class BlockIndex:
    """Entries by (namespace, key) in order of use. Not thread-safe: the store's lock guards it."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[bytes, bytes], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Entries, least recently used first."""
        return iter(self._entries.values())

    def get(self, namespace_id: bytes, block_key: bytes) -> Entry | None:
        """The entry of a block, or None."""
        return self._entries.get((namespace_id, block_key))

    def add(self, entry: Entry) -> None:
        """Makes a block visible, as the most recently used."""
        self._entries[entry.namespace_id, entry.block_key] = entry

    def remove(self, entry: Entry) -> None:
        """Makes a block invisible."""
        del self._entries[entry.namespace_id, entry.block_key]
        entry.removed = True

    def touch_prefix(self, prefix: list[Entry]) -> None:
        """Marks a prefix as used, its last block least recently.

        A block is useless without those before it, so a prefix is evicted from its end.
        """
        for entry in reversed(prefix):
            if not entry.removed:
                self._entries.move_to_end((entry.namespace_id, entry.block_key))
