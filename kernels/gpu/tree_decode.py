"""The kernel that decodes the recursive codec with the analytic codebook.

Math: kernels/polar/README.md, section 2. Reference: kernels/polar/recursive.py.

A thread holds four trees that are neighbours in memory and turns their codes into 64 channels:
nothing but the rows of the product and its result change threads. The cosine and the sine of a
2-bit code are bytes of two registers, those of longer codes an entry of a table in shared memory.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu import centre, rotate, tree
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
    PAIRS: tl.constexpr,
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
    [3, D, D], rows in the order of `_rows`: high and low part of the rotation over SCALE, then the
    rotation. table int32 [3, levels, ENTRIES]: of the angles of codes.
    Writes: out fp16, bf16 or fp32 as encode_trees reads x, every element once; fp16 saturates.
    Precision: products of fp16 numbers, each the product of a radius with one cosine or sine a
    level, rounded every time, and fp32 sums; where out is fp32, fp32 products in two parts.
    """
    LEVELS: tl.constexpr = len(BITS)
    WIDE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    if WIDE:
        high, low = rotate.load_matrices(matrix_ptr, D, D, 2)
    else:
        high = rotate.load_matrix(matrix_ptr + 2 * D * D, D, D)
        low = high
    channel = tl.arange(0, D)
    known = (channel < D)[None, :]
    turns = rotate.turns(num_slices * ITEMS)
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        first_row = item % ITEMS * ROWS
        slice_ptr = packed_ptr + slice_index * stride_packed_n
        radii = _radii(slice_ptr, first_row, table_ptr, D, ROWS, BITS, FORM, ORDER, FIELDS, WIDE)
        radii = _four(radii)
        for back in tl.static_range(4):
            radii = _halves(
                slice_ptr + FIELDS[3 - back], first_row, radii, table_ptr,
                D, ROWS, LEVELS, 3 - back, BITS[3 - back], PAIRS, WIDE,
            )  # fmt: skip
        x = _rows(_joined(radii, 64), ROWS, D, ORDER)
        if WIDE:
            x_high, x_low, inverse = rotate.split_rows(x)
            numbers = rotate.product(x_high, x_low, high, low, True, 2) * (inverse * SCALE)
        else:
            numbers = rotate.product(x, x, high, low, False, 1)
        if CENTRED:
            at = (slice_ptr + FIELDS[LEVELS + 2]).to(tl.pointer_type(tl.float16))
            scale = tl.load(at + first_row // T).to(tl.float32)
            at = slice_ptr + FIELDS[LEVELS + 1] + first_row // T * D + channel[None, :]
            numbers += rotate.spread_columns(centre.load_mean(at, known, scale))
        numbers = numbers.to(out_ptr.dtype.element_ty)
        if out_ptr.dtype.element_ty == tl.float16:
            # Two numbers an instruction, unlike tl.clamp.
            most = tl.full([ROWS, D], rotate.FP16_MAX, tl.float16)
            numbers = tl.maximum(tl.minimum(numbers, most), -most)
        row = first_row + tl.arange(0, ROWS)
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        tl.store(out_ptr + rows[:, None] + channel[None, :], numbers)


@triton.jit
def _four(numbers):
    """Splits [N] into what each of a thread's trees has: four of [N / 4]."""
    even, odd = tl.split(tl.reshape(numbers, [numbers.shape[0] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


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
    PAIRS: tl.constexpr,
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
        if BITS == 2:
            both = _chosen(codes, at, 4 * NODES, PAIRS[2 * LEVEL], PAIRS[2 * LEVEL + 1])
        else:
            # Shared memory takes an address of 32 bits, and the entries lie in banks of their own.
            both = rotate.look_up(rotate.load_table(at, ENTRIES), _joined(codes, 4 * NODES))
            both = _apart(both, 4 * NODES)
        for index in tl.static_range(4 * NODES):
            halves += _halved(radii[index], both[index])
    return halves


@triton.jit
def _chosen(codes, table_ptr, COUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Looks up COUNT tensors of 2-bit codes, by bytes of four cosines.

    Args:
        codes: int32 of any shape.
        table_ptr: int32 [4], cosine and sine of each code as fp16.
        COUNT: how many.
        LOW: cosines of codes 0 and 1 as fp16; the sine is the cosine of the mirrored code.
        HIGH: of codes 2 and 3.
    """
    both = ()
    for index in tl.static_range(COUNT):
        if INTERPRETED:
            both += (tl.load(table_ptr + codes[index]),)
        else:
            # Bytes 2 c and 2 c + 1 of the four, then 6 - 2 c and 7 - 2 c.
            places = codes[index] * -0x21DE + 0x7610
            both += (
                tl.inline_asm_elementwise(
                    "prmt.b32 $0, $2, $3, $1;",
                    "=r,r,r,r",
                    [places, LOW, HIGH],
                    dtype=tl.int32,
                    is_pure=True,
                    pack=1,
                ),
            )
    return both


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
        return _four(all_words.to(tl.int32))
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
def _joined(parts, COUNT: tl.constexpr):
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
def _apart(numbers, COUNT: tl.constexpr):
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


@triton.jit
def _turned(radii, codes, table_ptr, LEVELS: tl.constexpr, LEVEL: tl.constexpr, WIDE: tl.constexpr):
    """Returns radii of both halves of radii of any shape, fp32 with WIDE, else fp16."""
    at = table_ptr + LEVEL * ENTRIES + codes
    if WIDE:
        cosine = tl.load(at).to(tl.float32, bitcast=True)
        sine = tl.load(at + _SINES * LEVELS * ENTRIES).to(tl.float32, bitcast=True)
        return radii * cosine, radii * sine
    else:
        return _halved(radii, tl.load(at + _BOTH * LEVELS * ENTRIES))


@triton.jit
def _halved(radii, both):
    """Returns radii of both halves in fp16, of radii, cosines in low halves, sines in high ones."""
    cosine = both.to(tl.int16).to(tl.float16, bitcast=True)
    sine = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return radii * cosine, radii * sine


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
    """Orders channels of trees in the order of memory, [M D], as rows [M, D].

    Trees follow each other as columns of tree.to_memory; of a tree, channel i stands at the place
    whose four bits are i's in reverse.
    """
    B: tl.constexpr = D // 16
    if ORDER == "key":
        x = tl.permute(tl.reshape(x, [M // 16, 8, 4, B // 4, 2, 16]), (0, 4, 1, 2, 3, 5))
    elif ORDER == "value":
        x = tl.reshape(x, [M // 16, 8, 4, B // 8, 2, 2, 16])
        x = tl.permute(x, (0, 4, 2, 5, 3, 1, 6))
    return tl.reshape(x, [M, D])
