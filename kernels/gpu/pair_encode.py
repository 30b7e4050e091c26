"""Pair codec: device functions that encode and decode one head of some units of tokens.

Source: arXiv 2502.00527, section 3; the smallest arc is ours. Math: kernels/polar/README.md,
section 1. Order of the codes: same page, section 3. Reference: kernels/polar/pair.py.

Tensors are [rows, columns, 2, 2]: row 8 tile + g, column 4 step + c, then pair + 4 and token + 8.
The last two axes are the four bytes of a lane's word and stay in one thread, so that no code
changes threads, and so do the rows of a column, but for the warps' share of the ranges.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.arc import (
    MINMAX,
    SMALLEST,
    WHOLE,
    arc_middle,
    arc_step,
    sectors,
    whole_arc,
)
from polarcache.kernels.gpu.words import (
    ROUNDER,
    clamped_pair,
    reciprocal,
    store_words,
    token_rows,
    whole,
)
from polarcache.kernels.polar.pair import FP16_MAX as _FP16_MAX

FP16_MAX = tl.constexpr(_FP16_MAX)
PI = tl.constexpr(3.141592653589793)
TAU = tl.constexpr(6.283185307179586)
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
def polar(x, y, TURNED: tl.constexpr, CIRCULAR: tl.constexpr = False):
    """Returns squared radius, radius and angle in [-pi, pi] of fp32 pairs.

    TURNED: whether angles are less by pi, so that they start at 0 and not at -pi.
    CIRCULAR: whether -pi and pi are the same to the caller: a y of -0.0 may give either.

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
    if CIRCULAR:
        # Signs by bits, cheaper than by comparisons: from the y axis, then from the x axis.
        angle = tl.where(height > width, angle, PI / 2 - angle)
        angle = _signed(angle, x, not TURNED) + PI / 2
        return square, square * root, _signed(angle, y, TURNED)
    angle = tl.where(height > width, PI / 2 - angle, angle)
    if TURNED:
        angle = tl.where(x < 0, angle, PI - angle)
        angle = tl.where(y < 0, angle, -angle)
    else:
        angle = tl.where(x < 0, PI - angle, angle)
        angle = tl.where(y < 0, -angle, angle)
    return square, square * root, angle


@triton.jit
def _signed(numbers, signs, OPPOSITE: tl.constexpr):
    """Gives fp32 numbers of at least 0 the signs, or the opposite signs, of others."""
    bits = signs.to(tl.uint32, bitcast=True)
    if OPPOSITE:
        bits = bits ^ 0xFFFFFFFF
    bits = numbers.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return bits.to(tl.float32, bitcast=True)


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
def merge_sectors(
    low_a, high_a, start_a, stop_a, sectors_a, low_b, high_b, start_b, stop_b, sectors_b
):
    """The same with sets of sectors."""
    low, high, start, stop = _merge(low_a, high_a, start_a, stop_a, low_b, high_b, start_b, stop_b)
    return low, high, start, stop, sectors_a | sectors_b


@triton.jit
def _ranges(radius, angle, present, NG: tl.constexpr):
    """Returns ranges of radii and of angles and sets of sectors, [NG, C, 2] each.

    present: which pairs have an angle, or None for all.
    """
    radius_a, radius_b = tl.split(radius)
    angle_a, angle_b = tl.split(angle)
    sectors_a, sectors_b = tl.split(sectors(angle, present))
    low, high, start, stop = _merge(
        radius_a, radius_a, angle_a, angle_a, radius_b, radius_b, angle_b, angle_b
    )
    return _fold_sectors(low, high, start, stop, sectors_a | sectors_b, NG)


@triton.jit
def _any(numbers):
    return tl.max(tl.reshape(tl.where(numbers, 1, 0), [numbers.numel]), 0) > 0


@triton.jit
def merge_angles(start_a, stop_a, start_b, stop_b):
    """Merges two ranges of angles."""
    return tl.minimum(start_a, start_b), tl.maximum(stop_a, stop_b)


