"""Recursive codec with 4-2-2-2 bits: device functions that turn words of codes into channels.

Math: kernels/polar/README.md, section 2. Reference: kernels/polar/recursive.py.

A thread holds four trees that are neighbours in memory. It looks up the cosine and the sine of a
4-bit code, or both of two 2-bit codes, as one entry of a table in shared memory, whose entries lie
in banks of their own; halves of a node are two fp16 numbers of one product.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu import rotate, tree
from polarcache.kernels.gpu.words import INTERPRETED

ENTRIES = tree.ENTRIES


@triton.jit
def load_codes(
    packed_ptr,
    item,
    stride_packed_n,
    D: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    ORDER: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Loads an item.

    Returns:
        level 1, int32 [L], a word a tree, trees in the order of `by_lane`; level 2, int32 [L / 4],
        level 3, int16, and level 4, uint8, of four trees each; radii, fp16 or uint8 [L].
    """
    slice_ptr = packed_ptr + (item // ITEMS).to(tl.int64) * stride_packed_n
    first_row = item % ITEMS * ROWS
    TREES: tl.constexpr = D // 16
    index = by_lane(tl.arange(0, ROWS * TREES // 4), ORDER)
    tree_index = tl.arange(0, ROWS * TREES)
    tree_index = by_lane(tree_index // 4, ORDER) * 4 + tree_index % 4
    at = slice_ptr + FIELDS[0] + first_row * (TREES * 4)
    level_1 = tl.load(at.to(tl.pointer_type(tl.int32)) + tree_index)
    at = slice_ptr + FIELDS[1] + first_row * TREES
    level_2 = tl.load(at.to(tl.pointer_type(tl.int32)) + index)
    at = slice_ptr + FIELDS[2] + first_row * TREES // 2
    level_3 = tl.load(at.to(tl.pointer_type(tl.int16)) + index)
    level_4 = tl.load(slice_ptr + FIELDS[3] + first_row * TREES // 4 + index)
    if FORM == "published":
        at = slice_ptr + FIELDS[4] + first_row * (TREES * 2)
        radii = tl.load(at.to(tl.pointer_type(tl.float16)) + tree_index)
    else:
        radii = tl.load(slice_ptr + FIELDS[4] + first_row * TREES + tree_index)
    return level_1, level_2, level_3, level_4, radii


@triton.jit
def by_lane(index, ORDER: tl.constexpr):
    """Returns which four trees of memory, int32 of any shape, each lane holds.

    Of values, lane 16 a + 4 c + b of a warp holds block 4 a + b of tokens 2 c, 2 c + 1, 2 c + 8 and
    2 c + 9, what lies at 16 a + 4 b + c.
    """
    if ORDER == "value":
        return index // 16 * 16 + index % 4 * 4 + index // 4 % 4
    else:
        return index


@triton.jit
def channels(codes, angles, pairs):
    """Returns channels of trees, fp16 [16 L].

    Of a tree, channel i stands at the place whose four bits are i's in reverse: halves of a node
    stand side by side, and code k of a level is that of the node whose bits are k's in reverse.

    Args:
        codes: what load_codes returns.
        angles: int32 [ENTRIES], cosine and sine of codes of level 1 as fp16, the cosine low.
        pairs: int64 [4 ENTRIES], of two codes of level 2 in the second ENTRIES and so on.
    """
    level_1, level_2, level_3, level_4, radii = codes
    if radii.dtype == tl.uint8:
        radii = tree.log_radii(radii.to(tl.int32)).to(tl.float16)
    level_2 = level_2.to(tl.uint32, bitcast=True)
    level_3, level_4 = level_3.to(tl.uint32), level_4.to(tl.uint32)
    codes = ()
    for index in tl.static_range(8):
        codes += (((level_2 >> (4 * index)) & 15) + ENTRIES,)
    for index in tl.static_range(4):
        codes += (((level_3 >> (4 * index)) & 15) + 2 * ENTRIES,)
    # The last two are here to make a power of two of them.
    for index in tl.static_range(4):
        codes += (((level_4 >> (4 * (index % 2))) & 15) + 3 * ENTRIES,)
    codes = joined(codes, 16).to(tl.int32, bitcast=True)
    both = apart(rotate.look_up(pairs, codes), 16)
    numbers = apart(radii, 4)
    numbers = _two(numbers[0], numbers[1], both[12]) + _two(numbers[2], numbers[3], both[13])
    halves = ()
    for index in tl.static_range(4):
        halves += _two(numbers[2 * index], numbers[2 * index + 1], both[8 + index])
    numbers = ()
    for index in tl.static_range(4):
        # Codes 0 and 1 are of nodes 0 and 2.
        even = _two(halves[4 * index], halves[4 * index + 2], both[2 * index])
        odd = _two(halves[4 * index + 1], halves[4 * index + 3], both[2 * index + 1])
        numbers += (even[0], even[1], odd[0], odd[1], even[2], even[3], odd[2], odd[3])
    words = apart(level_1, 4)
    codes = ()
    for index in tl.static_range(32):
        place = index % 8
        code = (place & 1) * 4 + (place & 2) + (place >> 2)
        codes += ((words[index // 8] >> (code * 4)) & 15,)
    both = apart(rotate.look_up(angles, joined(codes, 32)), 32)
    halves = ()
    for index in tl.static_range(32):
        halves += halved(numbers[index], both[index])
    return joined(halves, 64)


@triton.jit
def _two(first, second, both):
    """Returns halves of two radii of two nodes, of the first's entry in low bits, int64."""
    return halved(first, both.to(tl.int32)) + halved(second, (both >> 32).to(tl.int32))


@triton.jit
def halved(radii, both):
    """Returns fp16 halves of fp16 radii: times the cosine in low bits of int32, times the sine."""
    if INTERPRETED:
        cosine = both.to(tl.int16).to(tl.float16, bitcast=True)
        sine = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return radii * cosine, radii * sine
    else:
        # One product; a compiler left alone also swaps its halves back and forth.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.b32 t, {$2, $2}; mul.rn.f16x2 t, t, $3; mov.b32 {$0, $1}, t; }",
            "=h,=h,h,r",
            [radii, both],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )


@triton.jit
def joined(parts, COUNT: tl.constexpr):
    """Puts COUNT tensors, a power of two of [N], side by side: [N COUNT]."""
    SIZE: tl.constexpr = COUNT * parts[0].numel
    for index in tl.static_range(6):
        if COUNT >> index > 1:
            parts = _pairs(parts, COUNT >> (index + 1))
    return tl.reshape(parts[0], [SIZE])


@triton.jit
def _pairs(parts, COUNT: tl.constexpr):
    pairs = ()
    for index in tl.static_range(COUNT):
        pairs += (tl.join(parts[index], parts[COUNT + index]),)
    return pairs


@triton.jit
def apart(numbers, COUNT: tl.constexpr):
    """The inverse: [N COUNT] to COUNT of [N]."""
    parts = (numbers,)
    for index in tl.static_range(6):
        if COUNT >> index > 1:
            parts = _evens_and_odds(parts, 1 << index)
    return parts


@triton.jit
def _evens_and_odds(parts, COUNT: tl.constexpr):
    evens = ()
    odds = ()
    for index in tl.static_range(COUNT):
        even, odd = tl.split(tl.reshape(parts[index], [parts[index].numel // 2, 2]))
        evens += (even,)
        odds += (odd,)
    return evens + odds
