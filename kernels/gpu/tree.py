"""Recursive codec: device functions that turn rotated rows into trees of angles and back.

Math: kernels/polar/README.md, section 2. Reference: kernels/polar/recursive.py.

Squares of radii rise in the tree: comparing them with squared tangents needs no root but the last.
Codes of one level of a tree of 16 channels are gathered in one number, and these numbers lie in
memory as `Order` says (`_tree_order` in kernels/layout.py).
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.rotate import halves, load_table, look_up
from polarcache.kernels.gpu.words import whole

# Entries of each level in tables of all levels.
ENTRIES = tl.constexpr(16)
# Tangents of 22.5 and 67.5 degrees: bounds of the 16 angles of level 1 in a quadrant.
TAN_1 = tl.constexpr(0.41421356237309503)
TAN_3 = tl.constexpr(2.414213562373095)
# Cosines of 11.25, 33.75, 56.25 and 78.75 degrees, their middles.
_COS_0 = tl.constexpr(0.9807852804032304)
_COS_1 = tl.constexpr(0.8314696123025452)
_COS_2 = tl.constexpr(0.5555702330196022)
_COS_3 = tl.constexpr(0.19509032201612825)


@triton.jit
def first_codes(x, y, DEEP: tl.constexpr):
    """Codes level 1.

    Args:
        x: fp32, the first channel of each pair.
        y: fp32 of that shape, the second.
        DEEP: whether products are wanted.

    Returns:
        codes: int32, floor(16 angle / 2 pi).
        products: <(x, y), decoded unit vector>, fp32, with DEEP.
    """
    width, height = tl.abs(x), tl.abs(y)
    upper = height > width
    odd = height > width * tl.where(upper, TAN_3, TAN_1)
    backwards = (x < 0) != (y < 0)
    # Quadrants 1 and 3 count backwards.
    codes = tl.where(backwards, 7, 0) ^ (tl.where(upper, 2, 0) | tl.where(odd, 1, 0))
    codes |= tl.where(y < 0, 8, 0)
    products = width
    if DEEP:
        cosine = tl.where(upper, tl.where(odd, _COS_3, _COS_2), tl.where(odd, _COS_1, _COS_0))
        sine = tl.where(upper, tl.where(odd, _COS_0, _COS_1), tl.where(odd, _COS_2, _COS_3))
        products = width * cosine + height * sine
    return codes, products


@triton.jit
def next_codes(
    first,
    second,
    products,
    cosines_ptr,
    COSINES: tl.constexpr,
    TANGENTS: tl.constexpr,
    LEVEL: tl.constexpr,
    BITS: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Codes a level above the first.

    Args:
        first: squares of radii of first halves, fp32 [M, N].
        second: likewise of second halves.
        products: of both halves, fp32 [M, 2 N]; read with DEEP.
        cosines_ptr: as for turn_of.
        COSINES: as for turn_of.
        TANGENTS: squared tangents of the angles between codes, ENTRIES for each level.
        LEVEL: 1 for the second level.
        BITS: bits of its codes.
        DEEP: whether products are wanted.

    Returns:
        codes: int32 [M, N].
        products: fp32 [M, N], with DEEP.
    """
    codes = bisected(second, first, TANGENTS, ENTRIES * LEVEL, BITS)
    if DEEP:
        product_1, product_2 = halves(products)
        cosine, sine = turn_of(codes, cosines_ptr, COSINES, LEVEL, BITS)
        products = cosine * product_1 + sine * product_2
    return codes, products


