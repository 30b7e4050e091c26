"""Which blocks the store was given of late, so that they are not copied out of the cache again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

__all__ = ["RecentKeys"]


class RecentKeys:
    """Block keys that the store has been given or has found, for a while.

    The store may evict a block that this engine still has in its own cache. So a key is forgotten
    after `ttl_s`, and the block offered again.

    Args:
        ttl_s: Life of a key, seconds.
        max_keys: Most keys to remember.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        ttl_s: float = 60.0,
        max_keys: int = 1 << 18,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s = ttl_s
        self._max_keys = max_keys
        self._clock = clock
        self._since_s: OrderedDict[bytes, float] = OrderedDict()

    def add(self, keys: Iterable[bytes]) -> None:
        """Remembers keys from now on; those it has keep their age."""
        now_s = self._clock()
        for key in keys:
            if key not in self:
                self._since_s[key] = now_s
                self._since_s.move_to_end(key)
        while len(self._since_s) > self._max_keys:
            self._since_s.popitem(last=False)

    def __contains__(self, key: bytes) -> bool:
        since_s = self._since_s.get(key)
        return since_s is not None and self._clock() - since_s < self._ttl_s

    def clear(self) -> None:
        """Forgets all: the store may have."""
        self._since_s.clear()
