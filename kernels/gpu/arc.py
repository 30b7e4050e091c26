"""Arcs of a group's angles: device functions. Reference: kernels/polar/pair.py, arcs.py."""

import triton
import triton.language as tl

from polarcache.kernels.gpu.words import whole
from polarcache.kernels.polar.arcs import MAX_ARC_EXPONENT as _MAX_ARC_EXPONENT
from polarcache.kernels.polar.arcs import START_BITS as _START_BITS
from polarcache.kernels.polar.pair import NUM_SECTORS as _NUM_SECTORS

# Kinds of ranges of angles, numbers since Triton 3.6 takes no text out of a constexpr tuple.
MINMAX = tl.constexpr(0)
SMALLEST = tl.constexpr(1)
WHOLE = tl.constexpr(2)  # of `arc2`: a power of two of a turn
NUM_SECTORS = tl.constexpr(_NUM_SECTORS)
ALL_SECTORS = tl.constexpr((1 << _NUM_SECTORS) - 1)
MAX_ARC_EXPONENT = tl.constexpr(_MAX_ARC_EXPONENT)
STARTS = tl.constexpr(1 << _START_BITS)
PI = tl.constexpr(3.141592653589793)
TAU = tl.constexpr(6.283185307179586)


@triton.jit
def sectors(angle, present):
    """Returns uint32 sets with the sector of each angle in [-pi, pi].

    They are empty where not present, a bool of that shape or None. An angle of pi is in sector 0.
    """
    tl.static_assert(NUM_SECTORS == 32, "sets are rotated as 32-bit words")
    # Between 64 and 96, where fp32 numbers have 17 bits behind the point.
    place = angle * (NUM_SECTORS / TAU) + (64 + NUM_SECTORS // 2)
    sector = place.to(tl.uint32, bitcast=True) >> 17  # bits above the lower five are the same
    ones = tl.full(angle.shape, 1, tl.uint32)
    if present is not None:
        ones = tl.where(present, ones, 0)
    # A rotation, which one instruction does.
    return (ones << (sector & 31)) | (ones >> ((32 - sector) & 31))


@triton.jit
def _rotated(bits, count):
    return (bits >> count) | (bits << ((32 - count) & 31))


@triton.jit
def arc_middle(occupied, start, stop):
    """Finds the middle of the smallest arc that holds all angles of a group.

    Args:
        occupied: uint32 sets of sectors.
        start: fp32 smallest angle, in [-pi, pi], of the same shape.
        stop: fp32 largest angle, likewise.

    Returns:
        fp32 in [-pi, 2 pi); 0 where the gap at -pi is at least the longest run of empty sectors.
    """
    empty = occupied ^ ALL_SECTORS
    run_2 = empty & _rotated(empty, 1)
    run_4 = run_2 & _rotated(run_2, 2)
    run_8 = run_4 & _rotated(run_4, 4)
    run_16 = run_8 & _rotated(run_8, 8)
    begins = tl.full(empty.shape, ALL_SECTORS, tl.uint32)
    length = tl.zeros(empty.shape, tl.uint32)
    begins, length = _longer(begins, length, run_16, 16)
    begins, length = _longer(begins, length, run_8, 8)
    begins, length = _longer(begins, length, run_4, 4)
    begins, length = _longer(begins, length, run_2, 2)
    begins, length = _longer(begins, length, empty, 1)
    # A single set bit is a power of two, whose fp32 exponent is its place.
    lowest = (begins & ((begins ^ ALL_SECTORS) + 1)).to(tl.float32).to(tl.int32, bitcast=True)
    first = ((lowest >> 23) - 127).to(tl.float32)
    length = length.to(tl.float32)
    gap_at_cut = (TAU - (stop - start)) * (NUM_SECTORS / TAU)
    middle = (first + 0.5 * (length + NUM_SECTORS)) * (TAU / NUM_SECTORS) - PI
    return tl.where(gap_at_cut < length, middle, 0.0)


@triton.jit
def _longer(begins, length, runs, LENGTH: tl.constexpr):
    """Keeps the begins whose run goes on for LENGTH more sectors, where there are any."""
    longer = begins & _rotated(runs, length)
    found = longer != 0
    return tl.where(found, longer, begins), tl.where(found, length + LENGTH, length)


@triton.jit
def whole_arc(middle, start, stop):
    """Widens an arc to a power of two of a turn.

    Args:
        middle: fp32, what the angles of a group are relative to.
        start: fp32 smallest relative angle, of the same shape.
        stop: fp32 largest relative angle, likewise.

    Returns:
        arc: int32, the arc's start in units of 1 / STARTS turns, of any whole turn.
        exponent: int32; the arc is 2**-exponent turns wide.
    """
    turns = tl.maximum((stop - start) * (1 / TAU), 2.0**-20)
    # frexp: turns are less than 2**(stored exponent - 126), and at least half of that.
    exponent = 126 - (turns.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.minimum(tl.maximum(exponent, 0), MAX_ARC_EXPONENT)
    width = power(exponent) * TAU
    place = (middle + (start + stop) * 0.5 - width * 0.5) * (STARTS / TAU)
    return whole(place).to(tl.int32), exponent


@triton.jit
def power(exponent):
    """Returns 2**-exponent, fp32, of int32 exponents from 0 to 126."""
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def arc_step(exponent, T_BITS: tl.constexpr):
    """Returns the step of angle codes on an arc of 2**-exponent turns, and the gain of radii.

    The gain is h / sin h of half a step h, at most pi / 2: the inverse of a Taylor series.
    """
    step = power(exponent + T_BITS) * TAU
    w = step * step * 0.25
    sine = w * (1.0 / 6227020800) - 1.0 / 39916800
    sine = sine * w + 1.0 / 362880
    sine = sine * w - 1.0 / 5040
    sine = sine * w + 1.0 / 120
    sine = sine * w - 1.0 / 6
    return step, 1.0 / (sine * w + 1.0)
