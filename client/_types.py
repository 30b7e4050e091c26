"""What the clients take and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polarcache.proto.frames import Buffer
from polarcache.proto.layout import NamespaceSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "LayerTensors",
    "Match",
    "Namespace",
    "PackWhere",
    "Retrieved",
    "RetrievedPacked",
    "StoreResult",
    "Tier",
]

Tier = Literal["memory", "redis"]
PackWhere = Literal["service", "worker"]
LayerTensors = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Namespace:
    """An open namespace.

    Attributes:
        namespace_id: 16 bytes, equal for equal namespaces on every service.
        spec: Its definition, with the profile in canonical spelling.
        packed_slice_bytes: Bytes of one layer of one block in packed form.
        key_bits: Bits per key element in packed form, all parameters counted.
        value_bits: Bits per value element in packed form, all parameters counted.
    """

    namespace_id: bytes
    spec: NamespaceSpec
    packed_slice_bytes: int
    key_bits: float
    value_bits: float

    @property
    def raw_block_bytes(self) -> int:
        """Bytes of one block in the namespace's dtype."""
        return self.spec.layout.raw_block_bytes

    @property
    def packed_block_bytes(self) -> int:
        """Bytes of one block in packed form."""
        return self.packed_slice_bytes * self.spec.layout.num_layers

    @property
    def bits(self) -> float:
        """Bits per element in packed form, keys and values together."""
        layout = self.spec.layout
        total = self.key_bits * layout.head_dim + self.value_bits * layout.v_head_dim
        return total / (layout.head_dim + layout.v_head_dim)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest stored prefix of a lookup.

    Attributes:
        namespace: Namespace of the lookup.
        tiers: Where each block of the prefix is.
        lease_id: Lease on the prefix; empty when nothing was found or none was wanted.
        lease_ms: Life of the lease, milliseconds.
        partial: True when Redis did not answer, so that blocks there were not counted.
    """

    namespace: Namespace
    tiers: tuple[Tier, ...]
    lease_id: bytes
    lease_ms: int
    partial: bool

    @property
    def num_blocks(self) -> int:
        """Blocks found."""
        return len(self.tiers)

    @property
    def num_tokens(self) -> int:
        """Tokens found."""
        return len(self.tiers) * self.namespace.spec.layout.block_tokens


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What came of a store.

    Attributes:
        num_stored: Blocks made visible.
        num_present: Blocks that were there already, whose payload did not travel.
        sent_bytes: Payload bytes that travelled.
    """

    num_stored: int
    num_present: int
    sent_bytes: int

    def __add__(self, other: StoreResult) -> StoreResult:
        """What came of two stores together."""
        return StoreResult(
            self.num_stored + other.num_stored,
            self.num_present + other.num_present,
            self.sent_bytes + other.sent_bytes,
        )


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Retrieved keys and values.

    Attributes:
        layers: For each layer K [num_tokens, Hkv, D] and V [num_tokens, Hkv, Dv], in the
            namespace's dtype, on the CPU.
        num_blocks: Leading blocks of the asked range that came.
        num_tokens: Tokens that came.
        miss_reason: Why the next block did not come; "" when all did.
    """

    layers: list[LayerTensors]
    num_blocks: int
    num_tokens: int
    miss_reason: str


@dataclass(frozen=True, slots=True)
class RetrievedPacked:
    """Retrieved blocks in packed form.

    Attributes:
        blocks: One buffer of `Namespace.packed_block_bytes` bytes a block.
        miss_reason: Why the next block did not come; "" when all did.
    """

    blocks: Sequence[Buffer]
    miss_reason: str
