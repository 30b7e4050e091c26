"""Recursive codec with 4-2-2-2 bits: device functions that code whole trees into words.

Math: kernels/polar/README.md, section 2. Reference: kernels/polar/recursive.py.

A comparison is the sign of a difference, which one instruction shifts into a word of such signs,
code by code; the words of all comparisons of a level then become its codes at once.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.tree import ENTRIES, TAN_1, TAN_3


@triton.jit
def channels_of_trees(numbers, B: tl.constexpr):
    """Splits rows fp32 [M, 16 B] into channels of B trees: sixteen of [M, B]."""
    parts = (
        tl.permute(tl.reshape(numbers, [numbers.shape[0], 2, 2, 2, 2, B]), (0, 5, 1, 2, 3, 4)),
    )
    # The last bit of a channel's number goes first.
    for index in tl.static_range(4):
        parts = _split_all(parts, 1 << index)
    return parts


@triton.jit
def _split_all(parts, COUNT: tl.constexpr):
    """Splits tensors in two by their last axis: all first parts, then all second ones."""
    firsts = ()
    seconds = ()
    for index in tl.static_range(COUNT):
        first, second = tl.split(parts[index])
        firsts += (first,)
        seconds += (second,)
    return firsts + seconds


@triton.jit
def _with_sign(word, number, BITS: tl.constexpr):
    """Shifts a word left by BITS and puts the first bits of an fp32 number there."""
    return (word << BITS) | (number.to(tl.uint32, bitcast=True) >> (32 - BITS))


@triton.jit
def first_words(channels):
    """Codes level 1 of trees.

    Args:
        channels: sixteen of fp32 [M, B].

    Returns:
        words: int32 [M, B], 4-bit codes floor(16 angle / 2 pi), the first one lowest.
        squares: eight of fp32 [M, B], squares of radii.
    """
    squares = ()
    for index in tl.static_range(8):
        x, y = channels[index], channels[8 + index]
        squares += (x * x + y * y,)
    # Whatever is in the words at first is shifted out.
    backwards = channels[0].to(tl.uint32, bitcast=True)
    below, upper, odd_lower, odd_upper = backwards, backwards, backwards, backwards
    for back in tl.static_range(8):
        x, y = channels[7 - back], channels[15 - back]
        width, height = tl.abs(x), tl.abs(y)
        upper = _with_sign(upper, width - height, 4)
        odd_lower = _with_sign(odd_lower, tl.fma(width, TAN_1, -height), 4)
        odd_upper = _with_sign(odd_upper, tl.fma(width, TAN_3, -height), 4)
        backwards = _with_sign(backwards, x, 4)
        below = _with_sign(below, y, 4)
    # Quadrants 1 and 3 count backwards.
    backwards = backwards ^ below
    odd = (upper & odd_upper) | ((upper ^ 0xFFFFFFFF) & odd_lower)
    words = (below & 0x88888888) | ((backwards & 0x88888888) >> 1)
    words |= ((upper ^ backwards) & 0x88888888) >> 2
    words |= ((odd ^ backwards) & 0x88888888) >> 3
    return words.to(tl.int32, bitcast=True), squares


@triton.jit
def next_words(squares, BOUNDS: tl.constexpr, LEVEL: tl.constexpr):
    """Codes a level of 2-bit codes above the first.

    Args:
        squares: squares of radii, 16 >> LEVEL of fp32 [M, B].
        BOUNDS: squared tangents of the angles between codes, ENTRIES for each level.
        LEVEL: 1 for the second level.

    Returns:
        words: int32 [M, B], 2-bit codes, the first one lowest.
        squares: half as many.
    """
    NODES: tl.constexpr = 8 >> LEVEL
    sums = ()
    for index in tl.static_range(NODES):
        sums += (squares[index] + squares[NODES + index],)
    low = squares[0].to(tl.uint32, bitcast=True)
    middle, high = low, low
    for back in tl.static_range(NODES):
        first, second = squares[NODES - 1 - back], squares[2 * NODES - 1 - back]
        low = _with_sign(low, tl.fma(first, BOUNDS[ENTRIES * LEVEL], -second), 2)
        middle = _with_sign(middle, tl.fma(first, BOUNDS[ENTRIES * LEVEL + 1], -second), 2)
        high = _with_sign(high, tl.fma(first, BOUNDS[ENTRIES * LEVEL + 2], -second), 2)
    odd = (middle & high) | ((middle ^ 0xFFFFFFFF) & low)
    FIRST_BITS: tl.constexpr = 0xAA & ((1 << (2 * NODES)) - 1)
    words = (middle & FIRST_BITS) | ((odd & FIRST_BITS) >> 1)
    return words.to(tl.int32, bitcast=True), sums
