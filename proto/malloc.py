"""glibc's allocator, set up for large messages."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """Has malloc keep freed buffers of up to 32 MiB for reuse instead of unmapping them.

    gRPC allocates and frees every message. By default glibc maps each large one afresh, and the
    page faults of touching it take about as long as moving it. This holds for the whole process,
    which may keep some hundred megabytes more; the service calls it, a worker may.

    Returns:
        Whether the process runs on glibc and took the settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 512 << 20)
    )
