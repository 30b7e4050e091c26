"""Where words lie in a packed unit, and arithmetic that the kernels share."""

import triton
import triton.language as tl
from triton.language import target_info

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# 1.5 * 2^23: adding it rounds an fp32 number below 2^22 to a whole one, half to even.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)

# Hints `tl.multiple_of(tl.max_contiguous(offsets, [1, 2]), [1, 1])` give a warp the columns of a
# row, one a thread: Triton orders threads along the longer run and widens accesses by alignment.
# Wider ones would put the columns of a vector, and so what is computed for each of them, into
# every thread. They count only beside the addition that they speak of.


@triton.jit
def word_offset(word, lane, NUM_WORDS: tl.constexpr):
    """Returns the byte of a lane's word in its unit: chunks of four words, then two and one."""
    FULL: tl.constexpr = NUM_WORDS // 4 * 4
    TWO: tl.constexpr = NUM_WORDS % 4 // 2 * 2
    offset = (word // 4) * 512 + lane * 16 + (word % 4) * 4
    if NUM_WORDS % 4 != 0:
        two = FULL * 128 + lane * 8 + (word - FULL) * 4
        one = (FULL + TWO) * 128 + lane * 4
        offset = tl.where(word < FULL, offset, tl.where(word < FULL + TWO, two, one))
    return offset


@triton.jit
def whole(numbers):
    """Rounds fp32 numbers below 2^22 to whole ones, half to even."""
    return (numbers + ROUNDER) - ROUNDER


@triton.jit
def clamped_pair(low, high, BITS: tl.constexpr):
    """Clamps rounded numbers to codes of BITS bits: int32, the codes in its halves.

    Args:
        low: fp32 numbers below 2^15, to each of which ROUNDER was added.
        high: likewise, of that shape.
        BITS: bits of a code.
    """
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    LARGEST: tl.constexpr = (1 << BITS) - 1
    PACKED: tl.constexpr = False if INTERPRETED else target_info.cuda_capability_geq(9, 0)
    if PACKED:
        # The low halves of the patterns are the numbers; one instruction clamps both.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x5410; min.relu.s16x2 $0, t, $3; }",
            "=r,r,r,r",
            [low, high, LARGEST * 0x10001],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low = tl.minimum(tl.maximum(low - ROUNDER_BITS, 0), LARGEST)
        high = tl.minimum(tl.maximum(high - ROUNDER_BITS, 0), LARGEST)
        return low | (high << 16)


@triton.jit
def turned(words, BITS: tl.constexpr):
    """Turns int32 words left by BITS."""
    return (words << BITS) | ((words >> (32 - BITS)) & ((1 << BITS) - 1))


@triton.jit
def reciprocal(scale):
    """Returns 1 / scale, and 0 for a scale of 0: a group of one single number has code 0."""
    return tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)


@triton.jit
def token_rows(slots_ptr, slice_index, tokens, stride_n, stride_t, T: tl.constexpr):
    """Returns element offsets, int64, of tokens of one slice.

    Tokens lie stride_t apart in slice `slice_index`, or anywhere: then slots_ptr, int64 [N, T],
    names the row of every token.
    """
    if slots_ptr is None:
        return slice_index * stride_n + tokens.to(tl.int64) * stride_t
    else:
        return tl.load(slots_ptr + slice_index * T + tokens) * stride_t


