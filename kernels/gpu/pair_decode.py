"""Pair codec: decodes one head of some units of tokens. See pair_encode for shapes and source."""

import triton
import triton.language as tl

from polarcache.kernels.gpu.arc import MAX_ARC_EXPONENT, STARTS, TAU, WHOLE, arc_step
from polarcache.kernels.gpu.pair_encode import FP16_MAX, PI, pair_channels, spread
from polarcache.kernels.gpu.words import ROUNDER, load_words, token_rows


@triton.jit
def turn(angle):
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
    arcs_ptr,
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
    """Decodes TOKENS tokens and STEPS times 8 pairs of one head at the centres of their bins.

    Reads: codes and parameters of these pairs.
    Writes: fp16, bf16 or fp32 rows at out_ptr (the head's first channel), every element once.
    Precision: fp32, rounded once.
    """
    C: tl.constexpr = 4 * triton.next_power_of_2(STEPS)
    R: tl.constexpr = TOKENS // 2
    NG: tl.constexpr = triton.cdiv(TOKENS, GROUP)
    column = tl.arange(0, C)
    step = first_step + tl.minimum(column // 4, STEPS - 1)
    words = load_words(codes_ptr, step, R, D, R_BITS + T_BITS, TILES)
    # [R, C, pair + 4, token + 8]: the bytes of a word
    codes = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    radius_code = ((codes >> T_BITS) & ((1 << R_BITS) - 1)).to(tl.float32)
    angle_code = (codes & ((1 << T_BITS) - 1)).to(tl.float32)

    group = tl.arange(0, NG)[:, None, None]
    c = (column % 4)[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]
    if ARC == WHOLE:
        at = parameters_ptr + (group * D + 8 * step[None, :, None] + c)
    else:
        at = parameters_ptr + (group * (2 * D) + step[None, :, None] + c * (D // 16))
    radius_zero, radius_scale = tl.load(at).to(tl.float32), tl.load(at + D // 2).to(tl.float32)
    if ARC == WHOLE:
        at_arc = arcs_ptr + (group * D + 8 * step[None, :, None] + c)
        low = tl.load(at_arc + D // 2).to(tl.int32)
        arc = (tl.load(at_arc).to(tl.int32) << 4) | (low >> 4)
        angle_zero = arc.to(tl.float32) * (TAU / STARTS)
        angle_scale, _ = arc_step(tl.minimum(low & 15, MAX_ARC_EXPONENT), T_BITS)
    else:
        angle_zero, angle_scale = tl.load(at + D).to(tl.float32), tl.load(at + D // 2 * 3)
        angle_scale = angle_scale.to(tl.float32)
    radius = spread(radius_zero + 0.5 * radius_scale, R) + radius_code * spread(radius_scale, R)
    angle = spread(angle_zero + 0.5 * angle_scale, R) + angle_code * spread(angle_scale, R)
    x, y = turn(angle)
    x_a, x_b = tl.split(x * radius)
    y_a, y_b = tl.split(y * radius)
    row = tl.arange(0, R)
    token = first_token + row // 8 * 16 + row % 8
    for second_row in tl.static_range(2):
        rows = token_rows(slots_ptr, slice_index, token + 8 * second_row, stride_n, stride_t, T)
        x_row = _row_of_pairs(x_b if second_row else x_a)
        y_row = _row_of_pairs(y_b if second_row else y_a)
        _store_pairs(
            out_ptr + rows[:, None], x_row, y_row, 8 * first_step, 8 * STEPS, D, ROTARY, INTERLEAVED
        )


@triton.jit
def _store_pairs(
    row_ptr,
    x,
    y,
    first_pair,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Stores PAIRS pairs of [R, pairs] channels from first_pair on, saturating to fp16."""
    dtype = row_ptr.dtype.element_ty
    if dtype == tl.float16:
        x = tl.clamp(x, -FP16_MAX, FP16_MAX)
        y = tl.clamp(y, -FP16_MAX, FP16_MAX)
    x, y = x.to(dtype), y.to(dtype)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * x.shape[1])[None, :]
        both = tl.reshape(tl.join(x, y), [x.shape[0], 2 * x.shape[1]])
        tl.store(row_ptr + 2 * first_pair + channel, both, mask=channel < 2 * PAIRS)
    else:
        pair = tl.arange(0, x.shape[1])
        first, second = pair_channels(first_pair + pair, D, ROTARY, INTERLEAVED)
        ok = (pair < PAIRS)[None, :]
        tl.store(row_ptr + first[None, :], x, mask=ok)
        tl.store(row_ptr + second[None, :], y, mask=ok)
