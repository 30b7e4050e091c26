"""The kernel that encodes the recursive codec with the analytic codebook.

Programs go from item to item: an item is ROWS rows, head by head and token by token, of one slice,
for centred keys all tokens of one head. The matrix is loaded once a program.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu import centre, rotate, streams, tree, tree_words


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
    SCALE, columns in the order of the trees. cosines fp32 [levels, 16], angles of each level.
    Writes: out uint8 [N, slice_bytes] at bytes FIELDS: levels, radii and, of centred keys, means
    and scales, every byte once; flags int32 [N], 1 where a radius or mean does not fit fp16.
    Reference: kernels/polar/recursive.py.
    """
    DEEP: tl.constexpr = FORM == "deep"
    LEVELS: tl.constexpr = len(BITS)
    high, low = rotate.load_matrices(matrix_ptr, D, D, 2)
    channel = tl.arange(0, D)
    turns = rotate.turns(num_slices * ITEMS)
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        first_row = item % ITEMS * ROWS
        row = first_row + tl.arange(0, ROWS)
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        x = tl.load(x_ptr + rows[:, None] + channel[None, :])
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
            words, squares = tree_words.first_words(tree_words.channels_of_trees(numbers, D // 16))
            _store_words(slice_ptr, first_row, words, 0, 32, ORDER, FIELDS)
            for index in tl.static_range(1, 4):
                words, squares = tree_words.next_words(squares, TANGENTS, index)
                _store_words(slice_ptr, first_row, words, index, 16 >> index, ORDER, FIELDS)
            square = squares[0]
        TREES: tl.constexpr = D >> LEVELS
        radius = tl.sqrt(square)
        if DEEP:
            some = products > 0
            radius = tl.where(some, square / tl.where(some, products, 1.0), radius)
        radius *= inverse * SCALE
        half = radius.to(tl.float16)
        rotate.refuse(flags_ptr + slice_index, half.to(tl.float32) <= rotate.FP16_MAX)
        if FORM == "published":
            code = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        else:
            code = tree.log_codes(radius)
        BYTES: tl.constexpr = 2 if FORM == "published" else 1
        at = slice_ptr + FIELDS[LEVELS] + first_row * (TREES * BYTES)
        streams.store_stream(at, tree.to_memory(code, "rows" if DEEP else ORDER), 8 * BYTES)


@triton.jit
def _store_words(
    slice_ptr,
    first_row,
    words,
    LEVEL: tl.constexpr,
    BITS: tl.constexpr,
    ORDER: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Stores the BITS bits that trees, int32 [ROWS, B], have in a level counted from 0."""
    at = slice_ptr + FIELDS[LEVEL] + first_row * (words.shape[1] * BITS) // 8
    streams.store_stream(at, tree.to_memory(words, ORDER), BITS)


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