@triton.jit
def bisected(numbers, unit, BOUNDS: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Returns how many of rising BOUNDS, times unit, are below numbers, int32.

    These are 2**BITS - 1 BOUNDS from FIRST on.
    """
    if BITS == 1:
        return tl.where(numbers > unit * BOUNDS[FIRST], 1, 0)
    elif BITS == 2:
        high = numbers > unit * BOUNDS[FIRST + 1]
        low = numbers > unit * tl.where(high, BOUNDS[FIRST + 2], BOUNDS[FIRST])
        return tl.where(high, 2, 0) | tl.where(low, 1, 0)
    elif BITS == 3:
        high = numbers > unit * BOUNDS[FIRST + 3]
        middle = numbers > unit * tl.where(high, BOUNDS[FIRST + 5], BOUNDS[FIRST + 1])
        bound = tl.where(
            high,
            tl.where(middle, BOUNDS[FIRST + 6], BOUNDS[FIRST + 4]),
            tl.where(middle, BOUNDS[FIRST + 2], BOUNDS[FIRST]),
        )
        low = tl.where(numbers > unit * bound, 1, 0)
        return tl.where(high, 4, 0) | tl.where(middle, 2, 0) | low
    else:
        tl.static_assert(BITS == 4)
        half = numbers > unit * BOUNDS[FIRST + 7]
        high = numbers > unit * tl.where(half, BOUNDS[FIRST + 11], BOUNDS[FIRST + 3])
        bound = tl.where(
            half,
            tl.where(high, BOUNDS[FIRST + 13], BOUNDS[FIRST + 9]),
            tl.where(high, BOUNDS[FIRST + 5], BOUNDS[FIRST + 1]),
        )
        middle = numbers > unit * bound
        above = tl.where(
            high,
            tl.where(middle, BOUNDS[FIRST + 14], BOUNDS[FIRST + 12]),
            tl.where(middle, BOUNDS[FIRST + 10], BOUNDS[FIRST + 8]),
        )
        below = tl.where(
            high,
            tl.where(middle, BOUNDS[FIRST + 6], BOUNDS[FIRST + 4]),
            tl.where(middle, BOUNDS[FIRST + 2], BOUNDS[FIRST]),
        )
        low = tl.where(numbers > unit * tl.where(half, above, below), 1, 0)
        return tl.where(half, 8, 0) | tl.where(high, 4, 0) | tl.where(middle, 2, 0) | low


@triton.jit
def gathered(codes, BLOCKS: tl.constexpr, BITS: tl.constexpr):
    """Puts the codes of a tree into one number: int32 [M, K blocks] to [M, blocks]."""
    M: tl.constexpr = codes.shape[0]
    K: tl.constexpr = codes.shape[1] // BLOCKS
    if K == 1:
        return codes
    else:
        place = (tl.arange(0, K) * BITS)[None, :, None]
        return tl.sum(tl.reshape(codes, [M, K, BLOCKS]) << place, 1)


@triton.jit
def to_memory(numbers, ORDER: tl.constexpr):
    """Orders one number a tree, [M, blocks], as trees lie in memory: [M blocks].

    ORDER: `key` for columns c h + h' of blocks 4 h' + c, `value` or `rows` for columns in order.
    """
    M: tl.constexpr = numbers.shape[0]
    B: tl.constexpr = numbers.shape[1]
    if ORDER == "key":
        # [tile, token + 8, g, c, block]
        numbers = tl.permute(tl.reshape(numbers, [M // 16, 2, 8, 4, B // 4]), (0, 2, 3, 4, 1))
    elif ORDER == "value":
        # [tile, token + 8, c, token + 1, block, g]
        numbers = tl.reshape(numbers, [M // 16, 2, 4, 2, B // 8, 8])
        numbers = tl.permute(numbers, (0, 5, 2, 4, 1, 3))
    return tl.reshape(numbers, [M * B])


@triton.jit
def by_column(numbers, ORDER: tl.constexpr):
    """Orders columns by block, [M, blocks]: undoes the order of `key` columns."""
    M: tl.constexpr = numbers.shape[0]
    B: tl.constexpr = numbers.shape[1]
    if ORDER == "key" and B > 4:
        numbers = tl.permute(tl.reshape(numbers, [M, 4, B // 4]), (0, 2, 1))
        numbers = tl.reshape(numbers, [M, B])
    return numbers


@triton.jit
def by_lane(numbers, ORDER: tl.constexpr):
    """The inverse of by_column."""
    M: tl.constexpr = numbers.shape[0]
    B: tl.constexpr = numbers.shape[1]
    if ORDER == "key" and B > 4:
        numbers = tl.permute(tl.reshape(numbers, [M, B // 4, 4]), (0, 2, 1))
        numbers = tl.reshape(numbers, [M, B])
    return numbers


@triton.jit
def log_codes(radii):
    """Returns codes, int32, of fp32 radii, nearest to 2**((c - 128) / 8)."""
    code = whole(tl.log2(radii) * 8.0)
    # Minus infinity is a radius of zero; NaN is refused.
    code = tl.clamp(tl.where(code == code, code, 0.0), -128.0, 127.0)
    return code.to(tl.int32) + 128


@triton.jit
def log_radii(codes):
    """Returns radii, fp32, of codes."""
    radius = tl.exp2((codes - 128).to(tl.float32) * 0.125)
    return tl.where(codes > 0, radius, 0.0)


@triton.jit
def turn_of(codes, cosines_ptr, COSINES: tl.constexpr, LEVEL: tl.constexpr, BITS: tl.constexpr):
    """Returns cosine and sine, fp32, of codes above level 1.

    Angles lie symmetrically about pi/4: the sine is the cosine of the mirrored code.

    Args:
        codes: int32 of any shape.
        cosines_ptr: fp32 [levels, ENTRIES], cosines of the angles of codes.
        COSINES: the same numbers; choosing among four is cheaper than looking them up.
        LEVEL: 1 for the second level.
        BITS: bits of its codes.
    """
    FIRST: tl.constexpr = ENTRIES * LEVEL
    if BITS == 2:
        odd, upper = (codes & 1) != 0, (codes & 2) != 0
        outer = odd == upper
        large = tl.where(outer, COSINES[FIRST], COSINES[FIRST + 1])
        small = tl.where(outer, COSINES[FIRST + 3], COSINES[FIRST + 2])
        return tl.where(upper, small, large), tl.where(upper, large, small)
    else:
        cosine = look_up(load_table(cosines_ptr + FIRST, 1 << BITS), codes)
        # No angle is near 0 or pi/2.
        return cosine, tl.sqrt(1.0 - cosine * cosine)