@triton.jit
def _share(codes, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Returns the part of BITS-bit codes, one a byte, that lies in bytes SHIFT bits below."""
    if SHIFT >= 8 or SHIFT <= -BITS:
        share = tl.zeros(codes.shape, tl.int32)
    elif SHIFT >= 0:
        KEPT: tl.constexpr = ((1 << BITS) - 1) & (0xFF >> SHIFT)
        share = (codes & (KEPT * 0x01010101)) << SHIFT
    else:
        KEPT: tl.constexpr = (1 << (BITS + SHIFT)) - 1
        share = (codes >> -SHIFT) & (KEPT * 0x01010101)
    return share


@triton.jit
def store_words(codes_ptr, words, step, first_step, D: tl.constexpr, BITS: tl.constexpr,
                TILES: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """Stores words of one head, [rows 8 tile + g, columns 4 k + c], one code of a pair a byte.

    Writes the streams of whole units of TILES tiles: kernels/polar/README.md, section 4. Column k
    is step `step[4 k]`. Of fewer than 8 bits, 8 steps fill whole words, and 4 of an even number.
    """
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    ALL: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * ALL * BITS // 8
    if BITS == 8:
        row = tl.arange(0, R)[:, None]
        word = row // 8 % TILES * ALL + step[None, :]
        lane = row % 8 * 4 + tl.arange(0, C)[None, :] % 4
        at = row // (8 * TILES) * (32 * NUM_WORDS) + word_offset(word, lane, NUM_WORDS) // 4
        at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])
        tl.store(codes_ptr + at, turned(words, 2))
    else:
        PACK: tl.constexpr = 8 if BITS % 2 else 4
        WIDE: tl.constexpr = TILES * C // 4  # steps of a unit, padding included
        LANES: tl.constexpr = R * 4 // TILES
        lanes = tl.reshape(words, [R // (8 * TILES), TILES, 8, C // 4, 4])
        lanes = tl.reshape(tl.permute(lanes, (0, 2, 4, 1, 3)), [LANES, WIDE])
        if C != 4 * STEPS:
            index = tl.arange(0, WIDE)
            index = tl.minimum(index // STEPS * (C // 4) + index % STEPS, WIDE - 1)
            lanes = tl.gather(lanes, tl.broadcast_to(index[None, :], [LANES, WIDE]), 1)
        lane = tl.arange(0, LANES)[:, None]
        place = tl.arange(0, WIDE // PACK)[None, :]
        known = tl.broadcast_to(place < TILES * STEPS // PACK, [LANES, WIDE // PACK])
        place = (place + first_step // PACK) * (PACK * BITS // 8)
        unit = codes_ptr + lane // 32 * (32 * NUM_WORDS)
        steps = _eight(lanes) if PACK == 8 else _four(lanes)
        for index in tl.static_range(PACK * BITS // 8):
            at = unit + word_offset(place + index, lane % 32, NUM_WORDS) // 4
            word = _share(steps[0], -index * 8, BITS)
            for other in tl.static_range(1, PACK):
                word |= _share(steps[other], other * BITS - index * 8, BITS)
            tl.store(at, turned(word, 2), mask=known)


@triton.jit
def _four(lanes):
    """Splits [LANES, WIDE] into its columns by their number modulo 4: [LANES, WIDE / 4] each."""
    LANES: tl.constexpr = lanes.shape[0]
    WIDE: tl.constexpr = lanes.shape[1]
    even, odd = tl.split(tl.reshape(lanes, [LANES, WIDE // 4, 2, 2]))
    column_0, column_2 = tl.split(even)
    column_1, column_3 = tl.split(odd)
    return column_0, column_1, column_2, column_3


@triton.jit
def _eight(lanes):
    """The same modulo 8."""
    LANES: tl.constexpr = lanes.shape[0]
    WIDE: tl.constexpr = lanes.shape[1]
    even, odd = tl.split(tl.reshape(lanes, [LANES, WIDE // 8, 4, 2]))
    column_0, column_2, column_4, column_6 = _four(tl.reshape(even, [LANES, WIDE // 2]))
    column_1, column_3, column_5, column_7 = _four(tl.reshape(odd, [LANES, WIDE // 2]))
    return (
        column_0, column_1, column_2, column_3, column_4, column_5, column_6, column_7
    )  # fmt: skip


@triton.jit
def load_words(codes_ptr, step, R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    """Loads what store_words stored: int32 [R, C], one code a byte."""
    C: tl.constexpr = step.shape[0]
    ALL: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * ALL * BITS // 8
    row = tl.arange(0, R)[:, None]
    lane = row % 8 * 4 + tl.arange(0, C)[None, :] % 4
    unit_at = row // (8 * TILES) * (32 * NUM_WORDS)
    place = (row // 8 % TILES * ALL + step[None, :]) * BITS  # first bit in the stream
    word, shift = place // 8, place % 8
    at = unit_at + word_offset(word, lane, NUM_WORDS) // 4
    at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])
    low = turned(tl.load(codes_ptr + at), 30)
    if BITS == 8:
        return low
    elif BITS == 4:
        return (low >> shift) & 0x0F0F0F0F
    else:
        # A code may go on in the next word.
        more = tl.broadcast_to(shift + BITS > 8, [R, C])
        at = unit_at + word_offset(word + 1, lane, NUM_WORDS) // 4
        at = tl.multiple_of(tl.max_contiguous(at, [1, 2]), [1, 1])
        high = tl.load(codes_ptr + at, mask=more, other=0)
        low = (low >> shift) & ((0xFF >> shift) * 0x01010101)
        high = (turned(high, 30) << (8 - shift)) & (((0xFF << (8 - shift)) & 0xFF) * 0x01010101)
        return (low | high) & (((1 << BITS) - 1) * 0x01010101)
