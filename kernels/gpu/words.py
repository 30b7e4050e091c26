"""Where words lie in a packed unit, and arithmetic that the kernels share."""

import triton
import triton.language as tl

# 1.5 * 2^23: adding it rounds an fp32 number below 2^22 to a whole one, half to even.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)


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
def rounded_codes(offsets, inverse, BITS: tl.constexpr, CLAMP_LOW: tl.constexpr):
    """Returns round(offsets * inverse), clamped to BITS bits, as int32 above ROUNDER_BITS.

    Product and sum are one fused rounding, straight to a whole number.
    """
    place = tl.fma(offsets, inverse, ROUNDER)
    if CLAMP_LOW:
        place = tl.maximum(place, ROUNDER)
    return tl.minimum(place, ROUNDER + ((1 << BITS) - 1)).to(tl.int32, bitcast=True)


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
def _stream_word(steps, WORD: tl.constexpr, BITS: tl.constexpr):
    """Returns word WORD of four streams of eight BITS-bit codes, given one code a byte."""
    word = _share(steps[0], -WORD * 8, BITS)
    for step in tl.static_range(1, 8):
        word |= _share(steps[step], step * BITS - WORD * 8, BITS)
    return word


@triton.jit
def store_words(codes_ptr, words, step, columns_ok, D: tl.constexpr, BITS: tl.constexpr,
                TILES: tl.constexpr):  # fmt: skip
    """Stores words of one head, [rows 8 tile + g, columns 4 step + c], one code of a pair a byte.

    Writes the streams of whole units of TILES tiles: kernels/polar/README.md, section 3.
    """
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    STEPS: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * STEPS * BITS // 8
    if BITS == 8:
        row = tl.arange(0, R)[:, None]
        word = row // 8 % TILES * STEPS + step[None, :]
        lane = row % 8 * 4 + tl.arange(0, C)[None, :] % 4
        at = row // (8 * TILES) * (32 * NUM_WORDS) + word_offset(word, lane, NUM_WORDS) // 4
        ok = None if columns_ok is None else columns_ok[None, :]
        tl.store(codes_ptr + at, turned(words, 2), mask=ok)
    else:
        WIDE: tl.constexpr = TILES * C // 4  # steps of a unit, padding included
        LANES: tl.constexpr = R * 4 // TILES
        lanes = tl.reshape(words, [R // (8 * TILES), TILES, 8, C // 4, 4])
        lanes = tl.reshape(tl.permute(lanes, (0, 2, 4, 1, 3)), [LANES, WIDE])
        if C != 4 * STEPS:
            index = tl.arange(0, WIDE)
            index = tl.minimum(index // STEPS * (C // 4) + index % STEPS, WIDE - 1)
            lanes = tl.gather(lanes, tl.broadcast_to(index[None, :], [LANES, WIDE]), 1)
        even, odd = tl.split(tl.reshape(lanes, [LANES, WIDE // 8, 4, 2]))
        step_04, step_26 = tl.split(tl.reshape(even, [LANES, WIDE // 8, 2, 2]))
        step_15, step_37 = tl.split(tl.reshape(odd, [LANES, WIDE // 8, 2, 2]))
        step_0, step_4 = tl.split(step_04)
        step_2, step_6 = tl.split(step_26)
        step_1, step_5 = tl.split(step_15)
        step_3, step_7 = tl.split(step_37)
        steps = (step_0, step_1, step_2, step_3, step_4, step_5, step_6, step_7)
        lane = tl.arange(0, LANES)[:, None]
        octet = tl.arange(0, WIDE // 8)[None, :]
        unit = codes_ptr + lane // 32 * (32 * NUM_WORDS)
        for index in tl.static_range(BITS):
            at = unit + word_offset(octet * BITS + index, lane % 32, NUM_WORDS) // 4
            word = turned(_stream_word(steps, index, BITS), 2)
            tl.store(at, word, mask=octet < TILES * STEPS // 8)


@triton.jit
def load_words(codes_ptr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    """Loads what store_words stored: int32 [R, C], one code a byte, 0 in columns past the head."""
    STEPS: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * STEPS * BITS // 8
    row = tl.arange(0, R)[:, None]
    column = tl.arange(0, C)[None, :]
    lane = row % 8 * 4 + column % 4
    unit = codes_ptr + row // (8 * TILES) * (32 * NUM_WORDS)
    ok = tl.broadcast_to(column < 4 * STEPS, [R, C])
    place = (row // 8 % TILES * STEPS + column // 4) * BITS  # first bit in the stream
    word, shift = place // 8, place % 8
    low = tl.load(unit + word_offset(word, lane, NUM_WORDS) // 4, mask=ok, other=0)
    low = turned(low, 30)
    if 8 % BITS == 0:
        return (low >> shift) & (((1 << BITS) - 1) * 0x01010101 if BITS < 8 else -1)
    else:
        split = ok & (shift + BITS > 8)
        high = tl.load(unit + word_offset(word + 1, lane, NUM_WORDS) // 4, mask=split, other=0)
        high = turned(high, 30)
        low = (low >> shift) & ((0xFF >> shift) * 0x01010101)
        high = (high << (8 - shift)) & (((0xFF << (8 - shift)) & 0xFF) * 0x01010101)
        return (low | high) & (((1 << BITS) - 1) * 0x01010101)
