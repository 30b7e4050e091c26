"""Where the bytes of a packed slice lie. The only module that knows sizes, offsets and orders.

A slice is one layer of one block, keys then values. Each field starts at a multiple of 16 bytes;
bytes between fields are zero. Numbers are little-endian and stand in the field's `Order`: head by
head, and inside a head in the order in which the tensor cores take a tile of 16 tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from typing import Literal, Self

from polarcache.kernels.errors import ShapeError
from polarcache.kernels.profile import (
    ArcPair,
    Exact,
    Integer,
    KeyCodec,
    Pair,
    Polar,
    Profile,
    Recursive,
    ValueCodec,
)
from polarcache.kernels.shape import BlockShape

__all__ = [
    "ALIGNMENT_BYTES",
    "INTEGER_PARAMETERS",
    "LANES",
    "LAYOUT_VERSION",
    "PAIR_PARAMETERS",
    "RECURSIVE_BITS",
    "RECURSIVE_CHANNELS",
    "TILE_TOKENS",
    "WORD_BYTES",
    "BlockShape",
    "Field",
    "Order",
    "PackedLayout",
    "key_pair_order",
    "value_order",
    "value_pair_order",
]

LAYOUT_VERSION = 5
ALIGNMENT_BYTES = 16
# Tokens of a tile, and threads of a warp: rows and lanes of the tensor cores' m16n8k16 product.
TILE_TOKENS = 16
LANES = 32
WORD_BYTES = 4
RECURSIVE_CHANNELS = 16
RECURSIVE_BITS = (4, 2, 2, 2)
PAIR_PARAMETERS = ("radius_min", "radius_scale", "angle_zero", "angle_scale")
INTEGER_PARAMETERS = ("scale", "zero")


@dataclass(frozen=True, slots=True)
class Order:
    """Order in which a field's numbers are stored.

    The numbers are split into the axes of `split` and permuted by `axes`: the stored order. With
    `streams` 1 they then follow each other densely, b bits each. Otherwise the last stored axes
    are [LANES, streams, codes]; each lane owns whole 32-bit words, a word is cut into `streams`
    equal parts, and part i of a lane's words is a dense stream of its i-th row of codes.

    Attributes:
        split: sizes of the axes that the field's shape is split into, row-major.
        axes: permutation of these axes, stored order.
        streams: 1, 2 or 4 streams a word.
        stream_codes: codes of a stream, a multiple of 8; 0 for `streams` 1.
    """

    split: tuple[int, ...]
    axes: tuple[int, ...]
    streams: int = 1
    stream_codes: int = 0


@dataclass(frozen=True, slots=True)
class Field:
    """One run of numbers in a packed slice.

    Attributes:
        name: side and content, such as `key_codes`.
        dtype: `code` (unsigned, bit-packed), `float16`, or `element` (the namespace dtype).
        shape: shape of the numbers as the codecs take and give them, row-major.
        bits: bits of one number.
        offset: first byte in the slice, a multiple of 16.
        num_bytes: bytes of the field without padding.
        order: how the numbers are stored.
    """

    name: str
    dtype: Literal["code", "float16", "element"]
    shape: tuple[int, ...]
    bits: int
    offset: int
    num_bytes: int
    order: Order


_Spec = tuple[str, Literal["code", "float16", "element"], tuple[int, ...], int, Order]


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
            for name, dtype, field_shape, bits, order in _specs(
                codec, shape, head_dim, element_bytes, side
            ):
                field_bits = prod(field_shape) * bits
                offset = _aligned(end)
                end = offset + field_bits // 8
                num_bits[side] += field_bits
                fields.append(
                    Field(f"{side}_{name}", dtype, field_shape, bits, offset, end - offset, order)
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
    codec: KeyCodec | ValueCodec, shape: BlockShape, head_dim: int, element_bytes: int, side: str
) -> list[_Spec]:
    tokens, heads = shape.tokens, shape.kv_heads
    if isinstance(codec, Exact):
        size = (tokens, heads, head_dim)
        return [("elements", "element", size, 8 * element_bytes, Order(size, (0, 1, 2)))]
    if isinstance(codec, Pair):
        return _pair_specs(codec, shape)
    if isinstance(codec, Integer):
        return _integer_specs(codec, tokens, heads, head_dim)
    if isinstance(codec, ArcPair):
        return _arc_specs(codec, shape)
    if isinstance(codec, Polar):
        return _polar_specs(codec, shape, head_dim, side)
    return _recursive_specs(codec, tokens, heads, head_dim, side)


def _recursive_specs(
    codec: Recursive, tokens: int, heads: int, head_dim: int, side: str
) -> list[_Spec]:
    specs: list[_Spec] = []
    blocks = head_dim // RECURSIVE_CHANNELS
    levels = codec.level_bits(head_dim)
    for level, bits in enumerate(levels, start=1):
        if level > len(RECURSIVE_BITS):
            specs.append(_rows_spec(f"level{level}", tokens, heads, head_dim >> level, bits))
            continue
        order = _tree_order(side, tokens, heads, RECURSIVE_CHANNELS >> level, blocks)
        specs.append((f"level{level}", "code", (tokens, heads, head_dim >> level), bits, order))
    if codec.form == "deep":
        centre = _centre_specs(heads, head_dim, 1) if side == "key" else []
        return [*centre, *specs, _rows_spec("radii", tokens, heads, head_dim >> len(levels), 8)]
    order = _tree_order(side, tokens, heads, 1, blocks)
    if codec.form == "log8":
        specs.append(("radii", "code", (tokens, heads, blocks), 8, order))
    else:
        specs.append(("radii", "float16", (tokens, heads, blocks), 16, order))
    if codec.codebook == "kmeans":
        entries = sum(1 << bits for bits in RECURSIVE_BITS)
        specs.append(("codebook", "float16", (entries,), 16, Order((entries,), (0,))))
    return specs


def _pair_specs(codec: Pair, shape: BlockShape) -> list[_Spec]:
    if shape.tokens % codec.group_tokens:
        raise _group_error(codec.group_tokens, shape.tokens)
    groups, heads, pairs = shape.tokens // codec.group_tokens, shape.kv_heads, shape.pairs
    kinds = len(PAIR_PARAMETERS)
    # A lane's pairs lie 8 apart, so each of the 8 runs of a kind is what one lane column reads.
    order = Order((groups, kinds, heads, pairs // 8, 8), (2, 0, 1, 4, 3))
    codes = (shape.tokens, heads, pairs)
    return [
        ("codes", "code", codes, codec.bits, key_pair_order(*codes)),
        ("parameters", "float16", (groups, kinds, heads, pairs), 16, order),
    ]


def _arc_specs(codec: ArcPair, shape: BlockShape) -> list[_Spec]:
    tokens, heads, pairs = shape.tokens, shape.kv_heads, shape.pairs
    if tokens % codec.group_tokens:
        raise _group_error(codec.group_tokens, tokens)
    specs: list[_Spec] = []
    if codec.tiers:
        specs.append(("order", "code", (heads, pairs), 8, Order((heads, pairs), (0, 1))))
        for index, (count, radius_bits, angle_bits) in enumerate(codec.classes(pairs)):
            specs.append(_rows_spec(f"radius{index}", tokens, heads, count, radius_bits))
            specs.append(_rows_spec(f"angle{index}", tokens, heads, count, angle_bits))
    else:
        codes = (tokens, heads, pairs)
        bits = codec.radius_bits + codec.angle_bits
        specs.append(("codes", "code", codes, bits, key_pair_order(*codes)))
    size = (tokens // codec.group_tokens, 2, heads, pairs)
    order = Order(size, (2, 0, 1, 3))
    return [*specs, ("arcs", "code", size, 8, order), ("radii", "float16", size, 16, order)]


def _polar_specs(codec: Polar, shape: BlockShape, head_dim: int, side: str) -> list[_Spec]:
    tokens, heads = shape.tokens, shape.kv_heads
    rows, by_head = (tokens, heads), Order((tokens, heads), (1, 0))
    size = (tokens, heads, head_dim // 2)
    if side == "value":
        return [
            ("codes", "code", size, codec.bits, value_pair_order(*size)),
            ("gains", "float16", rows, 16, by_head),
        ]
    pairs = (heads, shape.pairs)
    return [
        *_centre_specs(heads, head_dim, 2),
        ("balance", "code", pairs, 8, Order(pairs, (0, 1))),
        ("codes", "code", size, codec.bits, key_pair_order(*size)),
        ("gains", "code", rows, 8, by_head),
    ]


def _centre_specs(heads: int, head_dim: int, scales: int) -> list[_Spec]:
    """Means of channels, and what scales them: the largest mean and, of 2, the largest gain."""
    means, steps = (heads, head_dim), (heads, scales)
    return [
        ("means", "code", means, 8, Order(means, (0, 1))),
        ("scales", "float16", steps, 16, Order(steps, (0, 1))),
    ]


def _rows_spec(name: str, tokens: int, heads: int, codes: int, bits: int) -> _Spec:
    """Returns a field of codes that lie head by head, token by token."""
    size = (tokens, heads, codes)
    return (name, "code", size, bits, Order(size, (1, 0, 2)))


def _group_error(group_tokens: int, tokens: int) -> ShapeError:
    return ShapeError(
        f"pair group of {group_tokens} tokens: expected a divisor of the block's {tokens} tokens "
        "(g32, g64, g128 or g256)"
    )


def _integer_specs(codec: Integer, tokens: int, heads: int, head_dim: int) -> list[_Spec]:
    channels = codec.channels_per_group(head_dim)
    if head_dim % channels:
        raise ShapeError(
            f"value group of {channels} channels: expected a divisor of v_head_dim {head_dim}"
        )
    groups = head_dim // channels
    kinds = len(INTEGER_PARAMETERS)
    order = Order((kinds, tokens, heads, groups), (2, 1, 3, 0))
    if tokens % TILE_TOKENS == 0:
        # kind, tile, token + 8, lane column, token + 1, head, group
        split = (kinds, tokens // TILE_TOKENS, 2, 4, 2, heads, groups)
        order = Order(split, (5, 1, 6, 3, 0, 2, 4))
    codes = (tokens, heads, head_dim)
    return [
        ("codes", "code", codes, codec.bits, value_order(*codes)),
        ("parameters", "float16", (kinds, tokens, heads, groups), 16, order),
    ]


def key_pair_order(tokens: int, heads: int, pairs: int) -> Order:
    """Returns the order of one code a pair: A fragments of K in S^T = K q^T, rows are tokens.

    Lane 4g + c owns, of every 8 pairs, pairs c and c + 4 of tokens g and g + 8: one step, one code
    of each of its four streams. A unit is the fewest tiles whose steps are a multiple of 8.
    """
    steps = pairs // 8
    tiles = 8 // gcd(8, steps)
    if tokens % (TILE_TOKENS * tiles):
        return Order((tokens, heads, pairs), (1, 0, 2))
    # unit, tile, token + 8, g, head, step, pair + 4, c
    split = (tokens // (TILE_TOKENS * tiles), tiles, 2, 8, heads, steps, 2, 4)
    return Order(split, (4, 0, 3, 7, 6, 2, 1, 5), streams=4, stream_codes=tiles * steps)


def value_pair_order(tokens: int, heads: int, pairs: int) -> Order:
    """Returns the order of one code a pair: A fragments of V in O^T = V^T P^T, rows are channels.

    Lane 4g + c owns, of every 8 pairs, pair g of tokens 2c, 2c + 1, 2c + 8 and 2c + 9: one step,
    one code of each of its four streams. The pair's channels are rows g and g + 8.
    """
    steps = pairs // 8
    tiles = 8 // gcd(8, steps)
    if tokens % (TILE_TOKENS * tiles):
        return Order((tokens, heads, pairs), (1, 0, 2))
    # unit, tile, token + 8, c, token + 1, head, step, g
    split = (tokens // (TILE_TOKENS * tiles), tiles, 2, 4, 2, heads, steps, 8)
    return Order(split, (5, 0, 7, 3, 2, 4, 1, 6), streams=4, stream_codes=tiles * steps)


def value_order(tokens: int, heads: int, channels: int) -> Order:
    """Returns the order of one code a channel: A fragments of V in O^T = V^T P^T, rows channels.

    Lane 4g + c owns, of every 16 channels, channels g and g + 8 of tokens 2c, 2c + 1, 2c + 8 and
    2c + 9. Its two streams are the even and the odd tokens: the two halves of a register.
    """
    rows = channels // 16
    tiles = 2 // gcd(2, rows)
    if tokens % (TILE_TOKENS * tiles):
        return Order((tokens, heads, channels), (1, 0, 2))
    # unit, tile, token + 8, c, token + 1, head, 16 channels, channel + 8, g
    split = (tokens // (TILE_TOKENS * tiles), tiles, 2, 4, 2, heads, rows, 2, 8)
    return Order(split, (5, 0, 8, 3, 4, 1, 6, 2, 7), streams=2, stream_codes=4 * tiles * rows)


def _tree_order(side: str, tokens: int, heads: int, codes: int, blocks: int) -> Order:
    """Returns the order of one level of the recursive codec: a lane owns whole trees.

    Of keys, lane 4g + c owns blocks c, c + 4, .. of tokens g and g + 8; of values, blocks g,
    g + 8, .. of tokens 2c, 2c + 1, 2c + 8 and 2c + 9. Where the blocks do not fill the lanes,
    trees lie token by token.
    """
    tiles = tokens // TILE_TOKENS
    columns = 4 if side == "key" else 8
    if tokens % TILE_TOKENS or blocks % columns:
        return Order((tokens, heads, codes, blocks), (1, 0, 3, 2))
    blocks //= columns
    if side == "key":  # tile, token + 8, g, head, code, block, c
        return Order((tiles, 2, 8, heads, codes, blocks, 4), (3, 0, 2, 6, 5, 1, 4))
    # tile, token + 8, c, token + 1, head, code, block, g
    return Order((tiles, 2, 4, 2, heads, codes, blocks, 8), (4, 0, 7, 2, 6, 1, 3, 5))
