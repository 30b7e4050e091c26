"""Keys or values of the recursive codec as they were rotated: device functions.

A channel is the radius of its block times a cosine or sine of each level's angle on the way down.
Queries are rotated before the kernel and outputs back after it. Math: kernels/polar/README.md,
section 2.
"""

import triton
import triton.language as tl

from polarcache.kernels.attention.load_keys import cosine_and_sine
from polarcache.kernels.attention.load_words import stream_codes


@triton.jit
def _tree_place(head, token, entry, LEVEL: tl.constexpr, SIDE: tl.constexpr, TILED: tl.constexpr,
                T: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Returns where in its level's stream each entry [1, C] of each token [BT, 1] lies.

    Tree order of kernels/polar/README.md, section 4; above level 4 plain rows.
    """
    if LEVEL > 4:
        return (head * T + token) * (D >> LEVEL) + entry
    else:
        BLOCKS: tl.constexpr = D // 16
        CODES: tl.constexpr = 16 >> LEVEL
        code, block = entry // BLOCKS, entry % BLOCKS
        tile = head * (T // 16) + token // 16
        plus_8 = token // 8 % 2
        if not TILED:
            tree = (head * T + token) * BLOCKS + block
        elif SIDE == "key":
            lane = token % 8 * 4 + block % 4
            tree = ((tile * 32 + lane) * (BLOCKS // 4) + block // 4) * 2 + plus_8
        else:
            lane = block % 8 * 4 + token % 8 // 2
            tree = ((tile * 32 + lane) * (BLOCKS // 8) + block // 8) * 4 + plus_8 * 2 + token % 2
        return tree * CODES + code


@triton.jit
def _cosine_or_sine(slice_ptr, table_ptr, codes, is_sine, LEVEL: tl.constexpr,
                    BOOK: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Returns the cosine, or where is_sine the sine, of a level's angles."""
    if BOOK < 0:
        return tl.load(table_ptr + (LEVEL - 1) * 32 + is_sine * 16 + codes)
    else:
        # Angles of the slice's own codebook: 16 of level 1, then 4 each.
        START: tl.constexpr = 0 if LEVEL == 1 else 8 + 4 * LEVEL
        angles_ptr = (slice_ptr + BOOK).to(tl.pointer_type(tl.float16)) + START
        cosine, sine = cosine_and_sine(tl.load(angles_ptr + codes).to(tl.float32), FAST)
        return tl.where(is_sine == 1, sine, cosine)


@triton.jit
def _level_factor(slice_ptr, table_ptr, head, token, node, LEVEL: tl.constexpr,
                  SIDE: tl.constexpr, TREE: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
                  FAST: tl.constexpr):  # fmt: skip
    """Returns what a level multiplies the radius of each pair of channels with, [tokens, C]."""
    COUNT: tl.constexpr = D >> LEVEL
    place = _tree_place(head, token, node % COUNT, LEVEL, SIDE, TREE[1], T, D)
    codes = stream_codes(slice_ptr + TREE[6 + 2 * LEVEL], place, TREE[5 + 2 * LEVEL])
    is_sine = node // COUNT % 2
    return _cosine_or_sine(slice_ptr, table_ptr, codes, is_sine, LEVEL, TREE[2], FAST)


@triton.jit
def load_trees(slice_ptr, table_ptr, head, first_token, row, seen, SIDE: tl.constexpr,
               TREE: tl.constexpr, T: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    """Returns rotated channels fp16 [tokens, WIDE]: column 2 j + s is channel j + s D / 2.

    Args:
        slice_ptr: uint8, first byte of the packed slice.
        table_ptr: fp32 [levels, 2, 16], cosines and sines of the analytic codebooks, or None.
        head: KV head.
        first_token: token of row 0, a multiple of the rows.
        row: int32 [tokens], 0 and up; rows beyond the slice repeat its last token.
        seen: bool [tokens]; the others are 0.
        SIDE: `key` or `value`.
        TREE: levels, whether in tree order, offset of the slice's codebook or -1, form of the
            radii (0 fp16, 1 logarithms in tree order, 2 in plain rows), their offset, those of
            means and scales, then bits and offset of each level.
        T: tokens of the slice.
        D: channels.
        WIDE: D rounded up to a power of two.
        FAST: whether to use the device's own cosine and sine.
    """
    LEVELS: tl.constexpr = TREE[0]
    TILED: tl.constexpr = TREE[1]
    BOOK: tl.constexpr = TREE[2]
    token = tl.minimum(first_token + row, T - 1)[:, None]
    node = tl.minimum(tl.arange(0, WIDE // 2), D // 2 - 1)[None, :]
    TOP: tl.constexpr = D >> LEVELS
    RADII: tl.constexpr = 5 if TREE[3] == 2 else 4
    if TREE[3] == 2:
        place = (head * T + token) * TOP + node % TOP
    else:
        place = _tree_place(head, token, node % TOP, RADII, SIDE, TILED, T, D)
    if TREE[3] == 0:
        radii_ptr = (slice_ptr + TREE[4]).to(tl.pointer_type(tl.float16))
        radius = tl.load(radii_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
    else:
        logs = tl.load(slice_ptr + TREE[4] + place, mask=seen[:, None], other=0).to(tl.float32)
        radius = tl.where(logs > 0, tl.exp2((logs - 128) * (1 / 8)), 0.0)
    for above in tl.static_range(LEVELS - 1):
        radius *= _level_factor(
            slice_ptr, table_ptr, head, token, node, LEVELS - above, SIDE, TREE, T, D, FAST
        )
    place = _tree_place(head, token, node, 1, SIDE, TILED, T, D)
    codes = stream_codes(slice_ptr + TREE[8], place, TREE[7])
    x = radius * _cosine_or_sine(slice_ptr, table_ptr, codes, node * 0, 1, BOOK, FAST)
    y = radius * _cosine_or_sine(slice_ptr, table_ptr, codes, node * 0 + 1, 1, BOOK, FAST)
    return tl.reshape(tl.join(x, y), [row.shape[0], WIDE]).to(tl.float16)


@triton.jit
def mean_scores(q_ptr, query_head, exists, slice_ptr, head, TREE: tl.constexpr, D: tl.constexpr,
                WIDE: tl.constexpr):  # fmt: skip
    """Returns q.mean, fp32 [BM], of queries before the rotation and the page's channel means."""
    channel = tl.arange(0, WIDE)
    known = channel < D
    at = q_ptr + query_head.to(tl.int64)[:, None] * D + channel[None, :]
    q = tl.load(at, mask=exists[:, None] & known[None, :], other=0.0).to(tl.float32)
    means = tl.load(slice_ptr + TREE[5] + head * D + channel, mask=known, other=128)
    largest = tl.load((slice_ptr + TREE[6]).to(tl.pointer_type(tl.float16)) + head)
    mean = (means.to(tl.float32) - 128) * (largest.to(tl.float32) * (1 / 127))
    return tl.sum(q * mean[None, :], 1)
