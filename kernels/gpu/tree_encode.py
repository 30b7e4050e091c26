"""The kernel that encodes the recursive codec with the analytic codebook.

Programs go from item to item: an item is ROWS rows, head by head and token by token, of one slice,
for centred keys all tokens of one head. The matrix is loaded once a program. Rows go from memory to
the tensor cores, and trees with 4-2-2-2 bits of keys back, without changing threads; warps wait for
no others, so that some multiply while others code.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu import centre, fragments, rotate, streams, tree, tree_words
from polarcache.kernels.gpu.words import INTERPRETED


@triton.jit
def encode_trees(
    x_ptr,
    slots_ptr,
    out_ptr,
    flags_ptr,
    matrix_ptr,
    cosines_ptr,
    num_slices,
    stride_n,
    stride_t,
    stride_h,
    stride_out_n,
    T: tl.constexpr,
    D: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    COSINES: tl.constexpr,
    TANGENTS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRED: tl.constexpr,
    ORDER: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Encodes keys or values.

    Grid: any number of programs.
    Reads: x fp16, bf16 or fp32 [N, T, H, D], last dim contiguous; or, where slots_ptr int64 [N, T]
    names the rows, [rows, H, D]. matrix fp16 [2, D, D]: high and low part of the rotation over
    SCALE, rows in the order of column_channels, of centred keys in order; columns in that of
    the trees. cosines fp32 [levels, 16], angles of each level.
    Writes: out uint8 [N, slice_bytes] at bytes FIELDS: levels, radii and, of centred keys, means
    and scales, every byte once; flags int32 [N], 1 where a radius or mean does not fit fp16.
    Reference: kernels/polar/recursive.py.
    """
    DEEP: tl.constexpr = FORM == "deep"
    LEVELS: tl.constexpr = len(BITS)
    # Numbers of a later item wait in registers, of which fp32 ones would need too many.
    AHEAD: tl.constexpr = not CENTRED and x_ptr.dtype.element_ty != tl.float32
    high, low = rotate.load_matrices(matrix_ptr, D, D, 2)
    channel = tl.arange(0, D)
    turns = rotate.turns(num_slices * ITEMS)
    # Matrices are in shared memory now; else every item's product would wait for all warps.
    tl.debug_barrier()
    if AHEAD:
        ahead = _tiles(
            x_ptr, slots_ptr, tl.program_id(0), stride_n, stride_t, stride_h, T, D, ITEMS, ROWS
        )
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        first_row = item % ITEMS * ROWS
        if CENTRED:
            row = first_row + tl.arange(0, ROWS)
            rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
            x = tl.load(x_ptr + rows[:, None] + channel[None, :])
        elif AHEAD:
            x = fragments.to_columns(ahead, ROWS, D)
            # The last item is loaded once more.
            item = tl.program_id(0) + tl.minimum(turn + 1, turns - 1) * tl.num_programs(0)
            _fetch(x_ptr, slots_ptr, item, stride_n, stride_t, stride_h, T, D, ITEMS, ROWS)
        else:
            x = _tiles(x_ptr, slots_ptr, item, stride_n, stride_t, stride_h, T, D, ITEMS, ROWS)
            x = fragments.to_columns(x, ROWS, D)
        slice_ptr = out_ptr + slice_index * stride_out_n
        if CENTRED:
            x = x.to(tl.float32)
            mean = centre.mean_rows(x, T)
            scale = centre.largest(mean, 1).to(tl.float16)
            at = slice_ptr + FIELDS[LEVELS + 1] + first_row // T * D + channel[None, :]
            x = centre.take_mean(x, mean, scale, at, (channel < D)[None, :])
            at = (slice_ptr + FIELDS[LEVELS + 2]).to(tl.pointer_type(tl.float16))
            tl.store(at + first_row // T + tl.arange(0, 1)[:, None], scale)
            rotate.refuse(flags_ptr + slice_index, scale.to(tl.float32) <= rotate.FP16_MAX)
        x_high, x_low, inverse = rotate.split_rows(x)
        numbers = rotate.product(x_high, x_low, high, low, x.dtype == tl.float32, 2)
        if AHEAD:
            # Registers of the rows are free after the product.
            ahead = _tiles(x_ptr, slots_ptr, item, stride_n, stride_t, stride_h, T, D, ITEMS, ROWS)
        if DEEP:
            first, second = rotate.halves(numbers)
            codes, products = tree.first_codes(first, second, True)
            square = first * first + second * second
            _store_level(slice_ptr, first_row, codes, D, 0, BITS, ORDER, FIELDS)
            for index in tl.static_range(1, LEVELS):
                if index == 4:
                    square = tree.by_column(square, ORDER)
                    products = tree.by_column(products, ORDER)
                first, second = rotate.halves(square)
                codes, products = tree.next_codes(
                    first, second, products, cosines_ptr,
                    COSINES, TANGENTS, index, BITS[index], True,
                )  # fmt: skip
                square = first + second
                _store_level(slice_ptr, first_row, codes, D, index, BITS, ORDER, FIELDS)
        else:
            tl.static_assert(BITS == (4, 2, 2, 2))
            word, squares = tree_words.first_word(tree_words.channels_of_trees(numbers, D // 16))
            at = (slice_ptr + FIELDS[0] + first_row * (D // 4)).to(tl.pointer_type(tl.int32))
            tl.store(at + tl.arange(0, ROWS * D // 16), tree.to_memory(word, ORDER))
            word, square = tree_words.next_word(squares, TANGENTS)
        TREES: tl.constexpr = D >> LEVELS
        radius = tl.sqrt(square)
        if DEEP:
            some = products > 0
            radius = tl.where(some, square / tl.where(some, products, 1.0), radius)
        radius *= inverse * SCALE
        half = radius.to(tl.float16)
        fine = half.to(tl.float32) <= rotate.FP16_MAX
        if FORM == "published":
            code = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        else:
            code = tree.log_codes(radius)
        BYTES: tl.constexpr = 2 if FORM == "published" else 1
        at = slice_ptr + FIELDS[LEVELS] + first_row * (TREES * BYTES)
        if DEEP:
            rotate.refuse(flags_ptr + slice_index, fine)
            streams.store_stream(at, tree.to_memory(code, "rows"), 8 * BYTES)
        else:
            # All that is left of a tree changes threads at once.
            word = tree.to_memory(word | (code << 14) | tl.where(fine, 0, 1 << 30), ORDER)
            codes = (word >> 14) & ((1 << (8 * BYTES)) - 1)
            at = at.to(tl.pointer_type(tl.int16 if BYTES == 2 else tl.uint8))
            tl.store(at + tl.arange(0, ROWS * TREES), codes.to(at.dtype.element_ty))
            words = _four(word)
            for index in tl.static_range(1, 4):
                at = slice_ptr + FIELDS[index] + first_row * (TREES * (16 >> index)) // 8
                _store_four(at, words, SHIFT=(0, 6, 2, 0)[index], BITS=16 >> index)
            refused = (words[0] | words[1] | words[2] | words[3]) >= 1 << 30
            flag = flags_ptr + slice_index + tl.zeros(refused.shape, tl.int32)
            tl.store(flag, 1, mask=refused)


@triton.jit
def _tiles(
    x_ptr,
    slots_ptr,
    item,
    stride_n,
    stride_t,
    stride_h,
    T: tl.constexpr,
    D: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loads an item's rows as tiles."""
    slice_index = (item // ITEMS).to(tl.int64)
    row, channel = fragments.tile_rows(ROWS, D)
    row += item % ITEMS * ROWS
    rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
    return tl.load(x_ptr + (rows + channel)[:, None] + tl.arange(0, 32)[None, :])


@triton.jit
def _fetch(
    x_ptr,
    slots_ptr,
    item,
    stride_n,
    stride_t,
    stride_h,
    T: tl.constexpr,
    D: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Brings an item's rows of two bytes a number into the second-level cache."""
    if not INTERPRETED:
        LINES: tl.constexpr = (D + 63) // 64
        index = tl.arange(0, ROWS * LINES)
        row = index // LINES + item % ITEMS * ROWS
        slice_index = (item // ITEMS).to(tl.int64)
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [x_ptr + rows + index % LINES * 64],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _four(numbers):
    """Splits [N] into four of [N / 4], every fourth number each."""
    even, odd = tl.split(tl.reshape(numbers, [numbers.shape[0] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store_four(at_ptr, words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Stores bits SHIFT to SHIFT + BITS of four neighbours, int32 [N] each, 4 BITS together."""
    MASK: tl.constexpr = (1 << BITS) - 1
    joined = (words[0] >> SHIFT) & MASK
    for index in tl.static_range(1, 4):
        joined |= ((words[index] >> SHIFT) & MASK) << (BITS * index)
    dtype: tl.constexpr = tl.int32 if BITS == 8 else tl.int16 if BITS == 4 else tl.uint8
    tl.store(at_ptr.to(tl.pointer_type(dtype)) + tl.arange(0, joined.shape[0]), joined.to(dtype))


@triton.jit
def _store_level(
    slice_ptr,
    first_row,
    codes,
    D: tl.constexpr,
    LEVEL: tl.constexpr,
    BITS: tl.constexpr,
    ORDER: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Stores codes, int32 [ROWS, D >> (LEVEL + 1)], of a level counted from 0."""
    NODES: tl.constexpr = D >> (LEVEL + 1)
    WIDTH: tl.constexpr = BITS[LEVEL]
    at = slice_ptr + FIELDS[LEVEL] + first_row * (NODES * WIDTH) // 8
    if LEVEL < 4:
        numbers = tree.to_memory(tree.gathered(codes, D // 16, WIDTH), ORDER)
        streams.store_stream(at, numbers, (8 >> LEVEL) * WIDTH)
    else:
        streams.store_stream(at, tree.to_memory(codes, "rows"), WIDTH)
