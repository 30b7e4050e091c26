"""Universal polar codec: device functions that code mixed rows and give them back.

Math: kernels/polar/README.md, section 3. Reference: kernels/polar/universal.py.

Columns of a matrix product stand in the order of `pair_columns`, so that a thread of the tensor
cores holds, of keys, all four codes of a lane's word.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.pair_encode import HALF, TAU, polar
from polarcache.kernels.gpu.rotate import look_up
from polarcache.kernels.gpu.tree import bisected
from polarcache.kernels.gpu.words import ROUNDER, ROUNDER_BITS, load_words, store_words, turned

# The square of a pair of zeros is 1e-37 in `polar`; a row of zeros has none of its own.
_NOTHING = tl.constexpr(1e-34)


@triton.jit
def _cosine(turn, FEWEST: tl.constexpr):
    """Returns the cosine, within 1e-7, of at most half a step of FEWEST phases: Taylor series."""
    w = turn * turn
    q = w * (-1.0 / 720) + 1.0 / 24
    if FEWEST < 16:
        higher = w * (1.0 / 479001600) - 1.0 / 3628800
        if FEWEST < 3:
            higher -= w * w * (1.0 / 87178291200)
        q += w * w * (higher * w + 1.0 / 40320)
    return (q * w - 0.5) * w + 1.0


@triton.jit
def encode_pairs_of_rows(
    first,
    second,
    known,
    radii,
    counts,
    D: tl.constexpr,
    RING_BITS: tl.constexpr,
    BOUNDS: tl.constexpr,
    FEWEST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Codes mixed rows.

    Args:
        first: fp32 [M, P], the first channel of each pair.
        second: likewise the second.
        known: pairs that there are, bool [1, P]; read with MASKED.
        radii: radii of the rings, fp32 [2**RING_BITS].
        counts: of each ring, code of its first point | points << 16, int32 [2**RING_BITS].
        D: channels of a row.
        RING_BITS: bits of a ring's number.
        BOUNDS: squares of the radii between rings, in units of the RMS channel.
        FEWEST: points of the smallest ring whose radius is not 0.
        MASKED: whether there are columns without pairs.

    Returns:
        codes: int32 [M, P].
        gains: fp32 [M, 1], in units of the numbers given; NaN where one is not finite.
    """
    square, radius, angle = polar(first, second, True)
    summed = square
    if MASKED:
        summed = tl.where(known, square, 0.0)
    norm = tl.sum(summed, 1, keep_dims=True)
    # A row of zeros is below every bound.
    ring = bisected(square, tl.maximum(norm * (1.0 / D), _NOTHING), BOUNDS, 0, RING_BITS)
    found = look_up(counts, ring)
    count = (found >> 16).to(tl.float32)
    # Rounding half a step lower is the floor; whole numbers need a nudge.
    steps = angle * (count * (1 / TAU)) + (count * 0.5 - HALF)
    place = tl.minimum(tl.maximum(steps + ROUNDER, ROUNDER), (count - 1) + ROUNDER)
    turn = (steps - (place - ROUNDER)) * (TAU / count)
    part = radius * look_up(radii, ring) * _cosine(turn, FEWEST)
    if MASKED:
        part = tl.where(known, part, 0.0)
    total = tl.sum(part, 1, keep_dims=True)
    # NaN is not below anything, so it stays.
    gains = tl.where(norm <= _NOTHING, 0.0, norm / total)
    codes = (found & 0xFFFF) + (place.to(tl.int32, bitcast=True) - ROUNDER_BITS)
    return codes, gains


