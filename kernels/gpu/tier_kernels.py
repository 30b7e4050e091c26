"""The kernels of tiered pairs: bits by the rank of a pair, one head of one slice a program.

Math: kernels/polar/README.md, section 1. Reference: kernels/polar/arcs.py.
"""

import triton
import triton.language as tl

from polarcache.kernels.gpu.arc import (
    MAX_ARC_EXPONENT,
    STARTS,
    TAU,
    arc_middle,
    arc_step,
    power,
    sectors,
    whole_arc,
)
from polarcache.kernels.gpu.pair_decode import turn
from polarcache.kernels.gpu.pair_encode import (
    FP16_MAX,
    HALF,
    TINY,
    merge_angles,
    merge_sectors,
    pair_channels,
    polar,
)
from polarcache.kernels.gpu.streams import load_stream, store_stream
from polarcache.kernels.gpu.words import reciprocal, token_rows, whole


@triton.jit
def _ranks(numbers, FALLING: tl.constexpr):
    """Returns the place of each of [P] numbers when sorted, stable: int32 [P]."""
    P: tl.constexpr = numbers.shape[0]
    own, other = numbers[:, None], numbers[None, :]
    before = other > own if FALLING else other < own
    index = tl.arange(0, P)
    before = before | ((other == own) & (index[None, :] < index[:, None]))
    return tl.sum(tl.where(before, 1, 0), 1)


@triton.jit
def _inverse(ranks):
    """Returns which element has each rank: int32 [P]."""
    index = tl.arange(0, ranks.shape[0])
    return tl.sum(tl.where(ranks[None, :] == index[:, None], index[None, :], 0), 1)


@triton.jit
def _bits_of(ranks, CLASSES: tl.constexpr, WHICH: tl.constexpr):
    """Returns bits of radius (WHICH 1) or angle (2), int32, of pairs by rank."""
    bits = tl.full(ranks.shape, CLASSES[0][WHICH], tl.int32)
    for index in tl.static_range(1, 5):
        bits = tl.where(ranks >= CLASSES[index][3], CLASSES[index][WHICH], bits)
    return bits


@triton.jit
def _codes(numbers, zero, scale, bits):
    """Returns floor((numbers - zero) / scale) of [G, g, P], clamped to bits [1, 1, P]; int32."""
    place = (numbers - (zero + HALF * scale)[:, None, :]) * reciprocal(scale)[:, None, :]
    place = whole(tl.minimum(tl.maximum(place, 0.0), 255.0))
    return tl.minimum(place.to(tl.int32), (1 << bits) - 1)


