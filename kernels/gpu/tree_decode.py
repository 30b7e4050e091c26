"""The kernel that decodes the recursive codec with the analytic codebook.

Math: kernels/polar/README.md, section 2. Reference: kernels/polar/recursive.py.

A thread holds four trees that are neighbours in memory and turns their codes into 64 channels:
nothing but the rows of the product and its result change threads. fp16 and bf16 take codes of
4-2-2-2 bits from tree_lookup.py; here are all others.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu import centre, fragments, rotate, tree, tree_lookup
from polarcache.kernels.gpu.tree_lookup import apart, halved, joined
from polarcache.kernels.gpu.words import INTERPRETED

ENTRIES = tree.ENTRIES
# Rows of the table: cosines and sines as fp32, then both as fp16, the cosine in the low half.
_SINES = tl.constexpr(1)
_BOTH = tl.constexpr(2)


@triton.jit
def decode_trees(
    packed_ptr,
    out_ptr,
    slots_ptr,
    matrix_ptr,
    table_ptr,
    pairs_ptr,
    num_slices,
    stride_packed_n,
    stride_n,
    stride_t,
    stride_h,
    T: tl.constexpr,
    D: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    CENTRED: tl.constexpr,
    ORDER: tl.constexpr,
    FIELDS: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decodes keys or values.

    Grid: any number of programs.
    Reads: packed uint8 [N, slice_bytes], fields as encode_trees writes them. matrix fp16
    [3, D, D], rows in the order of `_rows`, columns in that of column_channels: high and low
    part of the rotation over SCALE, then the rotation. table int32 [3, levels, ENTRIES]: of the
    angles of codes. pairs int64 [4, ENTRIES]: of two of 4-2-2-2 bits.
    Writes: out fp16, bf16 or fp32 as encode_trees reads x, every element once; fp16 saturates.
    Precision: products of fp16 numbers, each the product of a radius with one cosine or sine a
    level, rounded every time, and fp32 sums; where out is fp32, fp32 products in two parts.
    """
    LEVELS: tl.constexpr = len(BITS)
    WIDE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    AHEAD: tl.constexpr = not WIDE and FORM != "deep"
    if WIDE:
        high, low = rotate.load_matrices(matrix_ptr, D, D, 2)
    else:
        high = rotate.load_matrix(matrix_ptr + 2 * D * D, D, D)
        low = high
    turns = rotate.turns(num_slices * ITEMS)
    if AHEAD:
        tl.static_assert(BITS == (4, 2, 2, 2))
        angles = rotate.load_table(table_ptr + _BOTH * LEVELS * ENTRIES, ENTRIES)
        pairs = rotate.load_table(pairs_ptr, 4 * ENTRIES)
        codes = tree_lookup.load_codes(
            packed_ptr, tl.program_id(0), stride_packed_n, D, ITEMS, ROWS, FORM, ORDER, FIELDS
        )
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        first_row = item % ITEMS * ROWS
        slice_ptr = packed_ptr + slice_index * stride_packed_n
        if AHEAD:
            x = tree_lookup.channels(codes, angles, pairs)
            # The last item is loaded once more.
            item = tl.program_id(0) + tl.minimum(turn + 1, turns - 1) * tl.num_programs(0)
            codes = tree_lookup.load_codes(
                packed_ptr, item, stride_packed_n, D, ITEMS, ROWS, FORM, ORDER, FIELDS
            )
        else:
            halves = apart(
                _radii(slice_ptr, first_row, table_ptr, D, ROWS, BITS, FORM, ORDER, FIELDS, WIDE),
                4,
            )
            for back in tl.static_range(4):
                halves = _halves(
                    slice_ptr + FIELDS[3 - back], first_row, halves, table_ptr,
                    D, ROWS, LEVELS, 3 - back, BITS[3 - back], WIDE,
                )  # fmt: skip
            x = joined(halves, 64)
            if ORDER == "value":
                x = tl.permute(tl.reshape(x, [ROWS // 8, 4, 4, 64]), (0, 2, 1, 3))
        x = _rows(x, ROWS, D, ORDER)
        if WIDE:
            x_high, x_low, inverse = rotate.split_rows(x)
            numbers = rotate.product(x_high, x_low, high, low, True, 2) * (inverse * SCALE)
        else:
            numbers = rotate.product(x, x, high, low, False, 1)
        if CENTRED:
            at = (slice_ptr + FIELDS[LEVELS + 2]).to(tl.pointer_type(tl.float16))
            scale = tl.load(at + first_row // T).to(tl.float32)
            channel = fragments.column_channels(D)[None, :]
            at = slice_ptr + FIELDS[LEVELS + 1] + first_row // T * D + channel
            numbers += rotate.spread_columns(centre.load_mean(at, channel < D, scale))
        numbers = fragments.to_tiles(_rounded(numbers, out_ptr.dtype.element_ty), ROWS, D)
        row, channel = fragments.tile_rows(ROWS, D)
        row = first_row + _token(row, ORDER)
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        tl.store(out_ptr + (rows + channel)[:, None] + tl.arange(0, 32)[None, :], numbers)


@triton.jit
def _rounded(numbers, dtype: tl.constexpr):
    """Rounds fp32 numbers; fp16 saturates."""
    if dtype != tl.float16:
        return numbers.to(dtype)
    elif INTERPRETED:
        return tl.clamp(numbers, -rotate.FP16_MAX, rotate.FP16_MAX).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;",
            "=r,r,r",
            [numbers],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _halves(
    field_ptr,
    first_row,
    radii,
    table_ptr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    LEVEL: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Takes trees of 16 channels one level down, LEVEL from 3 to 0, with the codes of a field.

    Radii are those of four trees, tree by tree, both halves of a node side by side. So code k is
    that of the place whose bits are k's in reverse.
    """
    NODES: tl.constexpr = 8 >> LEVEL
    WIDTH: tl.constexpr = NODES * BITS
    at = field_ptr + first_row * (D // 16 * WIDTH) // 8
    words = _words(at, ROWS * D // 64, WIDTH)
    codes = ()
    for index in tl.static_range(4 * NODES):
        place = index % NODES
        code = ((place & 1) * 4 + (place & 2) + (place >> 2)) >> LEVEL
        codes += ((words[index // NODES] >> (code * BITS)) & ((1 << BITS) - 1),)
    halves = ()
    if WIDE:
        for index in tl.static_range(4 * NODES):
            halves += _turned(radii[index], codes[index], table_ptr, LEVELS, LEVEL, True)
    else:
        at = table_ptr + (_BOTH * LEVELS + LEVEL) * ENTRIES
        # Shared memory takes an address of 32 bits, and the entries lie in banks of their own.
        both = rotate.look_up(rotate.load_table(at, ENTRIES), joined(codes, 4 * NODES))
        both = apart(both, 4 * NODES)
        for index in tl.static_range(4 * NODES):
            halves += halved(radii[index], both[index])
    return halves


@triton.jit
def _words(at_ptr, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Loads SIZE times four neighbours of a dense stream, int32 [SIZE] each.

    Bits above BITS are not cleared. at_ptr: uint8, a multiple of 4 bytes.
    """
    if BITS >= 8:
        if BITS == 32:
            all_words = tl.load(at_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, 4 * SIZE))
        elif BITS == 16:
            all_words = tl.load(at_ptr.to(tl.pointer_type(tl.int16)) + tl.arange(0, 4 * SIZE))
        else:
            tl.static_assert(BITS == 8)
            all_words = tl.load(at_ptr + tl.arange(0, 4 * SIZE))
        return apart(all_words.to(tl.int32), 4)
    else:
        index = tl.arange(0, SIZE)
        if BITS == 4:
            words = tl.load(at_ptr.to(tl.pointer_type(tl.int16)) + index).to(tl.int32)
        elif BITS == 2:
            words = tl.load(at_ptr + index).to(tl.int32)
        elif BITS == 6:
            words = tl.load(at_ptr + 3 * index).to(tl.int32)
            words |= tl.load(at_ptr + 3 * index + 1).to(tl.int32) << 8
            words |= tl.load(at_ptr + 3 * index + 2).to(tl.int32) << 16
        else:
            tl.static_assert(BITS == 3)
            words = tl.load(at_ptr + index * 3 // 2).to(tl.int32)
            words |= tl.load(at_ptr + index * 3 // 2 + 1).to(tl.int32) << 8
            words = words >> (index % 2 * 4)
        return words, words >> BITS, words >> (2 * BITS), words >> (3 * BITS)


@triton.jit
def _turned(radii, codes, table_ptr, LEVELS: tl.constexpr, LEVEL: tl.constexpr, WIDE: tl.constexpr):
    """Returns radii of both halves of radii of any shape, fp32 with WIDE, else fp16."""
    at = table_ptr + LEVEL * ENTRIES + codes
    if WIDE:
        cosine = tl.load(at).to(tl.float32, bitcast=True)
        sine = tl.load(at + _SINES * LEVELS * ENTRIES).to(tl.float32, bitcast=True)
        return radii * cosine, radii * sine
    else:
        return halved(radii, tl.load(at + _BOTH * LEVELS * ENTRIES))


@triton.jit
def _radii(
    slice_ptr,
    first_row,
    table_ptr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    ORDER: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns radii of trees of 16 channels in the order of memory, fp32 or fp16 [ROWS D / 16]."""
    LEVELS: tl.constexpr = len(BITS)
    TREES: tl.constexpr = D >> LEVELS
    if FORM == "published":
        at = slice_ptr + FIELDS[LEVELS] + first_row * (TREES * 2)
        code = tl.load(at.to(tl.pointer_type(tl.float16)) + tl.arange(0, ROWS * TREES))
        radii = code.to(tl.float32) if WIDE else code
    else:
        at = slice_ptr + FIELDS[LEVELS] + first_row * TREES
        code = tl.load(at + tl.arange(0, ROWS * TREES)).to(tl.int32)
        radii = tree.log_radii(code)
        if not WIDE:
            radii = radii.to(tl.float16)
    if LEVELS > 4:
        # Higher levels lie row by row.
        radii = tl.reshape(radii, [ROWS, TREES])
        for back in tl.static_range(LEVELS - 4):
            radii = _higher_halves(
                slice_ptr + FIELDS[LEVELS - 1 - back], first_row, radii, table_ptr,
                LEVELS, LEVELS - 1 - back, BITS[LEVELS - 1 - back], WIDE,
            )  # fmt: skip
        radii = tree.to_memory(tree.by_lane(radii, ORDER), ORDER)
    return radii


@triton.jit
def _higher_halves(
    field_ptr,
    first_row,
    radii,
    table_ptr,
    LEVELS: tl.constexpr,
    LEVEL: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Takes rows of larger trees one level down: [ROWS, NODES] to [ROWS, 2 NODES]."""
    ROWS: tl.constexpr = radii.shape[0]
    NODES: tl.constexpr = radii.shape[1]
    first, second, third, fourth = _words(
        field_ptr + first_row * (NODES * BITS) // 8, ROWS * NODES // 4, BITS
    )
    codes = tl.join(tl.join(first, third), tl.join(second, fourth))
    codes = tl.reshape(codes, [ROWS, NODES]) & ((1 << BITS) - 1)
    halves = tl.join(*_turned(radii, codes, table_ptr, LEVELS, LEVEL, WIDE))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), [ROWS, 2 * NODES])


@triton.jit
def _rows(x, M: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr):
    """Orders channels of trees in the order of tree_lookup.by_lane, [M D], as rows [M, D].

    Of a tree, channel i stands at the place whose four bits are i's in reverse. Of keys, lane
    4 g + c holds trees of rows g and g + 8: they stay there, as columns 16 j + 8 f + 2 c + e. Of
    values, lanes 16 apart exchange half of what they hold; rows then follow `_token`. Else trees
    follow each other.
    """
    B: tl.constexpr = D // 16
    if ORDER == "key":
        x = tl.reshape(x, [M // 16, 8, 4, B // 4, 2, 4, 2, 2])
        x = tl.permute(x, (0, 4, 1, 3, 5, 6, 2, 7))
    elif ORDER == "value":
        tl.static_assert(B == 8)
        x = tl.reshape(x, [M // 16, 2, 4, 4, 2, 2, 4, 2, 2])
        x = tl.permute(x, (0, 4, 5, 2, 1, 6, 7, 3, 8))
    return tl.reshape(x, [M, D])


@triton.jit
def _token(row, ORDER: tl.constexpr):
    """Returns the token of rows of a product, int32 of any shape."""
    if ORDER == "value":
        return row // 8 * 8 + row % 4 * 2 + row // 4 % 2
    else:
        return row
