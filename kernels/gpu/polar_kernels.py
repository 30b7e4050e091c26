"""The kernels of the universal polar codec: keys, values, and both back.

Programs go from item to item: an item is ROWS rows, head by head and token by token, of one slice,
for keys all tokens of one head. The matrix is loaded once a program.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu import centre, rotate, universal
from polarcache.kernels.gpu.pair_encode import pair_channels


@triton.jit
def encode_values(
    x_ptr,
    slots_ptr,
    out_ptr,
    flags_ptr,
    matrix_ptr,
    radii_ptr,
    counts_ptr,
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
    RING_BITS: tl.constexpr,
    BOUNDS: tl.constexpr,
    FEWEST: tl.constexpr,
    TILES: tl.constexpr,
    FIELDS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Encodes values.

    Grid: any number of programs.
    Reads: x fp16, bf16 or fp32 [N, T, H, D], last dim contiguous; or, where slots_ptr int64 [N, T]
    names the rows, [rows, H, D]. matrix fp16 [PARTS, K, K], K the power of two
    not below D, columns the first channels of mixed pairs, then the second. radii fp32
    and counts int32, both [2**RING_BITS]: the rings, as universal takes them.
    Writes: codes and gains at bytes FIELDS of out uint8 [N, slice_bytes], every byte
    once; flags int32 [N], 1 where a gain does not fit fp16.
    Reference: kernels/polar/universal.py.
    """
    K: tl.constexpr = triton.next_power_of_2(D)
    high, low = rotate.load_matrices(matrix_ptr, K, K, PARTS)
    radii = rotate.load_table(radii_ptr, 1 << RING_BITS)
    counts = rotate.load_table(counts_ptr, 1 << RING_BITS)
    channel = tl.arange(0, K)
    turns = rotate.turns(num_slices * ITEMS)
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        row = item % ITEMS * ROWS + tl.arange(0, ROWS)
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        at = x_ptr + rows[:, None] + channel[None, :]
        # Without a mask where none is needed: loads ahead go to shared memory at once.
        x = tl.load(at) if K == D else tl.load(at, mask=(channel < D)[None, :], other=0.0)
        x_high, x_low, inverse = rotate.split_rows(x)
        mixed = rotate.product(x_high, x_low, high, low, x.dtype == tl.float32, PARTS)
        first, second = rotate.halves(mixed)
        known = (tl.arange(0, K // 2) < D // 2)[None, :]
        codes, gains = universal.encode_pairs_of_rows(
            first, second, known, radii, counts, D, RING_BITS, BOUNDS, FEWEST, K != D
        )
        slice_ptr = out_ptr + slice_index * stride_out_n
        first_row = item % ITEMS * ROWS
        codes_ptr = slice_ptr + FIELDS[0] + first_row * (D // 16 * BITS)
        universal.store_value_codes(codes_ptr.to(tl.pointer_type(tl.int32)), codes, D, BITS, TILES)
        gains = (gains * (inverse * SCALE)).to(tl.float16)
        at = (slice_ptr + FIELDS[1]).to(tl.pointer_type(tl.float16)) + row[:, None]
        tl.store(at, gains)
        rotate.refuse(flags_ptr + slice_index, gains.to(tl.float32) <= rotate.FP16_MAX)


@triton.jit
def encode_keys(
    x_ptr,
    slots_ptr,
    query_ptr,
    out_ptr,
    flags_ptr,
    matrix_ptr,
    radii_ptr,
    counts_ptr,
    num_slices,
    stride_n,
    stride_t,
    stride_h,
    stride_out_n,
    T: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    RING_BITS: tl.constexpr,
    BOUNDS: tl.constexpr,
    FEWEST: tl.constexpr,
    TILES: tl.constexpr,
    FIELDS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Encodes keys.

    Grid: any number of programs; an item is one head of one slice, T a power of two.
    Reads: x and rings as encode_values; matrix fp16 [2, PARTS, P, 2 P], for the first channels of
    pairs and for the second; query fp32 [N, H, D / 2], energies of queries, or None.
    Writes: the fields at bytes FIELDS: means, scales, balance, codes, gains.
    Reference: kernels/polar/centre.py, kernels/polar/universal.py.
    """
    P: tl.constexpr = triton.next_power_of_2(D // 2)
    matrix_1, low_1 = rotate.load_matrices(matrix_ptr, P, 2 * P, PARTS)
    matrix_2, low_2 = rotate.load_matrices(matrix_ptr + PARTS * P * 2 * P, P, 2 * P, PARTS)
    radii = rotate.load_table(radii_ptr, 1 << RING_BITS)
    counts = rotate.load_table(counts_ptr, 1 << RING_BITS)
    pair = tl.arange(0, P)
    known = (pair < D // 2)[None, :]
    real = pair
    if 2 * P != D:
        real = tl.minimum(pair, D // 2 - 1)
    channel_1, channel_2 = pair_channels(real, D, ROTARY, INTERLEAVED)
    turns = rotate.turns(num_slices * ITEMS)
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        head = item % ITEMS
        row = head * T + tl.arange(0, T)
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        x_1 = tl.load(x_ptr + rows[:, None] + channel_1[None, :]).to(tl.float32)
        x_2 = tl.load(x_ptr + rows[:, None] + channel_2[None, :]).to(tl.float32)
        if 2 * P != D:
            x_1, x_2 = tl.where(known, x_1, 0.0), tl.where(known, x_2, 0.0)

        slice_ptr = out_ptr + slice_index * stride_out_n
        scales_ptr = (slice_ptr + FIELDS[1]).to(tl.pointer_type(tl.float16)) + 2 * head
        one = tl.arange(0, 1)[:, None]
        mean_1, mean_2 = centre.mean_rows(x_1, T), centre.mean_rows(x_2, T)
        scale = centre.larger(centre.largest(mean_1, 1), centre.largest(mean_2, 1)).to(tl.float16)
        tl.store(scales_ptr + one, scale)
        means_ptr = slice_ptr + FIELDS[0] + head * D
        x_1 = centre.take_mean(x_1, mean_1, scale, means_ptr + channel_1[None, :], known)
        x_2 = centre.take_mean(x_2, mean_2, scale, means_ptr + channel_2[None, :], known)

        energy = centre.mean_rows(x_1 * x_1, T) + centre.mean_rows(x_2 * x_2, T)
        query_at = None
        if query_ptr is not None:
            query_at = query_ptr + (slice_index * ITEMS + head) * (D // 2) + pair[None, :]
        balance = centre.balance_codes(energy, query_at, known, D // 2)
        balance_ptr = slice_ptr + FIELDS[2] + head * (D // 2)
        tl.store(balance_ptr + pair[None, :], balance.to(tl.uint8), mask=known)
        weight = centre.balance(balance, 1.0)
        x_1, x_2 = x_1 * weight, x_2 * weight

        largest = tl.maximum(tl.abs(x_1), tl.abs(x_2))
        factor, inverse = rotate.powers(tl.max(largest, 1, keep_dims=True))
        high_1, rest_1 = rotate.split_scaled(x_1 * factor, True)
        high_2, rest_2 = rotate.split_scaled(x_2 * factor, True)
        mixed = rotate.product(high_1, rest_1, matrix_1, low_1, True, PARTS)
        mixed = rotate.add_product(mixed, high_2, rest_2, matrix_2, low_2, True, PARTS)
        first, second = rotate.halves(mixed)
        codes, gains = universal.encode_pairs_of_rows(
            first, second, known, radii, counts, D, RING_BITS, BOUNDS, FEWEST, 2 * P != D
        )
        codes_ptr = slice_ptr + FIELDS[3] + head * (T * D // 16 * BITS)
        universal.store_key_codes(codes_ptr.to(tl.pointer_type(tl.int32)), codes, D, BITS, TILES)
        gains = gains * (inverse * SCALE)
        most = centre.largest(gains, 0).to(tl.float16)
        tl.store(scales_ptr + 1 + one, most)
        gain = centre.gain_codes(gains, most.to(tl.float32))
        tl.store(slice_ptr + FIELDS[4] + row[:, None], gain.to(tl.uint8))
        fine = (scale.to(tl.float32) <= rotate.FP16_MAX) & (most.to(tl.float32) <= rotate.FP16_MAX)
        rotate.refuse(flags_ptr + slice_index, fine)


@triton.jit
def decode_rows(
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
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEY: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    TILES: tl.constexpr,
    FIELDS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decodes keys or values.

    Grid: any number of programs.
    Reads: packed uint8 [N, slice_bytes]: of keys means, scales, balance, codes, gains at bytes
    FIELDS; of values codes and gains. matrix fp16 [2, PARTS, P, K], for the first channels of
    mixed pairs and for the second, P in the order of the columns of the encoder. table int32
    [2, 256]: of every code both channels as fp16, the first in the low half, and what is left.
    Writes: out fp16, bf16 or fp32 as the encoders read it, every element once.
    Precision: products of fp16 numbers, fp32 sums; in two parts where out is fp32.
    """
    K: tl.constexpr = triton.next_power_of_2(D)
    P: tl.constexpr = K // 2
    LOW: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    # No channel is larger than the row, whose D / 2 radii are at most 8.
    LARGEST: tl.constexpr = 8 * D
    matrix_1, low_1 = rotate.load_matrices(matrix_ptr, P, K, PARTS)
    matrix_2, low_2 = rotate.load_matrices(matrix_ptr + PARTS * P * K, P, K, PARTS)
    table = rotate.load_table(table_ptr, 256)
    low_table = rotate.load_table(table_ptr + 256, 256)
    channel = tl.arange(0, K)
    ok = (channel < D)[None, :]
    CODES: tl.constexpr = FIELDS[3] if KEY else FIELDS[0]
    GAINS: tl.constexpr = FIELDS[4] if KEY else FIELDS[1]
    turns = rotate.turns(num_slices * ITEMS)
    for turn in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        first_row = item % ITEMS * ROWS
        row = first_row + tl.arange(0, ROWS)
        slice_ptr = packed_ptr + slice_index * stride_packed_n
        codes_ptr = (slice_ptr + CODES + first_row * (D // 16 * BITS)).to(tl.pointer_type(tl.int32))
        words = universal.load_lanes(codes_ptr, ROWS // 2, D, BITS, TILES)
        high_1, high_2 = universal.pairs_of_words(words, table)
        high_1, high_2 = universal.rows_of_words(high_1, KEY), universal.rows_of_words(high_2, KEY)
        rest_1, rest_2 = high_1, high_2
        if LOW:
            rest_1, rest_2 = universal.pairs_of_words(words, low_table)
            rest_1 = universal.rows_of_words(rest_1, KEY)
            rest_2 = universal.rows_of_words(rest_2, KEY)
        numbers = rotate.product(high_1, rest_1, matrix_1, low_1, LOW, PARTS)
        numbers = rotate.add_product(numbers, high_2, rest_2, matrix_2, low_2, LOW, PARTS)
        if KEY:
            head = item % ITEMS * ROWS // T
            scales_ptr = (slice_ptr + FIELDS[1]).to(tl.pointer_type(tl.float16)) + 2 * head
            most = tl.load(scales_ptr + 1).to(tl.float32)
            code = tl.load(slice_ptr + GAINS + row[:, None]).to(tl.int32)
            gains = centre.decoded_gains(code, most)
            pair = universal.pair_of(channel, D, ROTARY, INTERLEAVED)
            at = slice_ptr + FIELDS[2] + head * (D // 2) + pair[None, :]
            weight = centre.balance(tl.load(at, mask=ok, other=0).to(tl.int32), -1.0)
            scale = tl.load(scales_ptr).to(tl.float32)
            mean = centre.load_mean(slice_ptr + FIELDS[0] + head * D + channel[None, :], ok, scale)
            bound = gains * (LARGEST * tl.max(weight, 1, keep_dims=True)) + scale
            weight, mean = rotate.spread_columns(weight), rotate.spread_columns(mean)
            numbers = numbers * (gains * SCALE) * weight + mean
        else:
            at = (slice_ptr + GAINS).to(tl.pointer_type(tl.float16)) + row[:, None]
            gains = tl.load(at).to(tl.float32)
            numbers = numbers * (gains * SCALE)
            bound = gains * LARGEST
        rows = rotate.head_rows(slots_ptr, slice_index, row, stride_n, stride_t, stride_h, T)
        rotate.store_rows(out_ptr, rows, numbers, bound, ok)