@triton.jit
def encode_tiers(
    x_ptr,
    slots_ptr,
    query_ptr,
    out_ptr,
    flags_ptr,
    num_slices,
    stride_n,
    stride_t,
    stride_h,
    stride_out_n,
    T: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FIELDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Encodes keys.

    Grid: any number of programs; an item is one head of one slice, T a power of two.
    Reads: x fp16, bf16 or fp32 [N, T, H, D], last dim contiguous; or, where slots_ptr int64 [N, T]
    names the rows, [rows, H, D]; query fp32 [N, H, D / 2], energies of queries, or None.
    Writes: order, arcs, radii and radius and angle codes of each class at bytes FIELDS of out
    uint8 [N, slice_bytes], every byte once; flags int32 [N], 1 where a slice is refused.
    CLASSES: pairs, radius bits, angle bits and first rank of each class.
    """
    P: tl.constexpr = D // 2
    NG: tl.constexpr = T // GROUP
    pair = tl.arange(0, P)
    channel_1, channel_2 = pair_channels(pair, D, ROTARY, INTERLEAVED)
    turns = tl.cdiv(num_slices * ITEMS - tl.program_id(0), tl.num_programs(0))
    for index in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + index * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        head = item % ITEMS
        rows = token_rows(slots_ptr, slice_index, tl.arange(0, T), stride_n, stride_t, T)
        rows += head.to(tl.int64) * stride_h
        x = tl.load(x_ptr + rows[:, None] + channel_1[None, :]).to(tl.float32)
        y = tl.load(x_ptr + rows[:, None] + channel_2[None, :]).to(tl.float32)
        square, radius, angle = polar(x, y, False)
        present = square > 2 * TINY
        occupied = tl.reshape(sectors(angle, present), [NG, GROUP, P])
        angle = tl.reshape(tl.where(present, angle, float("nan")), [NG, GROUP, P])
        radius = tl.reshape(radius, [NG, GROUP, P])
        low, high, start, stop, occupied = tl.reduce(
            (radius, radius, angle, angle, occupied), 1, merge_sectors
        )
        middle = arc_middle(occupied, start, stop)
        angle -= middle[:, None, :]
        angle -= TAU * whole(angle * (1 / TAU))
        start, stop = tl.reduce((angle, angle), 1, merge_angles)
        some = high * high > 2 * TINY
        start, stop = tl.where(some, start, 0.0), tl.where(some, stop, 0.0)
        arc, exponent = whole_arc(middle, start, stop)

        spread = (high + low) * (power(exponent) * (TAU / 8))
        weight = tl.sum((high - low) * (high - low) + spread * spread, 0)
        if query_ptr is not None:
            weight *= tl.load(query_ptr + (slice_index * ITEMS + head) * P + pair)
        ranks = _ranks(weight, True)
        order = _inverse(ranks)
        radius_bits = _bits_of(ranks, CLASSES, 1)[None, :]
        angle_bits = _bits_of(ranks, CLASSES, 2)[None, :]
        step, gain = arc_step(exponent, angle_bits)
        radius_min = (low * gain).to(tl.float16)
        radius_scale = ((high - low) * gain * power(radius_bits)).to(tl.float16)

        slice_ptr = out_ptr + slice_index * stride_out_n
        tl.store(slice_ptr + FIELDS[0] + head * P + pair, order.to(tl.uint8))
        group = (head * NG + tl.arange(0, NG))[:, None] * (2 * P) + pair[None, :]
        arc_bytes = (arc << 4) | exponent
        tl.store(slice_ptr + FIELDS[1] + group, ((arc_bytes >> 8) & 0xFF).to(tl.uint8))
        tl.store(slice_ptr + FIELDS[1] + P + group, (arc_bytes & 0xFF).to(tl.uint8))
        at = (slice_ptr + FIELDS[2]).to(tl.pointer_type(tl.float16)) + group
        tl.store(at, radius_min)
        tl.store(at + P, radius_scale)
        fine = tl.maximum(high, radius_min.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        refused = tl.max(tl.reshape(tl.where(fine <= FP16_MAX, 0, 1), [NG * P]), 0)
        if refused > 0:
            tl.store(flags_ptr + slice_index, 1)

        zero, scale = radius_min.to(tl.float32), radius_scale.to(tl.float32)
        codes = _codes(radius * gain[:, None, :], zero, scale, radius_bits[:, None, :])
        zero = arc.to(tl.float32) * (TAU / STARTS) - middle
        codes |= _codes(angle, zero, step, angle_bits[:, None, :]) << 8
        codes = tl.reshape(codes, [T, P])
        for kind in tl.static_range(5):
            _store_class(slice_ptr, head, codes, order, kind, T, CLASSES, FIELDS)


@triton.jit
def _store_class(
    slice_ptr,
    head,
    codes,
    order,
    KIND: tl.constexpr,
    T: tl.constexpr,
    CLASSES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Stores the radius codes (low bytes) and the angle codes of one class."""
    COUNT: tl.constexpr = CLASSES[KIND][0]
    own = tl.gather(order, CLASSES[KIND][3] + tl.arange(0, COUNT), 0)
    own = tl.broadcast_to(own[None, :], [T, COUNT])
    both = tl.reshape(tl.gather(codes, own, 1), [T * COUNT])
    for which in tl.static_range(2):
        at = slice_ptr + FIELDS[3 + 2 * KIND + which]
        at += head * (T * COUNT // 8 * CLASSES[KIND][1 + which])
        store_stream(at, (both >> (8 * which)) & 0xFF, CLASSES[KIND][1 + which])


@triton.jit
def decode_tiers(
    packed_ptr,
    out_ptr,
    slots_ptr,
    num_slices,
    stride_packed_n,
    stride_n,
    stride_t,
    stride_h,
    T: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FIELDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Decodes keys at the centres of their bins; an order that repeats pairs as some permutation.

    Grid: as encode_tiers.
    Reads: packed uint8 [N, slice_bytes], fields as encode_tiers writes them.
    Writes: out fp16, bf16 or fp32 as encode_tiers reads x, every element once.
    Precision: fp32, rounded once.
    """
    P: tl.constexpr = D // 2
    turns = tl.cdiv(num_slices * ITEMS - tl.program_id(0), tl.num_programs(0))
    for index in tl.range(0, turns, num_stages=STAGES):
        item = tl.program_id(0) + index * tl.num_programs(0)
        slice_index = (item // ITEMS).to(tl.int64)
        head = item % ITEMS
        slice_ptr = packed_ptr + slice_index * stride_packed_n
        order = _ranks(tl.load(slice_ptr + FIELDS[0] + head * P + tl.arange(0, P)), False)
        rows = token_rows(slots_ptr, slice_index, tl.arange(0, T), stride_n, stride_t, T)
        row_ptr = out_ptr + (rows + head.to(tl.int64) * stride_h)[:, None]
        for kind in tl.static_range(5):
            _decode_class(
                slice_ptr, row_ptr, head, order, kind, T, D, ROTARY, INTERLEAVED, GROUP, CLASSES,
                FIELDS,
            )  # fmt: skip


@triton.jit
def _decode_class(
    slice_ptr,
    row_ptr,
    head,
    order,
    KIND: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    CLASSES: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Decodes the pairs of one class to pointers [T, 1] of rows."""
    COUNT: tl.constexpr = CLASSES[KIND][0]
    R_BITS: tl.constexpr = CLASSES[KIND][1]
    T_BITS: tl.constexpr = CLASSES[KIND][2]
    NG: tl.constexpr = T // GROUP
    pair = tl.gather(order, CLASSES[KIND][3] + tl.arange(0, COUNT), 0)
    at = slice_ptr + FIELDS[3 + 2 * KIND] + head * (T * COUNT // 8 * R_BITS)
    radius = load_stream(at, T * COUNT, R_BITS) & ((1 << R_BITS) - 1)
    at = slice_ptr + FIELDS[4 + 2 * KIND] + head * (T * COUNT // 8 * T_BITS)
    angle = load_stream(at, T * COUNT, T_BITS) & ((1 << T_BITS) - 1)
    radius = tl.reshape(radius, [NG, GROUP, COUNT]).to(tl.float32)
    angle = tl.reshape(angle, [NG, GROUP, COUNT]).to(tl.float32)

    group = (head * NG + tl.arange(0, NG))[:, None] * D + pair[None, :]
    at = (slice_ptr + FIELDS[2]).to(tl.pointer_type(tl.float16)) + group
    zero, scale = tl.load(at).to(tl.float32), tl.load(at + D // 2).to(tl.float32)
    radius = radius * scale[:, None, :] + (zero + 0.5 * scale)[:, None, :]
    low = tl.load(slice_ptr + FIELDS[1] + D // 2 + group).to(tl.int32)
    arc = (tl.load(slice_ptr + FIELDS[1] + group).to(tl.int32) << 4) | (low >> 4)
    step, _ = arc_step(tl.minimum(low & 15, MAX_ARC_EXPONENT), T_BITS)
    zero = arc.to(tl.float32) * (TAU / STARTS) + 0.5 * step
    cosine, sine = turn(angle * step[:, None, :] + zero[:, None, :])
    first, second = pair_channels(pair, D, ROTARY, INTERLEAVED)
    x, y = tl.reshape(cosine * radius, [T, COUNT]), tl.reshape(sine * radius, [T, COUNT])
    dtype = row_ptr.dtype.element_ty
    if dtype == tl.float16:
        x, y = tl.clamp(x, -FP16_MAX, FP16_MAX), tl.clamp(y, -FP16_MAX, FP16_MAX)
    tl.store(row_ptr + first[None, :], x.to(dtype))
    tl.store(row_ptr + second[None, :], y.to(dtype))
