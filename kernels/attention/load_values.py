"""Values of chosen tokens, decoded in registers: device functions. Math: kernels/values.py."""

import triton
import triton.language as tl

from polarcache.kernels.attention.load_words import (
    as_mantissa,
    channel_codes,
    table_halves,
    value_pair_codes,
)
from polarcache.kernels.gpu.integer import FP16_MAX


@triton.jit
def value_channels(column, KIND: tl.constexpr, D: tl.constexpr):
    """Returns the channel of each column that `load_values` gives, and whether there is one.

    Exact columns are channels, column 16 k + 2 g + h of integers is channel 16 k + 8 h + g, column
    2 j + s of `polar` and trees is mixed channel j + s D / 2.
    """
    if KIND == "exact":
        channel = column
    elif KIND == "polar" or KIND == "tree":
        channel = column // 2 + column % 2 * (D // 2)
    else:
        channel = column // 16 * 16 + column // 2 % 8 + column % 2 * 8
    return channel, column < D


@triton.jit
def load_values(slice_ptr, table_ptr, head, first_token, row, seen, one, KIND: tl.constexpr,
                VALUE: tl.constexpr, ELEMENT: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
                D: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """Returns values [tokens, DV] in the order of `value_channels`: 0 where not seen.

    Args:
        slice_ptr: uint8, first byte of the packed slice.
        table_ptr: int32, two fp16 numbers for each code of `polar`; else None.
        head: KV head.
        first_token: token of row 0, a multiple of the rows.
        row: int32 [tokens], 0 and up.
        seen: bool [tokens]; what the others hold is never looked at.
        one: as `as_mantissa` takes it.
        KIND: `exact`, `integer` or `polar`.
        VALUE: constants of the kind, as `packed.py` makes them.
        ELEMENT: dtype of exact elements; others are given as fp16.
        T: tokens of the slice.
        HEADS: its KV heads.
        D: channels of a head.
        DV: D rounded up to a power of two.
    """
    token = first_token + row
    if KIND == "exact":
        column = tl.arange(0, DV)
        elements_ptr = (slice_ptr + VALUE[0]).to(tl.pointer_type(ELEMENT))
        at = (token * HEADS + head)[:, None] * D + column[None, :]
        return tl.load(elements_ptr + at, mask=seen[:, None] & (column[None, :] < D), other=0.0)
    elif KIND == "polar":
        index = tl.arange(0, DV // 2)
        step = tl.minimum(index // 8, D // 16 - 1)
        codes = value_pair_codes(
            slice_ptr + VALUE[3], head, first_token, row, step, index % 8, T, D,
            VALUE[0] + VALUE[1], VALUE[2],
        )  # fmt: skip
        x, y = table_halves(table_ptr, codes)
        gains_ptr = (slice_ptr + VALUE[4]).to(tl.pointer_type(tl.float16)) + head * T + token
        gain = tl.minimum(tl.load(gains_ptr, mask=seen, other=0.0).to(tl.float32), VALUE[5])
        numbers = tl.reshape(tl.join(x, y), [row.shape[0], DV])
        return (numbers.to(tl.float32) * gain[:, None]).to(tl.float16)
    else:
        BITS: tl.constexpr = VALUE[0]
        GROUP: tl.constexpr = VALUE[1]
        NUM_GROUPS: tl.constexpr = D // GROUP
        TOKENS: tl.constexpr = row.shape[0]
        index = tl.arange(0, DV // 2)
        block = tl.minimum(index // 8, D // 16 - 1)
        first, second = channel_codes(
            slice_ptr + VALUE[4], head, first_token, row, block, index % 8, T, D, BITS, VALUE[2]
        )
        codes = as_mantissa(tl.reshape(tl.join(first, second), [TOKENS, DV]), one)
        at = (slice_ptr + VALUE[5]).to(tl.pointer_type(tl.float16))
        if VALUE[3]:
            # [head, tile, group, c, kind, token + 8, token + 1]
            at += (head * T + first_token) * (2 * NUM_GROUPS) + row // 16 * (32 * NUM_GROUPS)
            at += row % 8 // 2 * 8 + row // 8 % 2 * 2 + row % 2
            GROUP_STRIDE: tl.constexpr = 32
            ZERO: tl.constexpr = 4
        else:
            at += (head * T + token) * (2 * NUM_GROUPS)
            GROUP_STRIDE: tl.constexpr = 2
            ZERO: tl.constexpr = 1
        if NUM_GROUPS == 1:
            scale, zero = _scale_and_zero(at[:, None], seen[:, None], ZERO, BITS)
            return (codes * scale + zero).to(tl.float16)
        elif NUM_GROUPS & (NUM_GROUPS - 1) == 0 and GROUP % 16 == 0 and DV == D:
            group = tl.arange(0, NUM_GROUPS)
            at = at[:, None] + group[None, :] * GROUP_STRIDE
            ok = seen[:, None] & (group[None, :] < NUM_GROUPS)
            scale, zero = _scale_and_zero(at, ok, ZERO, BITS)
            codes = tl.reshape(codes, [TOKENS, NUM_GROUPS, GROUP])
            numbers = codes * scale[:, :, None] + zero[:, :, None]
            return tl.reshape(numbers, [TOKENS, DV]).to(tl.float16)
        else:
            channel, known = value_channels(tl.arange(0, DV), KIND, D)
            at = at[:, None] + (channel // GROUP * GROUP_STRIDE)[None, :]
            scale, zero = _scale_and_zero(at, seen[:, None] & known[None, :], ZERO, BITS)
            return (codes * scale + zero).to(tl.float16)


@triton.jit
def _scale_and_zero(at, ok, ZERO: tl.constexpr, BITS: tl.constexpr):
    """Loads fp32 numbers s, z such that a code is decoded as s (1 + code / 128) + z; 0 if not ok.

    No code decodes above the largest fp16.
    """
    scale = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    zero = tl.load(at + ZERO, mask=ok, other=0.0).to(tl.float32)
    scale = 128 * tl.minimum(scale, (zero - FP16_MAX) * (-1.0 / ((1 << BITS) - 1)))
    return scale, zero - scale