@triton.jit
def _by_group(numbers, NG: tl.constexpr):
    """Moves the tokens of a group to one axis: [R, C, 2] to [NG, R / NG, C, 2]."""
    R: tl.constexpr = numbers.shape[0]
    C: tl.constexpr = numbers.shape[1]
    return tl.reshape(numbers, [NG, R // NG, C, 2])


@triton.jit
def _fold_ranges(low, high, start, stop, NG: tl.constexpr):
    """Reduces [R, C, 2] over the tokens of each of NG groups: [NG, C, 2]."""
    if NG == 1:
        return tl.reduce((low, high, start, stop), 0, _merge, keep_dims=True)
    else:
        low, high = _by_group(low, NG), _by_group(high, NG)
        return tl.reduce((low, high, _by_group(start, NG), _by_group(stop, NG)), 1, _merge)


@triton.jit
def _fold_sectors(low, high, start, stop, occupied, NG: tl.constexpr):
    """The same with sets of sectors."""
    if NG == 1:
        return tl.reduce((low, high, start, stop, occupied), 0, merge_sectors, keep_dims=True)
    else:
        low, high, occupied = _by_group(low, NG), _by_group(high, NG), _by_group(occupied, NG)
        return tl.reduce(
            (low, high, _by_group(start, NG), _by_group(stop, NG), occupied), 1, merge_sectors
        )


@triton.jit
def _fold_angles(start, stop, NG: tl.constexpr):
    """The same of angles alone."""
    if NG == 1:
        return tl.reduce((start, stop), 0, merge_angles, keep_dims=True)
    else:
        return tl.reduce((_by_group(start, NG), _by_group(stop, NG)), 1, merge_angles)


@triton.jit
def spread(numbers, R: tl.constexpr):
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
    """Returns floor((numbers - zero) / scale) of [R, C, 2, 2], clamped to BITS bits.

    int32 [R, C, token + 8]: codes of a pair and of pair + 4 in the halves.
    """
    R: tl.constexpr = numbers.shape[0]
    shape: tl.constexpr = numbers.shape
    # Rounding the distance from the first bin's centre is the floor of that from its edge.
    offsets = numbers - spread(zero + HALF * scale, R)
    inverse = tl.broadcast_to(spread(reciprocal(scale), R), shape)
    places = tl.fma(offsets, inverse, ROUNDER)
    low, high = tl.split(tl.permute(places, (0, 1, 3, 2)))
    return clamped_pair(low, high, BITS)


@triton.jit
def _at(x_ptr, rows, channels):
    offsets = tl.max_contiguous(rows[:, None] + channels[None, :], [1, 2])
    return x_ptr + tl.multiple_of(offsets, [1, 1])


@triton.jit
def _load(at):
    return tl.load(at).to(tl.float32)


@triton.jit
def _load_pairs(
    x_ptr,
    rows_a,
    rows_b,
    step,
    c,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Loads both channels of pairs, fp32 [R, C, pair + 4, token + 8] each."""
    first, second = pair_channels(8 * step + c, D, ROTARY, INTERLEAVED)
    x_a = _at(x_ptr, rows_a, first)
    x_b = _at(x_ptr, rows_b, first)
    if INTERLEAVED or ROTARY % 16 == 0:
        # Pairs of a step turn, or not, together: constant distances, no address arithmetic.
        plus_4 = 8 if INTERLEAVED else 4
        if INTERLEAVED or ROTARY == 0 or ROTARY == D:
            plus_y = 1 if INTERLEAVED else D // 2
        else:
            plus_y = (second - first)[None, :]
        x = tl.join(
            tl.join(_load(x_a), _load(x_a + plus_4)), tl.join(_load(x_b), _load(x_b + plus_4))
        )
        y_a, y_b = x_a + plus_y, x_b + plus_y
        y = tl.join(
            tl.join(_load(y_a), _load(y_a + plus_4)), tl.join(_load(y_b), _load(y_b + plus_4))
        )
    else:
        first_4, second_4 = pair_channels(8 * step + c + 4, D, ROTARY, INTERLEAVED)
        x_a4 = _at(x_ptr, rows_a, first_4)
        x_b4 = _at(x_ptr, rows_b, first_4)
        y_a = _at(x_ptr, rows_a, second)
        y_b = _at(x_ptr, rows_b, second)
        y_a4 = _at(x_ptr, rows_a, second_4)
        y_b4 = _at(x_ptr, rows_b, second_4)
        x = tl.join(tl.join(_load(x_a), _load(x_a4)), tl.join(_load(x_b), _load(x_b4)))
        y = tl.join(tl.join(_load(y_a), _load(y_a4)), tl.join(_load(y_b), _load(y_b4)))
    return x, y


@triton.jit
def encode_pairs(
    x_ptr,
    slots_ptr,
    codes_ptr,
    parameters_ptr,
    arcs_ptr,
    flag_ptr,
    slice_index,
    stride_n,
    stride_t,
    first_token,
    first_step,
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
    STEPS: tl.constexpr,
):
    """Encodes TOKENS tokens and STEPS times 8 pairs of one head.

    Reads: x fp16, bf16 or fp32 at x_ptr (the head's first channel), last dim contiguous.
    Writes: codes and parameters of these pairs, every byte once; a flag where a radius is not
    finite or above 65504.
    ARC: MINMAX, SMALLEST or WHOLE, whose arcs go to arcs_ptr; else that is not read.
    Precision: fp32, parameters rounded to fp16 before codes are taken from them.
    """
    C: tl.constexpr = 4 * triton.next_power_of_2(STEPS)
    R: tl.constexpr = TOKENS // 2
    NG: tl.constexpr = TOKENS // GROUP
    row = tl.arange(0, R)
    column = tl.arange(0, C)
    # Columns past the last step repeat it: they read and find what it does, and store the same.
    step = first_step + tl.minimum(column // 4, STEPS - 1)
    c = column % 4
    token = first_token + row // 8 * 16 + row % 8
    rows_a = token_rows(slots_ptr, slice_index, token, stride_n, stride_t, T)
    rows_b = token_rows(slots_ptr, slice_index, token + 8, stride_n, stride_t, T)
    x, y = _load_pairs(x_ptr, rows_a, rows_b, step, c, D, ROTARY, INTERLEAVED)
    _, radius, angle = polar(x, y, ARC != WHOLE, ARC != MINMAX)
    radius_a, radius_b = tl.split(radius)
    if ARC != MINMAX:
        low, high, start, stop, occupied = _ranges(radius, angle, None, NG)
        if _any(low * low <= 4 * TINY):
            # Pairs of length zero have no angle; minima and maxima pass over NaN.
            present = radius * radius > 2 * TINY
            angle = tl.where(present, angle, float("nan"))
            low, high, start, stop, occupied = _ranges(radius, angle, present, NG)
        middle = arc_middle(occupied, start, stop)
        # Half a turn before and after the middle, which is in [-pi, 2 pi), are a turn apart.
        above = tl.where(middle < 0, middle + TAU, middle)
        angle -= tl.where(angle < spread(above - PI, R), spread(above - TAU, R), spread(above, R))
        angle_a, angle_b = tl.split(angle)
        start, stop = merge_angles(angle_a, angle_a, angle_b, angle_b)
        start, stop = _fold_angles(start, stop, NG)
        some = high * high > 2 * TINY
        start, stop = tl.where(some, start, 0.0), tl.where(some, stop, 0.0)
    else:
        angle_a, angle_b = tl.split(angle)
        low, high, start, stop = _merge(
            radius_a, radius_a, angle_a, angle_a, radius_b, radius_b, angle_b, angle_b
        )
        low, high, start, stop = _fold_ranges(low, high, start, stop, NG)
        middle = tl.zeros(start.shape, tl.float32)
    group = tl.arange(0, NG)[:, None, None]
    if ARC == WHOLE:
        arc, exponent = whole_arc(middle, start, stop)
        # [groups, 2, pairs]: high bytes, then low bytes
        pair = 8 * step[None, :, None] + c[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]
        at = arcs_ptr + (group * D + pair)
        arc_bytes = (arc << 4) | exponent
        tl.store(at, ((arc_bytes >> 8) & 0xFF).to(tl.uint8))
        tl.store(at + D // 2, (arc_bytes & 0xFF).to(tl.uint8))
        step_width, gain = arc_step(exponent, T_BITS)
        radius_min = (low * gain).to(tl.float16)
        radius_scale = ((high - low) * gain * (1.0 / (1 << R_BITS))).to(tl.float16)
        radius = radius * spread(gain, R)
        codes = _codes(angle, arc.to(tl.float32) * (TAU / 4096) - middle, step_width, T_BITS)
    else:
        zero = start + (middle + PI)
        if ARC == SMALLEST:
            zero -= TAU * whole(zero * (1 / TAU))
        radius_min = low.to(tl.float16)
        radius_scale = ((high - low) * (1.0 / (1 << R_BITS))).to(tl.float16)
        angle_zero = zero.to(tl.float16)
        angle_scale = ((stop - start) * (1.0 / (1 << T_BITS))).to(tl.float16)
        # Only the rounding error moves the zero, so no angle can leave by the other end.
        relative_zero = start + (angle_zero.to(tl.float32) - zero)
        codes = _codes(angle, relative_zero, angle_scale.to(tl.float32), T_BITS)
    radius_code = _codes(radius, radius_min.to(tl.float32), radius_scale.to(tl.float32), R_BITS)
    codes += radius_code << T_BITS
    codes_a, codes_b = tl.split(codes)
    words = codes_a + (codes_b << 8)
    store_words(codes_ptr, words, step, first_step, D, R_BITS + T_BITS, TILES, STEPS)

    if ARC == WHOLE:
        # [groups, 2 kinds, pairs]
        at = parameters_ptr + (group * D + pair)
        tl.store(at, radius_min)
        tl.store(at + D // 2, radius_scale)
    else:
        # [groups, 4 kinds, pair % 8, pair // 8]; here [NG, C, pair + 4, angle, scale]
        zeros, scales = tl.join(radius_min, angle_zero), tl.join(radius_scale, angle_scale)
        place = group * (2 * D) + step[None, :, None]
        place += (c[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]) * (D // 16)
        place = place[:, :, :, None, None]
        place += tl.arange(0, 2)[None, None, None, :, None] * D
        place += tl.arange(0, 2)[None, None, None, None, :] * (D // 2)
        tl.store(parameters_ptr + place, tl.join(zeros, scales))
    fine = tl.maximum(high, radius_min.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    refused = tl.where(fine <= FP16_MAX, 0, 1)
    tl.store(flag_ptr + tl.zeros([NG, C, 2], tl.int32), refused, mask=refused != 0)
