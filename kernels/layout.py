"""Where the bytes of a packed slice lie. The only module that knows sizes and offsets.

A slice is one layer of one block, keys then values. Each field starts at a multiple of 16 bytes;
bytes between fields are zero. Codes are a little-endian bit stream: 8 consecutive codes of b bits
make b bytes, flattened row-major in the field's stated shape. Everything else is little-endian.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, Self

from polarcache.kernels.errors import ShapeError
from polarcache.kernels.profile import Exact, Integer, KeyCodec, Pair, Profile, ValueCodec

LAYOUT_VERSION = 1
ALIGNMENT_BYTES = 16
RECURSIVE_CHANNELS = 16
RECURSIVE_BITS = (4, 2, 2, 2)
PAIR_PARAMETERS = ("radius_min", "radius_scale", "angle_zero", "angle_scale")


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


@dataclass(frozen=True, slots=True)
class Field:
    """One run of numbers in a packed slice.

    Attributes:
        name: side and content, such as `key_codes`.
        dtype: `code` (unsigned, bit-packed), `float16`, or `element` (the namespace dtype).
        shape: row-major shape of the numbers.
        bits: bits of one number.
        offset: first byte in the slice, a multiple of 16.
        num_bytes: bytes of the field without padding.
    """

    name: str
    dtype: Literal["code", "float16", "element"]
    shape: tuple[int, ...]
    bits: int
    offset: int
    num_bytes: int


_Spec = tuple[str, Literal["code", "float16", "element"], tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Fields of one packed slice in byte order.

    Attributes:
        fields: every field, keys first.
        slice_bytes: bytes of a packed slice, a multiple of 16.
        key_bits: stored bits per key element, parameters included, padding excluded.
        value_bits: the same per value element.
        bits: the same over keys and values together.
    """

    fields: tuple[Field, ...]
    slice_bytes: int
    key_bits: float
    value_bits: float
    bits: float

    @classmethod
    def of(cls, profile: Profile, shape: BlockShape, element_bytes: int) -> Self:
        """Lays out one slice.

        Args:
            profile: how keys and values are coded.
            shape: shape of one layer of one block.
            element_bytes: bytes of one element of the namespace dtype: 2 or 4.

        Raises:
            ShapeError: a group does not divide the block, or element_bytes is neither 2 nor 4.
        """
        if element_bytes not in (2, 4):
            raise ShapeError(f"element_bytes {element_bytes}: expected 2 or 4")
        fields: list[Field] = []
        num_bits = {"key": 0, "value": 0}
        end = 0
        for side, codec, head_dim in (
            ("key", profile.key, shape.head_dim),
            ("value", profile.value, shape.v_head_dim),
        ):
            for name, dtype, field_shape, bits in _specs(codec, shape, head_dim, element_bytes):
                field_bits = prod(field_shape) * bits
                offset = _aligned(end)
                end = offset + field_bits // 8
                num_bits[side] += field_bits
                fields.append(
                    Field(f"{side}_{name}", dtype, field_shape, bits, offset, end - offset)
                )
        rows = shape.tokens * shape.kv_heads
        return cls(
            fields=tuple(fields),
            slice_bytes=_aligned(end),
            key_bits=num_bits["key"] / (rows * shape.head_dim),
            value_bits=num_bits["value"] / (rows * shape.v_head_dim),
            bits=sum(num_bits.values()) / (rows * (shape.head_dim + shape.v_head_dim)),
        )

    def pads(self) -> Iterator[slice]:
        """Yields the byte ranges that no field covers; encoders write zeros there."""
        stops = [field.offset for field in self.fields[1:]] + [self.slice_bytes]
        for field, stop in zip(self.fields, stops, strict=True):
            start = field.offset + field.num_bytes
            if start < stop:
                yield slice(start, stop)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _specs(
    codec: KeyCodec | ValueCodec, shape: BlockShape, head_dim: int, element_bytes: int
) -> list[_Spec]:
    rows = (shape.tokens, shape.kv_heads)
    if isinstance(codec, Exact):
        return [("elements", "element", (*rows, head_dim), 8 * element_bytes)]
    if isinstance(codec, Pair):
        if shape.tokens % codec.group_tokens:
            raise ShapeError(
                f"pair group of {codec.group_tokens} tokens: expected a divisor of the block's "
                f"{shape.tokens} tokens (g32, g64, g128 or g256)"
            )
        groups = shape.tokens // codec.group_tokens
        parameters = (groups, len(PAIR_PARAMETERS), shape.kv_heads, shape.pairs)
        return [
            ("codes", "code", (*rows, shape.pairs), codec.bits),
            ("parameters", "float16", parameters, 16),
        ]
    if isinstance(codec, Integer):
        channels = codec.channels_per_group(head_dim)
        if head_dim % channels:
            raise ShapeError(
                f"value group of {channels} channels: expected a divisor of v_head_dim {head_dim}"
            )
        groups = head_dim // channels
        return [
            ("codes", "code", (*rows, head_dim), codec.bits),
            ("scales", "float16", (*rows, groups), 16),
            ("zeros", "float16", (*rows, groups), 16),
        ]
    specs: list[_Spec] = [
        (f"level{level}", "code", (*rows, head_dim >> level), bits)
        for level, bits in enumerate(RECURSIVE_BITS, start=1)
    ]
    specs.append(("radii", "float16", (*rows, head_dim // RECURSIVE_CHANNELS), 16))
    if codec.codebook == "kmeans":
        entries = sum(1 << bits for bits in RECURSIVE_BITS)
        specs.append(("codebook", "float16", (entries,), 16))
    return specs
