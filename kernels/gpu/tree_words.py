"""Recursive codec with 4-2-2-2 bits: device functions that code whole trees into words.

Math: kernels/polar/README.md, section 2. Reference: kernels/polar/recursive.py.

A comparison is the sign of a difference, which one instruction shifts into a word of such signs.
Each halves the angles that are left, mirrored where the one before was true: the signs of a code
are its Gray code, and a few instructions turn the Gray codes of a word into codes at once.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.tree import ENTRIES, TAN_1


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
def _with_sign(word, number):
    """Shifts a word left by one and puts the sign of an fp32 number there."""
    return (word << 1) | (number.to(tl.uint32, bitcast=True) >> 31)


@triton.jit
def first_word(channels):
    """Codes level 1 of trees.

    Args:
        channels: sixteen of fp32 [M, B].

    Returns:
        word: int32 [M, B], 4-bit codes floor(16 angle / 2 pi), the first one lowest.
        squares: eight of fp32 [M, B], squares of radii.
    """
    squares = ()
    for index in tl.static_range(8):
        x, y = channels[index], channels[8 + index]
        squares += (x * x + y * y,)
    # Whatever is in the word at first is shifted out.
    word = channels[0].to(tl.uint32, bitcast=True)
    for back in tl.static_range(8):
        x, y = channels[7 - back], channels[15 - back]
        difference = tl.abs(x) - tl.abs(y)
        word = _with_sign(_with_sign(word, y), x)
        word = _with_sign(word, difference)
        # Next to the diagonal of the quadrant.
        word = _with_sign(word, tl.abs(difference) - (tl.abs(x) + tl.abs(y)) * TAN_1)
    word ^= (word >> 1) & 0x77777777
    word ^= (word >> 2) & 0x33333333
    return word.to(tl.int32, bitcast=True), squares


@triton.jit
def next_word(squares, BOUNDS: tl.constexpr):
    """Codes levels 2 to 4 of trees, whose codes lie symmetrically about pi / 4.

    Args:
        squares: squares of radii, eight of fp32 [M, B].
        BOUNDS: squared tangents of the angles between codes, ENTRIES for each level.

    Returns:
        word: int32 [M, B], 2-bit codes: level 4 at bit 0, level 3 from bit 2 and level 2 from bit
            6 on, the first code of a level lowest.
        square: fp32 [M, B], squares of the radii of trees.
    """
    word = tl.zeros(squares[0].shape, tl.uint32)
    for level in tl.static_range(1, 4):
        word, squares = _level_signs(word, squares, BOUNDS[ENTRIES * level], 8 >> level)
    word ^= (word >> 1) & 0x1555
    return word.to(tl.int32, bitcast=True), squares[0]


@triton.jit
def _level_signs(word, squares, BOUND: tl.constexpr, NODES: tl.constexpr):
    """Shifts signs of NODES nodes into a word; returns it and the sums of their squares."""
    # |first - second| / (first + second) at the first bound and at the last.
    SHARE: tl.constexpr = (1 - BOUND) / (1 + BOUND)
    sums = ()
    for index in tl.static_range(NODES):
        sums += (squares[index] + squares[NODES + index],)
    for back in tl.static_range(NODES):
        difference = squares[NODES - 1 - back] - squares[2 * NODES - 1 - back]
        word = _with_sign(word, difference)
        word = _with_sign(word, tl.abs(difference) - sums[NODES - 1 - back] * SHARE)
    return word, sums
