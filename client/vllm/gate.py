"""Whether loading is worth it: slow loads are worse than computing anew."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["LoadGate"]

_PROBE_S = 10.0
# Weight of the newest load in the mean rate.
_NEWEST = 0.5


class LoadGate:
    """Closes while loads bring fewer bytes a second than asked for.

    Closed, it lets one load through every ten seconds, to see whether things have improved.

    Args:
        min_bytes_per_s: Bytes of keys and values a second; 0 for a gate that never closes.
        clock: Seconds, for tests.
    """

    def __init__(self, min_bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._min_bytes_per_s = min_bytes_per_s
        self._clock = clock
        self._bytes_per_s: float | None = None
        self._probed_s = clock()

    def measured(self, num_bytes: int, seconds: float) -> None:
        """Takes note of a load."""
        if seconds <= 0:
            return
        rate = num_bytes / seconds
        if self._bytes_per_s is not None:
            rate = _NEWEST * rate + (1 - _NEWEST) * self._bytes_per_s
        self._bytes_per_s = rate
        self._probed_s = self._clock()

    def is_open(self) -> bool:
        """Whether loads are fast enough, or it is time to look again."""
        if self._bytes_per_s is None or self._bytes_per_s >= self._min_bytes_per_s:
            return True
        return self._clock() - self._probed_s >= _PROBE_S

    def passed(self) -> None:
        """Takes note of a load that was let through."""
        self._probed_s = self._clock()
