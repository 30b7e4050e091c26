"""Keys of chosen tokens, decoded in registers: device functions. Math: kernels/polar/README.md."""

import triton
import triton.language as tl

from polarcache.kernels.attention.load_words import as_mantissa, pair_codes, table_halves
from polarcache.kernels.gpu.pair_decode import turn
from polarcache.kernels.gpu.pair_encode import pair_channels

TAU = tl.constexpr(6.283185307179586)
# What the low half of an fp32 number is raised by: 11 bits lie in the high half.
LOW_SHIFT = tl.constexpr(2048.0)


@triton.jit
def key_channels(column, KIND: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
                 INTERLEAVED: tl.constexpr):  # fmt: skip
    """Returns the channel of each column that `load_keys` gives, and whether there is one.

    Exact columns are channels, column 2 j + s of trees is rotated channel j + s D / 2. Else column
    16 k + 4 c + 2 h + s is channel s of pair 8 k + 4 h + c; pairs of `polar` are those of its mixed
    channels, j and j + D / 2.
    """
    if KIND == "exact":
        return column, column < D
    elif KIND == "tree":
        return column // 2 + column % 2 * (D // 2), column < D
    else:
        pair = column // 16 * 8 + column // 4 % 4 + column // 2 % 2 * 4
        if KIND == "polar":
            first, second = pair, pair + D // 2
        else:
            first, second = pair_channels(pair, D, ROTARY, INTERLEAVED)
        return tl.where(column % 2 == 0, first, second), column < D


@triton.jit
def load_keys(slice_ptr, table_ptr, head, first_token, row, one, KIND: tl.constexpr,
              KEY: tl.constexpr, ELEMENT: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
              D: tl.constexpr, DK: tl.constexpr, BT: tl.constexpr, FAST: tl.constexpr,
              LOW: tl.constexpr = False):  # fmt: skip
    """Returns keys [BT, DK] in the order of `key_channels`; finite columns beyond D.

    Args:
        slice_ptr: uint8, first byte of the packed slice.
        table_ptr: int32, two fp16 numbers for each code of `polar`; else None.
        head: KV head.
        first_token: token of row 0, a multiple of the rows.
        row: int32 [BT], 0 and up, all of one group; rows beyond the slice repeat its last token.
        one: as `as_mantissa` takes it.
        KIND: `exact`, `pair`, `arc2` or `polar`.
        KEY: constants of the kind, as `packed.py` makes them.
        ELEMENT: dtype of exact elements; others are given as fp16.
        T: tokens of the slice.
        HEADS: its KV heads.
        D: channels of a head.
        DK: D rounded up to a power of two.
        BT: tokens.
        FAST: whether to use the device's own cosine and sine, within 3e-6.
        LOW: of `pair` and `arc2`, return LOW_SHIFT times what the rounding to fp16 takes off.
    """
    if KIND == "exact":
        column = tl.arange(0, DK)
        elements_ptr = (slice_ptr + KEY[0]).to(tl.pointer_type(ELEMENT))
        token = first_token + row
        if T % BT != 0:
            token = tl.minimum(token, T - 1)
        at = (token * HEADS + head)[:, None] * D + column[None, :]
        return tl.load(elements_ptr + at, mask=column[None, :] < D, other=0.0)
    else:
        index = tl.arange(0, DK // 4)
        column = index % 4
        step = tl.minimum(index // 4, D // 16 - 1)
        codes = pair_codes(
            slice_ptr + KEY[4], head, first_token, row, step, column, T, D, KEY[0] + KEY[1], KEY[3]
        )
        if KIND == "polar":
            x_0, y_0 = table_halves(table_ptr, codes[0])
            x_4, y_4 = table_halves(table_ptr, codes[1])
        else:
            GROUP: tl.constexpr = KEY[2]
            group = head * (T // GROUP) + first_token // GROUP
            x_0, y_0 = _decoded(slice_ptr, codes[0], group, step, column, one, KIND, KEY, D, FAST)
            x_4, y_4 = _decoded(
                slice_ptr, codes[1], group, step, column + 4, one, KIND, KEY, D, FAST
            )
        both = tl.join(tl.join(x_0, x_4), tl.join(y_0, y_4))
        wide = tl.reshape(both, [BT, DK])
        high = wide.to(tl.float16)
        if LOW:
            return ((wide - high.to(tl.float32)) * LOW_SHIFT).to(tl.float16)
        return high


@triton.jit
def _decoded(slice_ptr, codes, group, step, column, one, KIND: tl.constexpr, KEY: tl.constexpr,
             D: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Decodes codes [tokens, steps] of pairs 8 step + column at the centres of their bins."""
    T_BITS: tl.constexpr = KEY[1]
    if KIND == "pair":
        at = (slice_ptr + KEY[5]).to(tl.pointer_type(tl.float16))
        at += group * (2 * D) + column * (D // 16) + step
        radius_zero = tl.load(at).to(tl.float32)
        radius_scale = tl.load(at + D // 2).to(tl.float32)
        angle_zero = tl.load(at + D).to(tl.float32)
        angle_scale = tl.load(at + D // 2 * 3).to(tl.float32)
    else:
        pair = 8 * step + column
        at = (slice_ptr + KEY[6]).to(tl.pointer_type(tl.float16)) + group * D + pair
        radius_zero = tl.load(at).to(tl.float32)
        radius_scale = tl.load(at + D // 2).to(tl.float32)
        arcs_ptr = slice_ptr + KEY[5] + group * D + pair
        arcs = (tl.load(arcs_ptr).to(tl.int32) << 8) | tl.load(arcs_ptr + D // 2).to(tl.int32)
        step_of_angle = 1 << (16 - T_BITS - tl.minimum(arcs & 15, 8))
        angle_zero = (arcs >> 4).to(tl.float32) * (TAU / 4096)
        angle_scale = step_of_angle.to(tl.float32) * (TAU / 65536)
    # zero + (code + 1/2) scale, of numbers 1 + code / 128
    radius_scale, angle_scale = 128 * radius_scale, 128 * angle_scale
    radius_zero -= radius_scale * (1 - 1 / 256)
    angle_zero -= angle_scale * (1 - 1 / 256)
    radius = as_mantissa(codes >> T_BITS, one) * radius_scale[None, :] + radius_zero[None, :]
    angle = (
        as_mantissa(codes & ((1 << T_BITS) - 1), one) * angle_scale[None, :] + angle_zero[None, :]
    )
    cosine, sine = cosine_and_sine(angle, FAST)
    return cosine * radius, sine * radius


@triton.jit
def cosine_and_sine(angle, FAST: tl.constexpr):
    """Returns cosine and sine of fp32 angles of at most a few turns."""
    if FAST:
        cosine = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        sine = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        cosine, sine = turn(angle)
    return cosine, sine
