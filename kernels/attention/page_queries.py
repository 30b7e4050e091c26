"""Queries as the keys of one page want them: device functions for keys that are centred and mixed.

A key is k = u M / s + mean: `u` what its codes say, M orthogonal, s a scale and mean a number for
each channel of the page. Hence q.k = (M (q / s)).u + q.mean: one small product and one number a
page, instead of mixing every key back. Math: kernels/polar/README.md, section 3.
"""

import triton
import triton.language as tl

from polarcache.kernels.attention.load_keys import key_channels


@triton.jit
def as_halves(wide):
    """Returns fp32 rows as fp16 ones of at most 2 and the power of two that they were divided by.

    No row leaves the range of fp16, whatever the size of its numbers.
    """
    peak = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.where(peak == 0, 1.0, peak.to(tl.float32, bitcast=True))
    return wide / unit[:, None], unit


@triton.jit
def _pair_of_channel(channel, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns the pair of each channel, as BlockShape.pair_channels pairs them."""
    if INTERLEAVED:
        return channel // 2
    elif ROTARY == D or ROTARY == 0:
        return channel % (D // 2)
    else:
        rest = (channel - ROTARY) % ((D - ROTARY) // 2) + ROTARY // 2
        return tl.where(channel < ROTARY, channel % (ROTARY // 2), rest)


@triton.jit
def _scaled(q_ptr, query_head, exists, slice_ptr, head, channel, KEY: tl.constexpr,
            D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Returns q and q / s of some channels, fp32 [BM, channels], 0 beyond D."""
    known = channel < D
    at = q_ptr + query_head.to(tl.int64)[:, None] * D + channel[None, :]
    q = tl.load(at, mask=exists[:, None] & known[None, :], other=0.0).to(tl.float32)
    pair = _pair_of_channel(channel, D, ROTARY, INTERLEAVED)
    balance = tl.load(slice_ptr + KEY[8] + head * (D // 2) + pair, mask=known, other=128)
    return q, q * tl.exp2((balance.to(tl.float32) - 128) * (-1 / 8))[None, :]


@triton.jit
def page_queries(q_ptr, query_head, exists, mix_ptr, slice_ptr, head, KEY: tl.constexpr,
                 D: tl.constexpr, WIDE: tl.constexpr, ROTARY: tl.constexpr,
                 INTERLEAVED: tl.constexpr):  # fmt: skip
    """Returns mixed queries fp16 [BM, WIDE] in the order of `key_channels`, factors and offsets.

    Args:
        q_ptr: queries fp16, bf16 or fp32 [.., D].
        query_head: int32 [BM], rows of q.
        exists: bool [BM].
        mix_ptr: fp16 [D, D], M times the root of D.
        slice_ptr: uint8, first byte of the packed slice.
        head: KV head.
        KEY: constants of `polar` keys, as `packed.py` makes them.
        D: channels.
        WIDE: D rounded up to a power of two.
        ROTARY: channels that RoPE turns.
        INTERLEAVED: how it pairs them.

    Returns:
        (queries, fp32 [BM] that their products are to be multiplied by, fp32 [BM] q.mean).
    """
    channel = tl.arange(0, WIDE)
    q, scaled = _scaled(
        q_ptr, query_head, exists, slice_ptr, head, channel, KEY, D, ROTARY, INTERLEAVED
    )
    means = tl.load(slice_ptr + KEY[6] + head * D + channel, mask=channel < D, other=128)
    largest = tl.load((slice_ptr + KEY[7]).to(tl.pointer_type(tl.float16)) + head * 2)
    mean = (means.to(tl.float32) - 128) * (largest.to(tl.float32) * (1 / 127))
    offset = tl.sum(q * mean[None, :], 1)
    unit = as_halves(scaled)[1]
    mixed, ok = key_channels(channel, "polar", D, ROTARY, INTERLEAVED)
    # Some of the matrix at a time: the whole of it would fill the shared memory of small GPUs.
    CHUNK: tl.constexpr = 64 if WIDE > 64 else WIDE
    total = tl.zeros(q.shape, tl.float32)
    for first in range(0, WIDE, CHUNK):
        some = first + tl.arange(0, CHUNK)
        part = _scaled(
            q_ptr, query_head, exists, slice_ptr, head, some, KEY, D, ROTARY, INTERLEAVED
        )[1]
        mix = tl.load(
            mix_ptr + mixed[None, :] * D + some[:, None],
            mask=(some < D)[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot((part / unit[:, None]).to(tl.float16), mix, total)
    halves, second_unit = as_halves(total)
    return halves.to(tl.float16), unit * second_unit * (1 / D**0.5), offset


@triton.jit
def page_gains(slice_ptr, head, token, KEY: tl.constexpr, T: tl.constexpr):
    """Returns gains fp32 [tokens] of `polar` keys."""
    codes = tl.load(slice_ptr + KEY[5] + head * T + token).to(tl.float32)
    largest = tl.load((slice_ptr + KEY[7]).to(tl.pointer_type(tl.float16)) + head * 2 + 1)
    gains = tl.exp2(codes * (-1 / 32)) * largest.to(tl.float32)
    return tl.where(codes < 255, gains, 0.0)
