"""Which sides of a profile the Triton kernels code, and all their launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from polarcache.kernels.gpu.fused import FusedPlan
from polarcache.kernels.gpu.side_plan import SidePlan
from polarcache.kernels.layout import BlockShape, PackedLayout
from polarcache.kernels.profile import Profile

# What an A100 has, and GPUs of data centres since.
SIDE_SHARED_BYTES = 160 * 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """Kernels for one profile and shape.

    Attributes:
        fused: launch of pair keys, integer values or both; None for neither.
        singles: launches of sides that are coded one at a time.
    """

    fused: FusedPlan | None
    singles: Sequence[SidePlan]

    @classmethod
    def of(
        cls,
        profile: Profile,
        shape: BlockShape,
        layout: PackedLayout,
        shared_bytes: int = SIDE_SHARED_BYTES,
    ) -> Self | None:
        """Returns the plan, or None where no side has a kernel.

        Exact sides are copied beside the kernels. What is left (fitted codebooks, blocks that do
        not fill units, head sizes that a kernel does not hold) is plain torch.

        Args:
            profile: how keys and values are coded.
            shape: shape of one layer of one block.
            layout: where the bytes of a packed slice lie.
            shared_bytes: shared memory that a program can have; the kernels of one side each
                were made for SIDE_SHARED_BYTES.
        """
        fused = FusedPlan.of(profile, shape, layout)
        both = (SidePlan.of(profile, shape, layout, side) for side in ("key", "value"))
        singles = tuple(plan for plan in both if plan is not None)
        if shared_bytes < SIDE_SHARED_BYTES:
            singles = ()
        return cls(fused, singles) if fused is not None or singles else None

    @property
    def sides(self) -> tuple[str, ...]:
        """Sides that kernels code: `key`, `value` or both."""
        fused = () if self.fused is None else self.fused.sides
        return (*fused, *(plan.side for plan in self.singles))

    def encode(
        self,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None,
        out: Tensor,
        flags: Tensor,
        query: Tensor | None = None,
    ) -> None:
        """Launches the encoders, without waiting for them.

        Args:
            keys: [N, T, Hkv, D], or [rows, Hkv, D] with slots; last dim contiguous.
            values: likewise.
            slots: int64 [N, T] contiguous, the row of every token, or None.
            out: uint8 [N, slice_bytes], rows at multiples of 16 bytes.
            flags: int32 [2, N] contiguous; set to 1 where keys or values of a slice are refused.
            query: fp32 [N, Hkv, P] contiguous, energies of queries, or None.
        """
        if self.fused is not None:
            self.fused.encode(keys, values, slots, out, flags)
        for plan in self.singles:
            x, flag = (keys, flags[0]) if plan.side == "key" else (values, flags[1])
            plan.encode(x, slots, query, out, flag)

    def decode(self, packed: Tensor, slots: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Launches the decoders, without waiting for them; arguments as `encode`."""
        if self.fused is not None:
            self.fused.decode(packed, slots, keys, values)
        for plan in self.singles:
            plan.decode(packed, slots, keys if plan.side == "key" else values)
