"""Unary calls, without I/O: requests from arguments, results from responses."""

from __future__ import annotations

from collections.abc import Sequence

from polarcache.client._types import Match, Namespace, Tier
from polarcache.proto.errors import InternalError
from polarcache.proto.layout import NamespaceSpec
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["clear_request", "lookup_request", "match_of", "namespace_of"]

_TIERS: dict[int, Tier] = {pb.TIER_MEMORY: "memory", pb.TIER_REDIS: "redis"}
_TIER_NUMBERS: dict[Tier, pb.Tier] = {"memory": pb.TIER_MEMORY, "redis": pb.TIER_REDIS}


def namespace_of(spec: NamespaceSpec, response: pb.OpenNamespaceResponse) -> Namespace:
    """The handle that a response stands for.

    Raises:
        InternalError: Client and service disagree on the bytes of a slice.
    """
    if response.raw_slice_bytes != spec.layout.raw_slice_bytes:
        raise InternalError(
            f"the service counts {response.raw_slice_bytes} bytes a slice, this client "
            f"{spec.layout.raw_slice_bytes}"
        )
    return Namespace(
        namespace_id=response.namespace_id,
        spec=spec.with_profile(response.profile),
        packed_slice_bytes=response.packed_slice_bytes,
        key_bits=response.key_bits,
        value_bits=response.value_bits,
    )


def lookup_request(
    namespace: Namespace, block_keys: Sequence[bytes], lease_ms: int, *, lease: bool
) -> pb.LookupRequest:
    """Asks for the longest stored prefix."""
    return pb.LookupRequest(
        namespace_id=namespace.namespace_id,
        block_keys=block_keys,
        lease_ms=lease_ms,
        no_lease=not lease,
    )


def match_of(namespace: Namespace, response: pb.LookupResponse) -> Match:
    """The match that a response stands for."""
    return Match(
        namespace=namespace,
        tiers=tuple(_TIERS.get(tier, "redis") for tier in response.tiers),
        lease_id=response.lease_id,
        lease_ms=response.lease_ms,
        partial=response.partial,
    )


def clear_request(namespace: Namespace | None, tiers: Sequence[Tier]) -> pb.ClearRequest:
    """Asks to remove blocks; no tiers means all of them."""
    return pb.ClearRequest(
        namespace_id=namespace.namespace_id if namespace else b"",
        tiers=[_TIER_NUMBERS[tier] for tier in tiers],
    )
