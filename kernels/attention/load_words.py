"""Codes of chosen tokens from packed slices: device functions.

The kernels of `polarcache.kernels.gpu` take words in the order in which they lie. Here a row is a
token, in natural order, so that every codec gives scores and values in the same order; a word that
two or four rows share is read by each of them, from the first-level cache. Where codes lie:
kernels/polar/README.md, section 4.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.words import turned, word_offset


@triton.jit
def as_mantissa(codes, one):
    """Returns 1 + code / 128 in fp32 for int32 codes below 128, without a conversion.

    `one` is 0x3F800000, the bits of 1.0, in a register: masking and merging are then one
    instruction, which takes a single constant.
    """
    return ((codes << 16) | one).to(tl.float32, bitcast=True)


@triton.jit
def _by_columns(unit, offset):
    """Returns words to load from bytes of a unit, so that a warp takes the columns of few rows."""
    return tl.multiple_of(tl.max_contiguous(unit + offset // 4, [1, 2]), [1, 1])


@triton.jit
def stream_codes(codes_ptr, index, BITS: tl.constexpr):
    """Returns int32 codes `index` of a dense stream of BITS-bit codes that starts at codes_ptr."""
    bit = index * BITS
    at = codes_ptr + bit // 8
    shift = bit % 8
    codes = tl.load(at).to(tl.int32)
    if 8 % BITS != 0:
        more = tl.load(at + 1, mask=shift + BITS > 8, other=0).to(tl.int32)
        codes = codes | (more << 8)
    return (codes >> shift) & ((1 << BITS) - 1)


@triton.jit
def _four_codes(codes_ptr, head, first_token, row, lane, step, T: tl.constexpr, D: tl.constexpr,
                BITS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Returns int32 words whose bytes hold, in their low BITS, the four codes of a lane's step.

    Args:
        codes_ptr: uint8, first byte of a field of one code a pair in whole units.
        head: KV head.
        first_token: token of row 0, a multiple of the rows.
        row: int32 [tokens], 0 and up.
        lane: int32 [tokens, columns].
        step: int32 [columns], below D / 16.
        T: tokens of the slice.
        D: channels, two a code.
        BITS: bits of a code.
        TILES: tiles of a unit.
    """
    STEPS: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * STEPS * BITS // 8
    words_ptr = (codes_ptr + head * (T * STEPS * BITS)).to(tl.pointer_type(tl.int32))
    ROWS: tl.constexpr = row.shape[0]
    if ROWS % (16 * TILES) == 0:
        # Whole units: all that differs from tile to tile is where they begin.
        words_ptr += first_token // (16 * TILES) * (32 * NUM_WORDS)
        tile = row // 16
    else:
        tile = (first_token + row) // 16
    unit = (tile // TILES * (32 * NUM_WORDS))[:, None]
    place = ((tile % TILES * STEPS)[:, None] + step[None, :]) * BITS  # first bit in the stream
    word, shift = place // 8, place % 8
    low = turned(tl.load(words_ptr + _by_columns(unit, word_offset(word, lane, NUM_WORDS))), 30)
    if 8 % BITS == 0:
        four = low >> shift
    else:
        # A code may go on in the next word.
        at = words_ptr + _by_columns(unit, word_offset(word + 1, lane, NUM_WORDS))
        high = turned(tl.load(at, mask=shift + BITS > 8, other=0), 30)
        low = (low >> shift) & ((0xFF >> shift) * 0x01010101)
        four = low | ((high << (8 - shift)) & (((0xFF << (8 - shift)) & 0xFF) * 0x01010101))
    return four


@triton.jit
def pair_codes(codes_ptr, head, first_token, row, step, column, T: tl.constexpr, D: tl.constexpr,
               BITS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Returns codes of pairs 8 step + column, and of those 4 further: int32 [tokens, steps] twice.

    Args:
        codes_ptr: uint8, first byte of the field.
        head: KV head.
        first_token: token of row 0, a multiple of the rows.
        row: int32 [tokens], 0 and up; rows beyond the slice repeat its last token.
        step: int32 [steps], below D / 16.
        column: int32 [steps], 0 to 3.
        T: tokens of the slice.
        D: channels, two a code.
        BITS: bits of a code.
        TILES: tiles of a unit in pair order; 0 for plain rows.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if TILES == 0:
        token = tl.minimum(first_token + row, T - 1)
        index = (head * T + token)[:, None] * (D // 2) + (8 * step + column)[None, :]
        return stream_codes(codes_ptr, index, BITS), stream_codes(codes_ptr, index + 4, BITS)
    else:
        lane = (row % 8 * 4)[:, None] + column[None, :]
        four = _four_codes(codes_ptr, head, first_token, row, lane, step, T, D, BITS, TILES)
        shift = (row // 8 % 2 * 8)[:, None]
        return (four >> shift) & MASK, (four >> (shift + 16)) & MASK


@triton.jit
def value_pair_codes(codes_ptr, head, first_token, row, step, column, T: tl.constexpr,
                     D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Returns codes of pairs 8 step + column, int32 [tokens, steps]; column is 0 to 7.

    Args as `pair_codes` has them, for fields in pair-of-channels order.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if TILES == 0:
        token = tl.minimum(first_token + row, T - 1)
        index = (head * T + token)[:, None] * (D // 2) + (8 * step + column)[None, :]
        return stream_codes(codes_ptr, index, BITS)
    else:
        lane = (row % 8 // 2)[:, None] + (column * 4)[None, :]
        four = _four_codes(codes_ptr, head, first_token, row, lane, step, T, D, BITS, TILES)
        return (four >> (row % 2 * 8 + row // 8 % 2 * 16)[:, None]) & MASK


@triton.jit
def table_halves(table_ptr, codes):
    """Returns the low and high halves, fp16, of entries `codes` of an int32 table."""
    words = tl.load(table_ptr + codes)
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def channel_codes(codes_ptr, head, first_token, row, block, column, T: tl.constexpr,
                  D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Returns codes of channels 16 block + column, and of those 8 further: int32, twice.

    Args:
        codes_ptr: uint8, first byte of the field.
        head: KV head.
        first_token: token of row 0, a multiple of the rows.
        row: int32 [tokens], 0 and up; rows beyond the slice repeat its last token.
        block: int32 [columns], below D / 16.
        column: int32 [columns], 0 to 7.
        T: tokens of the slice.
        D: channels, one a code.
        BITS: bits of a code, 4 or 2.
        TILES: tiles of a unit in channel order; 0 for plain rows.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if TILES == 0:
        token = tl.minimum(first_token + row, T - 1)
        index = (head * T + token)[:, None] * D + (16 * block + column)[None, :]
        return stream_codes(codes_ptr, index, BITS), stream_codes(codes_ptr, index + 8, BITS)
    else:
        BLOCKS: tl.constexpr = D // 16
        NUM_WORDS: tl.constexpr = TILES * BLOCKS * BITS // 4
        words_ptr = (codes_ptr + head * (T * D * BITS // 8)).to(tl.pointer_type(tl.int32))
        ROWS: tl.constexpr = row.shape[0]
        if ROWS % (16 * TILES) == 0:
            words_ptr += first_token // (16 * TILES) * (32 * NUM_WORDS)
            token = row
        else:
            token = first_token + row
        tile = token // 16
        unit = (tile // TILES * (32 * NUM_WORDS))[:, None]
        lane = (token % 8 // 2)[:, None] + (column * 4)[None, :]
        place = (tile % TILES * BLOCKS)[:, None] + block[None, :]
        at = words_ptr + _by_columns(unit, word_offset(place * BITS // 4, lane, NUM_WORDS))
        shift = (token % 2 * 16 + token // 8 % 2 * (2 * BITS))[:, None]
        if BITS == 2:
            shift = shift + place % 2 * 8
        words = tl.load(at) >> shift
        return words & MASK, (words >> BITS) & MASK