@triton.jit
def store_key_codes(codes_ptr, codes, D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):
    """Stores codes int32 [M, P] of whole units of one head; column 8k + 2c + h is pair 8k + 4h + c.

    P is D / 2, or above it a power of two; steps above D / 16 repeat the last one.
    """
    M: tl.constexpr = codes.shape[0]
    P: tl.constexpr = codes.shape[1]
    # [tile, token + 8, g, step, c, pair + 4]
    low, high = tl.split(tl.reshape(codes, [M // 16, 2, 8, P // 8, 4, 2]))
    low, high = tl.split(tl.permute(low | (high << 16), (0, 2, 3, 4, 1)))
    _store(codes_ptr, low | (high << 8), D, BITS, TILES)


@triton.jit
def store_value_codes(codes_ptr, codes, D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):
    """The same of values; column 8k + g is pair 8k + g."""
    M: tl.constexpr = codes.shape[0]
    P: tl.constexpr = codes.shape[1]
    # [tile, token + 8, c, token + 1, step, g]
    codes = tl.reshape(codes.to(tl.uint8), [M // 16, 2, 4, 2, P // 8, 8])
    low, high = tl.split(tl.permute(codes, (0, 2, 5, 4, 1, 3)))
    low_0, low_8 = tl.split(low)
    high_0, high_8 = tl.split(high)
    words = low_0.to(tl.int32) | (high_0.to(tl.int32) << 8)
    words |= (low_8.to(tl.int32) << 16) | (high_8.to(tl.int32) << 24)
    _store(codes_ptr, tl.permute(words, (0, 2, 3, 1)), D, BITS, TILES)


@triton.jit
def _store(codes_ptr, words, D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):
    """Stores words [tile, g, step, c]."""
    R: tl.constexpr = words.shape[0] * 8
    STEPS: tl.constexpr = words.shape[2]
    if BITS == 8 and TILES == 1 and STEPS * 16 == D and STEPS % 4 == 0:
        # [tile, chunk, g, c, word of the chunk] is the order in memory.
        lanes = tl.reshape(turned(words, 2), [R // 8, 8, STEPS // 4, 4, 4])
        lanes = tl.reshape(tl.permute(lanes, (0, 2, 1, 4, 3)), [R * 4 * STEPS])
        tl.store(codes_ptr + tl.arange(0, R * 4 * STEPS), lanes)
    else:
        step = tl.minimum(tl.arange(0, 4 * STEPS) // 4, D // 16 - 1)
        store_words(codes_ptr, tl.reshape(words, [R, 4 * STEPS]), step, 0, D, BITS, TILES, D // 16)


@triton.jit
def pairs_of_words(words, table):
    """Looks up both channels of the pairs of words, fp16 [R, C, 2, 2], by one table of all codes.

    Args:
        words: int32 [M / 2, 4 steps], one code a byte, as load_words returns them; the last axes
            are, of keys, pair + 4 and token + 8, of values token + 8 and token + 1.
        table: int32 [256], first channel of a code in the low half.
    """
    codes = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24)) & 0xFF
    both = look_up(table, codes)
    first = both.to(tl.int16).to(tl.float16, bitcast=True)
    second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return first, second


@triton.jit
def load_lanes(
    codes_ptr, R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr
):
    """Loads words [R, 4 steps], one code a byte, of whole units of all steps of one head."""
    STEPS: tl.constexpr = triton.next_power_of_2(D // 16)
    if BITS == 8 and TILES == 1 and STEPS * 16 == D and STEPS % 4 == 0:
        # As the lanes of the tensor cores hold them: 16 bytes a thread, and no exchange for keys.
        lanes = tl.load(codes_ptr + tl.arange(0, R * 4 * STEPS))
        lanes = tl.reshape(lanes, [R // 8, STEPS // 4, 8, 4, 4])
        lanes = tl.permute(turned(lanes, 30), (0, 2, 1, 4, 3))
        return tl.reshape(lanes, [R, 4 * STEPS])
    else:
        step = tl.minimum(tl.arange(0, 4 * STEPS) // 4, D // 16 - 1)
        return load_words(codes_ptr, step, R, D, BITS, TILES)


@triton.jit
def rows_of_words(numbers, KEY: tl.constexpr):
    """Orders numbers of words [R, C, 2, 2] as rows and columns: [2 R, 2 C], as store_key_codes."""
    R: tl.constexpr = numbers.shape[0]
    C: tl.constexpr = numbers.shape[1]
    numbers = tl.reshape(numbers, [R // 8, 8, C // 4, 4, 2, 2])
    if KEY:
        # to [tile, token + 8, g, step, c, pair + 4]
        numbers = tl.permute(numbers, (0, 5, 1, 2, 3, 4))
    else:
        # to [tile, token + 8, c, token + 1, step, g]
        numbers = tl.permute(numbers, (0, 4, 3, 5, 2, 1))
    return tl.reshape(numbers, [2 * R, 2 * C])


@triton.jit
def pair_of(channel, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns the pairs of channels: the inverse of pair_channels."""
    if INTERLEAVED:
        return channel // 2
    elif ROTARY == D or ROTARY == 0:
        return channel % (D // 2)
    else:
        rest = ROTARY // 2 + (channel - ROTARY) % ((D - ROTARY) // 2)
        return tl.where(channel < ROTARY, channel % (ROTARY // 2), rest)
