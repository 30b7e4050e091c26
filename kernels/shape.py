"""Shape of a block's layer, and which key channels form pairs."""

from dataclasses import dataclass
from typing import Literal

from polarcache.kernels.errors import ShapeError


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Shape of one layer of one block, and which key channels RoPE turns together.

    With `half` pairing, channel j turns with j + rotary_dim/2; with `interleaved`, 2j with 2j+1.
    Channels from rotary_dim on (all of them for rotary_dim 0: no RoPE) pair among themselves by
    the same rule.

    Attributes:
        tokens: tokens of a block; a multiple of 8 from 8 to 1024.
        kv_heads: KV heads, at least 1.
        head_dim: key channels of a head; a multiple of 16 from 16 to 256.
        v_head_dim: value channels of a head; same range.
        pairing: `half` or `interleaved`.
        rotary_dim: channels that RoPE turns; even, 0 to head_dim.

    Raises:
        ShapeError: a value outside these ranges.
    """

    tokens: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    pairing: Literal["half", "interleaved"]
    rotary_dim: int

    def __post_init__(self) -> None:
        """Checks every attribute."""
        if self.tokens % 8 or not 8 <= self.tokens <= 1024:
            raise ShapeError(f"tokens {self.tokens}: expected a multiple of 8 from 8 to 1024")
        if self.kv_heads < 1:
            raise ShapeError(f"kv_heads {self.kv_heads}: expected at least 1")
        for name, channels in (("head_dim", self.head_dim), ("v_head_dim", self.v_head_dim)):
            if channels % 16 or not 16 <= channels <= 256:
                raise ShapeError(f"{name} {channels}: expected a multiple of 16 from 16 to 256")
        if self.pairing not in ("half", "interleaved"):
            raise ShapeError(f"pairing {self.pairing!r}: expected half or interleaved")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ShapeError(
                f"rotary_dim {self.rotary_dim}: expected an even number from 0 to {self.head_dim}"
            )

    @property
    def pairs(self) -> int:
        """Channel pairs of a key head."""
        return self.head_dim // 2

    def pair_channels(self) -> tuple[tuple[slice, slice, slice], ...]:
        """Returns (pairs, first channels, second channels) slices that cover the head once."""
        if self.pairing == "interleaved":
            return ((slice(0, self.pairs), slice(0, None, 2), slice(1, None, 2)),)
        spans = ((0, self.rotary_dim), (self.rotary_dim, self.head_dim))
        return tuple(
            (
                slice(start // 2, stop // 2),
                slice(start, (start + stop) // 2),
                slice((start + stop) // 2, stop),
            )
            for start, stop in spans
            if stop > start
        )
