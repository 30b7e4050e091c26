"""Pair codec: device functions that encode and decode one head of some units of tokens.

Source: arXiv 2502.00527, section 3; the smallest arc is ours. Math: kernels/polar/README.md,
section 1. Order of the codes: same page, section 3. Reference: kernels/polar/pair.py.

Tensors are [rows, columns, 2, 2]: row 8 tile + g, column 4 step + c, then pair + 4 and token + 8.
The last two axes are the four bytes of a lane's word and stay in one thread, so that no code
changes threads, and so do the rows of a column, but for the warps' share of the ranges.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.arc import arc_middle, sectors
from polarcache.kernels.gpu.words import (
    ROUNDER,
    ROUNDER_BITS,
    load_words,
    reciprocal,
    rounded_codes,
    store_words,
    token_rows,
    whole,
)
from polarcache.kernels.polar.pair import FP16_MAX as _FP16_MAX

FP16_MAX = tl.constexpr(_FP16_MAX)
PI = tl.constexpr(3.141592653589793)
TAU = tl.constexpr(6.283185307179586)
NAN = tl.constexpr(float("nan"))
# Keeps the square root of zero finite; pairs not longer than its root count as length zero.
TINY = tl.constexpr(1e-37)
# floor(p) is round(p - 1/2) but for whole p, which need a nudge above fp32's rounding.
HALF = tl.constexpr(0.5 - 2.0**-20)


@triton.jit
def pair_channels(pairs, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns the first and the second channel of pairs, as BlockShape.pair_channels pairs them."""
    if INTERLEAVED:
        first = 2 * pairs
        second = first + 1
    elif ROTARY == D or ROTARY == 0:
        first = pairs
        second = pairs + D // 2
    else:
        turns = pairs < ROTARY // 2
        first = tl.where(turns, pairs, pairs + ROTARY // 2)
        second = first + tl.where(turns, ROTARY // 2, (D - ROTARY) // 2)
    return first, second


@triton.jit
def polar(x, y):
    """Returns squared radius, radius and angle minus pi, in [-pi, pi], of fp32 pairs.

    One reciprocal root serves both: the angle to the nearer axis has the sine min(|x|, |y|) / r,
    at most sqrt(1/2), where asin z = z + z^3 Q(z^2), Q of degree 5, within 5e-8 (minimax fit).
    """
    square = x * x + (y * y + TINY)
    root = tl.rsqrt(square)
    width, height = tl.abs(x), tl.abs(y)
    z = tl.minimum(width, height) * root
    w = z * z
    q = w * 0.11141634732484818 - 0.07119270414113998
    q = q * w + 0.07029935717582703
    q = q * w + 0.036312635987997055
    q = q * w + 0.07580921798944473
    q = q * w + 0.16663891077041626
    angle = z + z * (q * w)
    angle = tl.where(height > width, PI / 2 - angle, angle)
    angle = tl.where(x < 0, angle, PI - angle)
    return square, square * root, tl.where(y < 0, angle, -angle)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _merge(low_a, high_a, start_a, stop_a, low_b, high_b, start_b, stop_b):
    """Merges two ranges of radii and of angles; only the largest radius keeps NaN."""
    return (
        tl.minimum(low_a, low_b),
        tl.maximum(high_a, high_b, propagate_nan=tl.PropagateNan.ALL),
        tl.minimum(start_a, start_b),
        tl.maximum(stop_a, stop_b),
    )


@triton.jit
def _merge_angles(start_a, stop_a, start_b, stop_b):
    return tl.minimum(start_a, start_b), tl.maximum(stop_a, stop_b)


@triton.jit
def _by_group(numbers, NG: tl.constexpr):
    """Moves the tokens of a group to one axis: [R, C, 2] to [NG, R / NG, C, 2]."""
    R: tl.constexpr = numbers.shape[0]
    C: tl.constexpr = numbers.shape[1]
    return tl.reshape(numbers, [NG, R // NG, C, 2])


@triton.jit
def _spread(numbers, R: tl.constexpr):
    """Repeats numbers of groups, [NG, C, 2], for every token: [R, C, 2, 1]."""
    NG: tl.constexpr = numbers.shape[0]
    C: tl.constexpr = numbers.shape[1]
    if NG == 1:
        return numbers[:, :, :, None]
    else:
        wide = tl.broadcast_to(numbers[:, None, :, :], [NG, R // NG, C, 2])
        return tl.reshape(wide, [R, C, 2])[:, :, :, None]


@triton.jit
def _codes(numbers, zero, scale, BITS: tl.constexpr):
    """Returns floor((numbers - zero) / scale) of [R, C, 2, 2] as int32 above ROUNDER_BITS."""
    R: tl.constexpr = numbers.shape[0]
    shape: tl.constexpr = numbers.shape
    # Rounding the distance from the first bin's centre is the floor of that from its edge.
    offsets = numbers - _spread(zero + HALF * scale, R)
    inverse = tl.broadcast_to(_spread(reciprocal(scale), R), shape)
    return rounded_codes(offsets, inverse, BITS, True)


@triton.jit
def _load_pairs(x_ptr, rows, channels, columns_ok):
    """Loads fp32 [R, C] of one channel of a pair, two bytes a thread."""
    # Wider loads would put the columns of a vector, and so the ranges of them all, into every
    # thread. Triton orders threads along the longer run and widens by alignment: say so.
    offsets = tl.max_contiguous(rows[:, None] + channels[None, :], [1, 2])
    offsets = tl.multiple_of(offsets, [1, 1])
    if columns_ok is None:
        return tl.load(x_ptr + offsets).to(tl.float32)
    else:
        return tl.load(x_ptr + offsets, mask=columns_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def encode_pairs(
    x_ptr,
    slots_ptr,
    codes_ptr,
    parameters_ptr,
    flag_ptr,
    slice_index,
    stride_n,
    stride_t,
    first_token,
    T: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    R_BITS: tl.constexpr,
    T_BITS: tl.constexpr,
    ARC: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Encodes TOKENS tokens of one head.

    Reads: x fp16, bf16 or fp32 at x_ptr (the head's first channel), last dim contiguous.
    Writes: codes and parameters of these tokens, every byte once; a flag where a radius is not
    finite or above 65504.
    Precision: fp32, parameters rounded to fp16 before codes are taken from them.
    """
    STEPS: tl.constexpr = D // 16
    COLUMNS: tl.constexpr = 4 * triton.next_power_of_2(STEPS)
    R: tl.constexpr = TOKENS // 2
    NG: tl.constexpr = TOKENS // GROUP
    row = tl.arange(0, R)
    column = tl.arange(0, COLUMNS)
    step, c = column // 4, column % 4
    columns_ok = None
    if COLUMNS != 4 * STEPS:
        columns_ok = step < STEPS
    token = first_token + row // 8 * 16 + row % 8
    rows_a = token_rows(slots_ptr, slice_index, token, stride_n, stride_t, T)
    rows_b = token_rows(slots_ptr, slice_index, token + 8, stride_n, stride_t, T)
    first_0, second_0 = pair_channels(8 * step + c, D, ROTARY, INTERLEAVED)
    first_1, second_1 = pair_channels(8 * step + c + 4, D, ROTARY, INTERLEAVED)
    x = tl.join(
        tl.join(
            _load_pairs(x_ptr, rows_a, first_0, columns_ok),
            _load_pairs(x_ptr, rows_a, first_1, columns_ok),
        ),
        tl.join(
            _load_pairs(x_ptr, rows_b, first_0, columns_ok),
            _load_pairs(x_ptr, rows_b, first_1, columns_ok),
        ),
    )
    y = tl.join(
        tl.join(
            _load_pairs(x_ptr, rows_a, second_0, columns_ok),
            _load_pairs(x_ptr, rows_a, second_1, columns_ok),
        ),
        tl.join(
            _load_pairs(x_ptr, rows_b, second_0, columns_ok),
            _load_pairs(x_ptr, rows_b, second_1, columns_ok),
        ),
    )
    square, radius, angle = polar(x, y)
    if ARC:
        present = square > 2 * TINY
        occupied_a, occupied_b = tl.split(sectors(angle, present))
        angle = tl.where(present, angle, NAN)  # minima and maxima pass over NaN
    radius_a, radius_b = tl.split(radius)
    angle_a, angle_b = tl.split(angle)
    low, high, start, stop = _merge(radius_a, radius_a, angle_a, angle_a,
                                    radius_b, radius_b, angle_b, angle_b)  # fmt: skip
    low, high, start, stop = tl.reduce(
        (_by_group(low, NG), _by_group(high, NG), _by_group(start, NG), _by_group(stop, NG)),
        1,
        _merge,
    )
    origin = tl.full([NG, COLUMNS, 2], PI, tl.float32)
    if ARC:
        occupied = tl.reduce(_by_group(occupied_a | occupied_b, NG), 1, _or)
        middle = arc_middle(occupied, start, stop)
        angle -= _spread(middle, R)
        angle -= TAU * whole(angle * (1 / TAU))
        angle_a, angle_b = tl.split(angle)
        start, stop = _merge_angles(angle_a, angle_a, angle_b, angle_b)
        start, stop = tl.reduce((_by_group(start, NG), _by_group(stop, NG)), 1, _merge_angles)
        some = high * high > 2 * TINY
        start, stop = tl.where(some, start, 0.0), tl.where(some, stop, 0.0)
        origin += middle
    zero = start + origin
    if ARC:
        zero -= TAU * whole(zero * (1 / TAU))
    radius_min = low.to(tl.float16)
    radius_scale = ((high - low) * (1.0 / (1 << R_BITS))).to(tl.float16)
    angle_zero = zero.to(tl.float16)
    angle_scale = ((stop - start) * (1.0 / (1 << T_BITS))).to(tl.float16)

    # [groups, 4 kinds, pair % 8, pair // 8]
    group = tl.arange(0, NG)[:, None, None]
    place = (c[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]) * STEPS + step[None, :, None]
    at = parameters_ptr + group * (2 * D) + place
    ok = None if columns_ok is None else columns_ok[None, :, None]
    tl.store(at, radius_min, mask=ok)
    tl.store(at + D // 2, radius_scale, mask=ok)
    tl.store(at + D, angle_zero, mask=ok)
    tl.store(at + D // 2 * 3, angle_scale, mask=ok)
    refused = tl.max(tl.where(high <= FP16_MAX, 0, 1).reshape([NG * COLUMNS * 2]), 0)
    if refused > 0:
        tl.store(flag_ptr, 1)

    # Only the rounding error moves the zero, so no angle can leave by the other end of the arc.
    relative_zero = start + (angle_zero.to(tl.float32) - zero)
    codes = _codes(angle, relative_zero, angle_scale.to(tl.float32), T_BITS)
    radius_code = _codes(radius, radius_min.to(tl.float32), radius_scale.to(tl.float32), R_BITS)
    codes += radius_code << T_BITS
    bytes_a, bytes_b = tl.split(codes)
    low_halves, high_halves = tl.split(bytes_a + (bytes_b << 8))
    # The patterns' common part sums to a constant; adding wraps at 32 bits.
    COMMON: tl.constexpr = -(ROUNDER_BITS * ((1 << T_BITS) + 1) * 0x01010101) % (1 << 32)
    words = (
        low_halves + (high_halves << 16) + (COMMON if COMMON < (1 << 31) else COMMON - (1 << 32))
    )
    store_words(codes_ptr, words, step, columns_ok, D, R_BITS + T_BITS, TILES)


@triton.jit
def _turn(angle):
    """Returns cosine and sine, within 2e-7, of fp32 angles up to a few turns.

    Quarter turns are taken off in two parts; on the rest, at most pi/4, Taylor-like minimax
    polynomials of Cephes (sinf, cosf).
    """
    quarters = angle * (2 / PI) + ROUNDER
    rest = quarters - ROUNDER
    quarter = quarters.to(tl.int32, bitcast=True)
    f = (angle - rest * 1.5703125) - rest * 4.838267948966e-4
    w = f * f
    sine = f + f * w * (-1.6666654611e-1 + w * (8.3321608736e-3 - w * 1.9515295891e-4))
    cosine = (
        1.0
        - 0.5 * w
        + w * w * (4.166664568298827e-2 + w * (-1.388731625493765e-3 + w * 2.443315711809948e-5))
    )
    swap = (quarter & 1) != 0
    first = tl.where(swap, sine, cosine)
    second = tl.where(swap, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    return first, tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def _row_of_pairs(numbers):
    """Orders [R, 4 steps, pair + 4] as pairs, [R, 8 steps]."""
    R: tl.constexpr = numbers.shape[0]
    C: tl.constexpr = numbers.shape[1]
    return tl.reshape(tl.permute(tl.reshape(numbers, [R, C // 4, 4, 2]), (0, 1, 3, 2)), [R, 2 * C])


@triton.jit
def decode_pairs(
    out_ptr,
    slots_ptr,
    codes_ptr,
    parameters_ptr,
    slice_index,
    stride_n,
    stride_t,
    first_token,
    T: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    R_BITS: tl.constexpr,
    T_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Decodes TOKENS tokens of one head at the centres of their bins.

    Reads: codes and parameters of these tokens.
    Writes: fp16, bf16 or fp32 rows at out_ptr (the head's first channel), every element once.
    Precision: fp32, rounded once.
    """
    STEPS: tl.constexpr = D // 16
    COLUMNS: tl.constexpr = 4 * triton.next_power_of_2(STEPS)
    R: tl.constexpr = TOKENS // 2
    words = load_words(codes_ptr, R, COLUMNS, D, R_BITS + T_BITS, TILES)
    # [R, C, pair + 4, token + 8]: the bytes of a word
    codes = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    radius_code = ((codes >> T_BITS) & ((1 << R_BITS) - 1)).to(tl.float32)
    angle_code = (codes & ((1 << T_BITS) - 1)).to(tl.float32)

    row = tl.arange(0, R)
    column = tl.arange(0, COLUMNS)
    group = (row // (GROUP // 2))[:, None, None]
    pair_low = (column % 4)[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]
    at = parameters_ptr + group * (2 * D) + pair_low * STEPS + (column // 4)[None, :, None]
    ok = tl.broadcast_to((column < 4 * STEPS)[None, :, None], [R, COLUMNS, 2])
    radius_zero = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    radius_scale = tl.load(at + D // 2, mask=ok, other=0.0).to(tl.float32)
    angle_zero = tl.load(at + D, mask=ok, other=0.0).to(tl.float32)
    angle_scale = tl.load(at + D // 2 * 3, mask=ok, other=0.0).to(tl.float32)
    radius_zero += 0.5 * radius_scale
    angle_zero += 0.5 * angle_scale
    radius = radius_code * radius_scale[:, :, :, None] + radius_zero[:, :, :, None]
    x, y = _turn(angle_code * angle_scale[:, :, :, None] + angle_zero[:, :, :, None])
    x_a, x_b = tl.split(x * radius)
    y_a, y_b = tl.split(y * radius)
    token = first_token + row // 8 * 16 + row % 8
    for second_row in tl.static_range(2):
        rows = token_rows(slots_ptr, slice_index, token + 8 * second_row, stride_n, stride_t, T)
        x_row = _row_of_pairs(x_b if second_row else x_a)
        y_row = _row_of_pairs(y_b if second_row else y_a)
        _store_pairs(out_ptr + rows[:, None], x_row, y_row, D, ROTARY, INTERLEAVED)


@triton.jit
def _store_pairs(row_ptr, x, y, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Stores [R, pairs] channels of every pair, saturating to fp16."""
    dtype = row_ptr.dtype.element_ty
    if dtype == tl.float16:
        x = tl.clamp(x, -FP16_MAX, FP16_MAX)
        y = tl.clamp(y, -FP16_MAX, FP16_MAX)
    x, y = x.to(dtype), y.to(dtype)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * x.shape[1])[None, :]
        both = tl.reshape(tl.join(x, y), [x.shape[0], 2 * x.shape[1]])
        tl.store(row_ptr + channel, both, mask=channel < D)
    else:
        pairs = tl.arange(0, x.shape[1])
        first, second = pair_channels(pairs, D, ROTARY, INTERLEAVED)
        ok = (pairs < D // 2)[None, :]
        tl.store(row_ptr + first[None, :], x, mask=ok)
        tl.store(row_ptr + second[None, :], y, mask=ok)
