"""Leases: pins with an end."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from polarcache.cache_service.index import Entry
from polarcache.proto.errors import LeaseExpiredError

__all__ = ["Lease", "LeaseTable"]


@dataclass(slots=True)
class Lease:
    """A worker's hold on a prefix.

    Attributes:
        lease_id: 16 random bytes.
        namespace_id: Namespace of the prefix.
        block_keys: Keys of the prefix.
        entries: The entry of each block that was in memory and is pinned, None for the others.
        expires_at_s: End, on the monotonic clock, unless it is held.
        num_holds: Streams that keep it from expiring.
    """

    lease_id: bytes
    namespace_id: bytes
    block_keys: list[bytes]
    entries: list[Entry | None]
    expires_at_s: float
    num_holds: int = 0

    def has_expired(self, now_s: float) -> bool:
        """Whether its time is over and nobody holds it."""
        return self.expires_at_s <= now_s and not self.num_holds


class LeaseTable:
    """Live leases. Not thread-safe: the store's lock guards it."""

    def __init__(self) -> None:
        self._leases: dict[bytes, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        namespace_id: bytes,
        block_keys: list[bytes],
        entries: list[Entry | None],
        expires_at_s: float,
    ) -> Lease:
        """A new lease whose entries the caller has pinned."""
        lease = Lease(secrets.token_bytes(16), namespace_id, block_keys, entries, expires_at_s)
        self._leases[lease.lease_id] = lease
        return lease

    def get(self, lease_id: bytes, now_s: float) -> Lease:
        """A live lease.

        Raises:
            LeaseExpiredError: The lease ended or was never given.
        """
        lease = self._leases.get(lease_id)
        if lease is None or lease.has_expired(now_s):
            raise LeaseExpiredError(
                f"lease {lease_id.hex() or '(empty)'} ended or was never given; look up again"
            )
        return lease

    def pop(self, lease_id: bytes) -> Lease | None:
        """Ends a lease; the caller unpins its entries."""
        return self._leases.pop(lease_id, None)

    def pop_expired(self, now_s: float) -> list[Lease]:
        """Ends all leases whose time is over; the caller unpins their entries."""
        expired = [lease for lease in self._leases.values() if lease.has_expired(now_s)]
        for lease in expired:
            del self._leases[lease.lease_id]
        return expired
