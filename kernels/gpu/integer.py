"""Integer codec of values: device functions that encode and decode one head of some units.

Source: arXiv 2402.02750, section 3. Math: kernels/values.py, the reference. Order of the codes:
kernels/polar/README.md, section 4.

Tensors are [rows, columns, 2, 2]: row 4 tile + c, column 8 k + g, then token + 8 and token + 1; one
of them holds channels 16 k + g, one channels 16 k + g + 8. So the eight codes of a lane's 16
channels stay in one thread.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.words import (
    ROUNDER,
    clamped_pair,
    reciprocal,
    token_rows,
    word_offset,
)
from polarcache.kernels.polar.pair import FP16_MAX as _FP16_MAX

FP16_MAX = tl.constexpr(_FP16_MAX)


@triton.jit
def _merge(low_a, high_a, low_b, high_b):
    """Merges two ranges; the largest number keeps NaN."""
    return (
        tl.minimum(low_a, low_b),
        tl.maximum(high_a, high_b, propagate_nan=tl.PropagateNan.ALL),
    )


@triton.jit
def _load_tokens(x_ptr, rows_0, rows_1, rows_8, rows_9, channels, ok):
    """Loads fp32 [R, C, token + 8, token + 1]."""
    even = tl.join(_load(x_ptr, rows_0, channels, ok), _load(x_ptr, rows_8, channels, ok))
    odd = tl.join(_load(x_ptr, rows_1, channels, ok), _load(x_ptr, rows_9, channels, ok))
    return tl.join(even, odd).to(tl.float32)


@triton.jit
def _load(x_ptr, rows, channels, ok):
    at = x_ptr + rows[:, None] + channels[None, :]
    if ok is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=ok[None, :], other=0.0)


@triton.jit
def _ranges(low, high, G: tl.constexpr):
    """Returns the ranges [R, G, 2, 2] of G groups of columns of [R, C, 2, 2]."""
    R: tl.constexpr = low.shape[0]
    C: tl.constexpr = low.shape[1]
    if G == 1:
        low, high = tl.reduce((low, high), 1, _merge, keep_dims=True)
    else:
        low = tl.reshape(low, [R, G, C // G, 2, 2])
        high = tl.reshape(high, [R, G, C // G, 2, 2])
        low, high = tl.reduce((low, high), 2, _merge)
    return low, high


@triton.jit
def _spread(numbers, C: tl.constexpr):
    """Repeats numbers of groups, [R, G, 2, 2], for every column: [R, C or 1, 2, 2]."""
    R: tl.constexpr = numbers.shape[0]
    G: tl.constexpr = numbers.shape[1]
    if G == 1:
        return numbers
    else:
        wide = tl.broadcast_to(numbers[:, :, None, :, :], [R, G, C // G, 2, 2])
        return tl.reshape(wide, [R, C, 2, 2])


@triton.jit
def _codes(x, zeros, inverse, BITS: tl.constexpr):
    """Returns codes of [R, C, 2, 2], int32 [R, C, token + 8], those of token + 1 in high halves."""
    places = tl.fma(x - zeros, tl.broadcast_to(inverse, x.shape), ROUNDER)
    even, odd = tl.split(places)
    return clamped_pair(even, odd, BITS)


@triton.jit
def encode_integers(
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Encodes TOKENS tokens of one head; GROUP is D, or 16 times a power of two that divides D.

    Reads: x fp16, bf16 or fp32 at x_ptr (the head's first channel), last dim contiguous.
    Writes: codes and parameters of these tokens, every byte once; a flag where a scale or a zero
    is not finite in fp16.
    Precision: fp32, scale and zero rounded to fp16 before codes are taken from them, half to even.
    """
    BLOCKS: tl.constexpr = D // 16
    C: tl.constexpr = 8 * triton.next_power_of_2(BLOCKS)
    R: tl.constexpr = TOKENS // 4
    NUM_GROUPS: tl.constexpr = D // GROUP
    G: tl.constexpr = triton.next_power_of_2(NUM_GROUPS)
    row = tl.arange(0, R)
    column = tl.arange(0, C)
    block, g = column // 8, column % 8
    channel = block * 16 + g
    ok = None
    if C != 8 * BLOCKS:
        ok = block < BLOCKS
    token = first_token + row // 4 * 16 + row % 4 * 2
    rows_0 = token_rows(slots_ptr, slice_index, token, stride_n, stride_t, T)
    rows_1 = token_rows(slots_ptr, slice_index, token + 1, stride_n, stride_t, T)
    rows_8 = token_rows(slots_ptr, slice_index, token + 8, stride_n, stride_t, T)
    rows_9 = token_rows(slots_ptr, slice_index, token + 9, stride_n, stride_t, T)
    x_0 = _load_tokens(x_ptr, rows_0, rows_1, rows_8, rows_9, channel, ok)
    x_8 = _load_tokens(x_ptr, rows_0, rows_1, rows_8, rows_9, channel + 8, ok)
    low, high = _merge(x_0, x_0, x_8, x_8)
    if C != 8 * BLOCKS and GROUP == D:
        low = tl.where(ok[None, :, None, None], low, float("inf"))
        high = tl.where(ok[None, :, None, None], high, float("-inf"))
    low, high = _ranges(low, high, G)
    largest: tl.constexpr = (1 << BITS) - 1
    zero = low.to(tl.float16)
    # What a division rounds to: a product, corrected by what it leaves.
    span = high - low
    quotient = span * (1.0 / largest)
    scale = tl.fma(tl.fma(quotient, -1.0 * largest, span), 1.0 / largest, quotient).to(tl.float16)

    # [tile, group, c, kind, token + 8, token + 1]
    group = tl.arange(0, G)[None, :, None, None]
    plus_8 = tl.arange(0, 2)[None, None, :, None]
    plus_1 = tl.arange(0, 2)[None, None, None, :]
    tile_row = row[:, None, None, None]
    place = ((tile_row // 4 * NUM_GROUPS + group) * 4 + tile_row % 4) * 8 + plus_8 * 2 + plus_1
    known = tl.broadcast_to(group < NUM_GROUPS, [R, G, 2, 2])
    tl.store(parameters_ptr + place, scale, mask=known)
    tl.store(parameters_ptr + place + 4, zero, mask=known)

    scale32, zero32 = scale.to(tl.float32), zero.to(tl.float32)
    worst = tl.maximum(tl.abs(zero32), scale32, propagate_nan=tl.PropagateNan.ALL)
    fine = (worst <= FP16_MAX) | (tl.broadcast_to(group, [R, G, 2, 2]) >= NUM_GROUPS)
    refused = tl.max(tl.reshape(tl.where(fine, 0, 1), [R * G * 4]), 0)
    if refused > 0:
        tl.store(flag_ptr, 1)

    zeros, inverse = _spread(zero32, C), _spread(reciprocal(scale32), C)
    codes = _codes(x_0, zeros, inverse, BITS) + (_codes(x_8, zeros, inverse, BITS) << BITS)
    tokens_0, tokens_8 = tl.split(codes)
    words = tokens_0 + (tokens_8 << (2 * BITS))
    _store_blocks(codes_ptr, words, D, BITS, TILES)


@triton.jit
def _store_blocks(codes_ptr, words, D: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):
    """Stores words [rows 4 tile + c, columns 8 k + g], the low 4 BITS of each half in use."""
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    BLOCKS: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * BLOCKS * BITS // 4
    if BITS == 2 and BLOCKS % 2 == 0:
        # Two neighbouring blocks share a word.
        pairs = tl.permute(tl.reshape(words, [R, C // 16, 2, 8]), (0, 1, 3, 2))
        first, second = tl.split(pairs)
        words = tl.reshape(first | (second << 8), [R, C // 2])
    WIDE: tl.constexpr = words.shape[1] // 8
    if TILES == 1 and NUM_WORDS == WIDE and NUM_WORDS % 4 == 0:
        # [tile, chunk, g, c, word of the chunk] is the order in memory.
        lanes = tl.reshape(words, [R // 4, 4, WIDE // 4, 4, 8])
        lanes = tl.reshape(tl.permute(lanes, (0, 2, 4, 1, 3)), [R * WIDE * 8])
        tl.store(codes_ptr + tl.arange(0, R * WIDE * 8), lanes)
    else:
        row = tl.arange(0, R)[:, None]
        column = tl.arange(0, 8 * WIDE)[None, :]
        lane = column % 8 * 4 + row % 4
        unit = codes_ptr + row // (4 * TILES) * (32 * NUM_WORDS)
        if BITS == 2 and BLOCKS % 2 == 1:
            place = row // 4 % TILES * BLOCKS + column // 8
            at = (unit + word_offset(place // 2, lane, NUM_WORDS) // 4).to(
                tl.pointer_type(tl.uint8)
            )
            at += place % 2
            ok = tl.broadcast_to(column < 8 * BLOCKS, [R, 8 * WIDE])
            tl.store(at, (words & 0xFF).to(tl.uint8), mask=ok)
            tl.store(at + 2, ((words >> 16) & 0xFF).to(tl.uint8), mask=ok)
        else:
            place = row // 4 % TILES * (NUM_WORDS // TILES) + column // 8
            at = unit + word_offset(place, lane, NUM_WORDS) // 4
            ok = tl.broadcast_to(column < 8 * (NUM_WORDS // TILES), [R, 8 * WIDE])
            tl.store(at, words, mask=ok)


@triton.jit
def _load_blocks(codes_ptr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                 BITS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Loads what _store_blocks stored: int32 [R, C], codes in the low 4 BITS of each half."""
    BLOCKS: tl.constexpr = D // 16
    NUM_WORDS: tl.constexpr = TILES * BLOCKS * BITS // 4
    if BITS == 4 and TILES == 1 and NUM_WORDS == C // 8 and NUM_WORDS % 4 == 0:
        lanes = tl.load(codes_ptr + tl.arange(0, R * C))
        lanes = tl.reshape(lanes, [R // 4, C // 32, 8, 4, 4])
        return tl.reshape(tl.permute(lanes, (0, 3, 1, 4, 2)), [R, C])
    else:
        row = tl.arange(0, R)[:, None]
        column = tl.arange(0, C)[None, :]
        lane = column % 8 * 4 + row % 4
        place = row // 4 % TILES * BLOCKS + column // 8
        unit = codes_ptr + row // (4 * TILES) * (32 * NUM_WORDS)
        at = unit + word_offset(place * BITS // 4, lane, NUM_WORDS) // 4
        words = tl.load(at, mask=tl.broadcast_to(column < 8 * BLOCKS, [R, C]), other=0)
        if BITS == 2:
            words = words >> (place % 2 * 8)
        return words


@triton.jit
def decode_integers(
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Decodes TOKENS tokens of one head: zero + code * scale.

    Reads: codes and parameters of these tokens.
    Writes: fp16, bf16 or fp32 rows at out_ptr (the head's first channel), every element once.
    Precision: fp32, rounded once; fp16 saturates.
    """
    BLOCKS: tl.constexpr = D // 16
    C: tl.constexpr = 8 * triton.next_power_of_2(BLOCKS)
    R: tl.constexpr = TOKENS // 4
    NUM_GROUPS: tl.constexpr = D // GROUP
    G: tl.constexpr = triton.next_power_of_2(NUM_GROUPS)
    dtype = out_ptr.dtype.element_ty
    words = _load_blocks(codes_ptr, R, C, D, BITS, TILES)
    row = tl.arange(0, R)
    group = tl.arange(0, G)[None, :]
    place = ((row[:, None] // 4 * NUM_GROUPS + group) * 4 + row[:, None] % 4) * 8
    known = tl.broadcast_to(group < NUM_GROUPS, [R, G])
    channel = tl.arange(0, 2 * C)
    ok = tl.broadcast_to((channel < D)[None, :], [R, 2 * C])
    for index in tl.static_range(4):
        plus_8, plus_1 = index // 2, index % 2
        shifted = words >> (16 * plus_1 + 2 * BITS * plus_8)
        codes = tl.join(shifted, shifted >> BITS) & ((1 << BITS) - 1)  # [R, C, channel + 8]
        codes = tl.permute(tl.reshape(codes, [R, C // 8, 8, 2]), (0, 1, 3, 2))
        codes = tl.reshape(codes, [R, G, 2 * C // G]).to(tl.float32)
        at = parameters_ptr + place + 2 * plus_8 + plus_1
        scale = tl.load(at, mask=known, other=0.0).to(tl.float32)
        zero = tl.load(at + 4, mask=known, other=0.0).to(tl.float32)
        numbers = tl.reshape(codes * scale[:, :, None] + zero[:, :, None], [R, 2 * C])
        if dtype == tl.float16:
            numbers = tl.clamp(numbers, -FP16_MAX, FP16_MAX)
        token = first_token + row // 4 * 16 + row % 4 * 2 + 8 * plus_8 + plus_1
        rows = token_rows(slots_ptr, slice_index, token, stride_n, stride_t, T)
        tl.store(out_ptr + rows[:, None] + channel[None, :], numbers.to(dtype), mask=ok)
