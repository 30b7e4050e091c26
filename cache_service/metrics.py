"""Names of all counters, and the counters."""

from __future__ import annotations

import threading

__all__ = ["COUNTERS", "Counters"]

COUNTERS = (
    "lookup_requests_total",
    "lookup_blocks_total",
    "lookup_hit_blocks_memory_total",
    "lookup_hit_blocks_redis_total",
    "store_requests_total",
    "store_failed_requests_total",
    "stored_blocks_total",
    "stored_present_blocks_total",
    "stored_raw_bytes_total",
    "received_payload_bytes_total",
    "retrieve_requests_total",
    "retrieve_failed_requests_total",
    "retrieved_blocks_total",
    "retrieve_missed_blocks_total",
    "sent_payload_bytes_total",
    "attend_streams_opened_total",
    "attend_requests_total",
    "attend_refused_requests_total",
    "attend_query_tokens_total",
    "attend_batches_total",
    "attend_queue_ns_total",
    "attend_kernel_ns_total",
    "evicted_blocks_total",
    "spilled_blocks_total",
    "spilled_bytes_total",
    "dropped_blocks_total",
    "promoted_blocks_total",
    "promoted_bytes_total",
    "redis_missing_records_total",
    "redis_refused_malformed_total",
    "redis_refused_version_total",
    "redis_refused_identity_total",
    "redis_refused_size_total",
    "redis_refused_checksum_total",
    "redis_failures_total",
    "leases_granted_total",
    "leases_expired_total",
    "deleted_blocks_total",
    "codec_encode_ns_total",
    "codec_decode_ns_total",
    "tier_redis_ns_total",
)


class Counters:
    """Monotonic counters, all present and zero from the start. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(COUNTERS, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Adds to a counter; the name must be one of `COUNTERS`."""
        with self._lock:
            self._values[name] += amount

    def add_all(self, **amounts: int) -> None:
        """Adds to several counters at once."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        """All counters."""
        with self._lock:
            return dict(self._values)
