"""Keys whose pairs differ in bits, in order of rank: device functions for `pair:tiers`.

Columns are ranks, so that columns of one class stand together; which pair a rank is differs from
page to page, and queries are gathered in that order. Math: kernels/polar/README.md, section 1.
"""

import triton
import triton.language as tl

from polarcache.kernels.attention.load_keys import TAU, cosine_and_sine
from polarcache.kernels.attention.load_words import as_mantissa
from polarcache.kernels.attention.page_queries import as_halves
from polarcache.kernels.gpu.pair_encode import pair_channels

CLASSES = tl.constexpr(5)


@triton.jit
def _pairs(slice_ptr, head, rank, KEY: tl.constexpr, D: tl.constexpr):
    """Returns the pair of each rank; bytes that are no ranking give some pair."""
    return tl.minimum(tl.load(slice_ptr + KEY[1] + head * (D // 2) + rank).to(tl.int32), D // 2 - 1)


@triton.jit
def tier_queries(q_ptr, query_head, exists, slice_ptr, head, KEY: tl.constexpr, D: tl.constexpr,
                 WIDE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Returns queries fp16 [BM, WIDE], column 2 rank + s channel s of its pair, and factors [BM].

    Args as `page_queries` has them, with the constants of `tiers`.
    """
    column = tl.arange(0, WIDE)
    rank = tl.minimum(column // 2, D // 2 - 1)
    pair = _pairs(slice_ptr, head, rank, KEY, D)
    first, second = pair_channels(pair, D, ROTARY, INTERLEAVED)
    channel = tl.where(column % 2 == 0, first, second)
    at = q_ptr + query_head.to(tl.int64)[:, None] * D + channel[None, :]
    q = tl.load(at, mask=exists[:, None] & (column < D)[None, :], other=0.0)
    q, unit = as_halves(q.to(tl.float32))
    return q.to(tl.float16), unit


@triton.jit
def _codes(slice_ptr, base, place, bits):
    """Loads codes of `bits` bits, which differ by column, from streams at byte `base`."""
    bit = place * bits[None, :]
    at = slice_ptr + base[None, :] + bit // 8
    shift = bit % 8
    low = tl.load(at).to(tl.int32)
    high = tl.load(at + 1, mask=shift + bits[None, :] > 8, other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & ((1 << bits) - 1)[None, :]


@triton.jit
def _class_of_ranks(so_far, head, KEY: tl.constexpr, T: tl.constexpr, AT: tl.constexpr):
    """Puts the ranks of one more class into it.

    Args:
        so_far: of each rank int32: place in its class, or beyond the classes so far; pairs of the
            class, or 0; bits of radius and angle; first byte of the head's streams of both.
        head: KV head.
        KEY: constants of `tiers`.
        T: tokens of the slice.
        AT: where the class stands in them.
    """
    place, count, radius_bits, angle_bits, radius_base, angle_base = so_far
    COUNT: tl.constexpr = KEY[AT]
    own = (count == 0) & (place < COUNT)
    place = tl.where((count == 0) & (place >= COUNT), place - COUNT, place)
    radius_at = KEY[AT + 3] + head * (T * COUNT * KEY[AT + 1] // 8)
    angle_at = KEY[AT + 4] + head * (T * COUNT * KEY[AT + 2] // 8)
    return (
        place,
        tl.where(own, COUNT, count),
        tl.where(own, KEY[AT + 1], radius_bits),
        tl.where(own, KEY[AT + 2], angle_bits),
        tl.where(own, radius_at, radius_base),
        tl.where(own, angle_at, angle_base),
    )


@triton.jit
def load_tiers(slice_ptr, head, first_token, row, one, KEY: tl.constexpr, T: tl.constexpr,
               D: tl.constexpr, DK: tl.constexpr, BT: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    """Returns keys fp16 [BT, DK], column 2 rank + s channel s of its pair.

    Args as `load_keys` has them. KEY is tokens of a group, offsets of the order, arcs and radii,
    and of each class its pairs, bits of radius and angle, and offsets of radii and angles.
    """
    GROUP: tl.constexpr = KEY[0]
    rank = tl.minimum(tl.arange(0, DK // 2), D // 2 - 1)
    none = rank * 0
    one_class = rank, none, none, none, none, none
    for index in tl.static_range(CLASSES):
        one_class = _class_of_ranks(one_class, head, KEY, T, 4 + 5 * index)
    place_in_class, count, radius_bits, angle_bits, radius_base, angle_base = one_class
    token = first_token + row
    place = token[:, None] * count[None, :] + place_in_class[None, :]
    radius_code = _codes(slice_ptr, radius_base, place, radius_bits)
    angle_code = _codes(slice_ptr, angle_base, place, angle_bits)

    pair = _pairs(slice_ptr, head, rank, KEY, D)
    group = head * (T // GROUP) + first_token // GROUP
    radii_ptr = (slice_ptr + KEY[3]).to(tl.pointer_type(tl.float16)) + group * D + pair
    radius_zero = tl.load(radii_ptr).to(tl.float32)
    radius_scale = tl.load(radii_ptr + D // 2).to(tl.float32)
    arcs_ptr = slice_ptr + KEY[2] + group * D + pair
    arcs = (tl.load(arcs_ptr).to(tl.int32) << 8) | tl.load(arcs_ptr + D // 2).to(tl.int32)
    angle_zero = (arcs >> 4).to(tl.float32) * (TAU / 4096)
    angle_scale = tl.exp2((16 - angle_bits - tl.minimum(arcs & 15, 8)).to(tl.float32))
    angle_scale *= TAU / 65536
    # zero + (code + 1/2) scale, of numbers 1 + code / 128
    radius_scale, angle_scale = 128 * radius_scale, 128 * angle_scale
    radius_zero -= radius_scale * (1 - 1 / 256)
    angle_zero -= angle_scale * (1 - 1 / 256)
    radius = as_mantissa(radius_code, one) * radius_scale[None, :] + radius_zero[None, :]
    angle = as_mantissa(angle_code, one) * angle_scale[None, :] + angle_zero[None, :]
    cosine, sine = cosine_and_sine(angle, FAST)
    return tl.reshape(tl.join(cosine * radius, sine * radius), [BT, DK]).to(tl.float16)
