"""Attention over packed pages in Triton: tiles of tokens with a running softmax, then a merge.

Source: split-KV decoding after Dao et al. (arXiv 2205.14135, 2307.08691); the running softmax is
Milakov and Gimelshein's (arXiv 1805.02867). Keys and values are decoded in registers, from the
bytes as they lie in the pages.
"""

import triton
import triton.language as tl

from polarcache.kernels.attention.load_keys import LOW_SHIFT, key_channels, load_keys
from polarcache.kernels.attention.load_tiers import load_tiers, tier_queries
from polarcache.kernels.attention.load_trees import load_trees, mean_scores
from polarcache.kernels.attention.load_values import load_values, value_channels
from polarcache.kernels.attention.page_queries import as_halves, page_gains, page_queries

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Sequences of at most so many tokens are too short to average the rounding of keys to fp16.
FEW_TOKENS = tl.constexpr(128)


@triton.jit
def _rows(starts_ptr, sequence, tile, BM: tl.constexpr, SHARE: tl.constexpr):
    """Returns this program's query rows, heads of the share, and whether they exist, [BM] each."""
    start = tl.load(starts_ptr + sequence)
    stop = tl.load(starts_ptr + sequence + 1)
    flat = tile * BM + tl.arange(0, BM)
    row = start + flat // SHARE
    return row, flat % SHARE, row < stop


@triton.jit
def attend_kernel(
    q_ptr,
    memory_ptr,
    table_ptr,
    lengths_ptr,
    starts_ptr,
    positions_ptr,
    out_ptr,
    lse_ptr,
    key_table_ptr,
    value_table_ptr,
    mix_ptr,
    raw_q_ptr,
    max_pages,
    slice_offset,
    row_tiles,
    splits,
    scale,
    soft_cap,
    window,
    sinks,
    one,
    KEY_KIND: tl.constexpr,
    KEY: tl.constexpr,
    VALUE_KIND: tl.constexpr,
    VALUE: tl.constexpr,
    ELEMENT: tl.constexpr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SHARE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCORES: tl.constexpr,
    WIDE_K: tl.constexpr,
    WIDE_V: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attends with BM rows of one KV head to one split of their sequence's tokens.

    Grid: (sequences * row_tiles, HEADS, splits).
    Reads: q fp16, bf16 or fp32 [num_queries, HEADS * SHARE, D], of rotated keys rotated (raw_q, if
    they were centred, not); memory uint8; table, lengths, starts, positions int32, as `PrefixBatch`
    has them; tables and matrices as `packed.py` makes them, or None.
    Writes: out fp32, every element of existing rows: [num_queries, HEADS * SHARE, DV] with one
    split, else [programs, BM, DV]; lse fp32, natural logarithm, [num_queries, HEADS * SHARE] or
    [programs, BM].
    Precision: fp32 sums of products that `SCORES` names: `half` takes coded keys as fp16 and
    queries as one (fp32 ones as two) fp16 numbers and an exponent a row; `same` multiplies exact
    keys with queries of their dtype; `tf32` and `tf32x3` name Triton's precision of fp32 products.
    """
    sequence = tl.program_id(0) // row_tiles
    row, share, exists = _rows(starts_ptr, sequence, tl.program_id(0) % row_tiles, BM, SHARE)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if tl.max(exists.to(tl.int32), 0) == 0:
        return
    length = tl.load(lengths_ptr + sequence)
    query_head = row * (HEADS * SHARE) + head * SHARE + share
    if KEY_KIND != "polar" and KEY_KIND != "tiers":
        column = tl.arange(0, WIDE_K)
        channel, known = key_channels(column, KEY_KIND, D, ROTARY, INTERLEAVED)
        at = q_ptr + query_head.to(tl.int64)[:, None] * D + channel[None, :]
        q = tl.load(at, mask=exists[:, None] & known[None, :], other=0.0)
        factor = tl.full([BM], scale, tl.float32)
        if SCORES == "half":
            wide, unit = as_halves(q.to(tl.float32))
            factor *= unit
            q_high = wide.to(tl.float16)
            q_low = ((wide - q_high.to(tl.float32)) * LOW_SHIFT).to(tl.float16)
        elif SCORES == "same":
            q_high = q
        else:
            q_high = q.to(tl.float32)

    # Tiles of a page never reach into the next; those a window hides are left out.
    PAGE_TILES: tl.constexpr = (T + BT - 1) // BT
    tiles = length // T * PAGE_TILES + (length % T + BT - 1) // BT
    first_tile = 0
    sink_tiles = 0
    if positions_ptr is not None:
        position = tl.load(positions_ptr + row, mask=exists, other=2147483647)
        oldest = tl.maximum(tl.min(position, 0) - window + 1, 0)
        first_tile = tl.minimum(oldest // T * PAGE_TILES + oldest % T // BT, tiles)
        sink_tiles = tl.minimum(sinks // T * PAGE_TILES + (sinks % T + BT - 1) // BT, first_tile)
    count = sink_tiles + tiles - first_tile
    each = (count + splits - 1) // splits
    begin = split * each
    end = tl.minimum(begin + each, count)

    peak_of_row = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    summed = tl.zeros([BM, WIDE_V], tl.float32)
    pages_ptr = table_ptr + sequence.to(tl.int64) * max_pages
    tile = tl.where(begin < sink_tiles, begin, begin - sink_tiles + first_tile)
    unit_of_page = tl.load(pages_ptr + tile // PAGE_TILES, mask=begin < end, other=0)
    for index in range(begin, end):
        slice_ptr = memory_ptr + (unit_of_page.to(tl.int64) * 256 + slice_offset)
        page = tile // PAGE_TILES
        first_token = tile % PAGE_TILES * BT
        rows = tl.arange(0, BT)
        place = page * T + first_token + rows
        seen = place < length
        if T % BT != 0:
            seen &= first_token + rows < T
        # The next tile's page is looked up while this one is worked on.
        tile = tl.where(index + 1 < sink_tiles, index + 1, index + 1 - sink_tiles + first_tile)
        unit_of_page = tl.load(pages_ptr + tile // PAGE_TILES, mask=index + 1 < end, other=0)

        if KEY_KIND == "tiers":
            k = load_tiers(slice_ptr, head, first_token, rows, one, KEY, T, D, WIDE_K, BT, FAST)
        elif KEY_KIND == "tree":
            k = load_trees(
                slice_ptr, key_table_ptr, head, first_token, rows, seen, "key", KEY, T, D, WIDE_K,
                FAST,
            )  # fmt: skip
        else:
            k = load_keys(
                slice_ptr, key_table_ptr, head, first_token, rows, one, KEY_KIND, KEY, ELEMENT, T,
                HEADS, D, WIDE_K, BT, FAST,
            )  # fmt: skip
        # Before the products, so that bytes of both sides are on their way together.
        if VALUE_KIND == "tree":
            v = load_trees(
                slice_ptr, value_table_ptr, head, first_token, rows, seen, "value", VALUE, T, DV,
                WIDE_V, FAST,
            )  # fmt: skip
        else:
            v = load_values(
                slice_ptr, value_table_ptr, head, first_token, rows, seen, one, VALUE_KIND, VALUE,
                ELEMENT, T, HEADS, DV, WIDE_V,
            )  # fmt: skip
        if KEY_KIND == "polar":
            q, unit, offset = page_queries(
                q_ptr, query_head, exists, mix_ptr, slice_ptr, head, KEY, D, WIDE_K, ROTARY,
                INTERLEAVED,
            )  # fmt: skip
            token = tl.minimum(first_token + rows, T - 1)
            gains = page_gains(slice_ptr, head, token, KEY, T)
            scores = tl.dot(q, tl.trans(k)) * unit[:, None] * gains[None, :] + offset[:, None]
            scores = scores * scale
        elif KEY_KIND == "tiers":
            q, unit = tier_queries(
                q_ptr, query_head, exists, slice_ptr, head, KEY, D, WIDE_K, ROTARY, INTERLEAVED
            )
            scores = tl.dot(q, tl.trans(k)) * (unit * scale)[:, None]
        elif SCORES == "half":
            scores = tl.dot(q_high, tl.trans(k))
            if q_ptr.dtype.element_ty == tl.float32:
                scores += tl.dot(q_low, tl.trans(k)) * (1.0 / LOW_SHIFT)
            if KEY_KIND == "pair" or KEY_KIND == "arc2":  # noqa: SIM102 known when compiled
                if length <= FEW_TOKENS:
                    # Decoded again, so that longer sequences hold no registers for it.
                    low = load_keys(
                        slice_ptr, key_table_ptr, head, first_token, rows, one, KEY_KIND, KEY,
                        ELEMENT, T, HEADS, D, WIDE_K, BT, FAST, True,
                    )  # fmt: skip
                    scores += tl.dot(q_high, tl.trans(low)) * (1.0 / LOW_SHIFT)
            scores = scores * factor[:, None]
            if raw_q_ptr is not None:
                offset = mean_scores(raw_q_ptr, query_head, exists, slice_ptr, head, KEY, D, WIDE_K)
                scores += (offset * scale)[:, None]
        elif SCORES == "same":
            scores = tl.dot(q_high, tl.trans(k)) * factor[:, None]
        else:
            scores = tl.dot(q_high, tl.trans(k.to(tl.float32)), input_precision=SCORES)
            scores = scores * factor[:, None]
        if HAS_CAP:
            scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2 * LOG2_E / soft_cap))))
        scores = scores * LOG2_E
        visible = seen[None, :]
        if positions_ptr is not None:
            inside = place[None, :] > (position - window)[:, None]
            visible = visible & (inside | (place < sinks)[None, :])
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak_of_row, tl.max(scores, 1))
        # A row that has seen no token yet has peak -inf: shift by 0 there.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        # Peaks soon stop rising; then nothing is to be scaled down.
        if tl.max((new_peak > peak_of_row).to(tl.int32), 0) > 0:
            decay = tl.exp2(peak_of_row - shift)
            total = total * decay
            summed = summed * decay[:, None]
        total += tl.sum(weights, 1)
        peak_of_row = new_peak
        if v.dtype == tl.float32:
            summed += tl.dot(weights, v, input_precision="tf32x3")
        else:
            high = weights.to(v.dtype)
            summed = tl.dot(high, v, summed)
            if v.dtype == tl.bfloat16:
                low = (weights - high.to(tl.float32)).to(tl.bfloat16)
                summed = tl.dot(low, v, summed)

    some = total > 0
    summed = summed / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (peak_of_row + tl.log2(total)) * LN_2, float("-inf"))
    column = tl.arange(0, WIDE_V)
    channel, known = value_channels(column, VALUE_KIND, DV)
    if SPLIT:
        program = (tl.program_id(0) * HEADS + head) * splits + split
        place = program.to(tl.int64) * BM + tl.arange(0, BM)
    else:
        place = query_head.to(tl.int64)
    at = out_ptr + place[:, None] * DV + channel[None, :]
    tl.store(at, summed, mask=exists[:, None] & known[None, :])
    tl.store(lse_ptr + place, lse, mask=exists)


@triton.jit
def merge_kernel(
    part_ptr,
    part_lse_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    row_tiles,
    splits,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    SHARE: tl.constexpr,
    BM: tl.constexpr,
    WIDE_V: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merges the splits of one row: out = sum of out_s e^(lse_s - lse), lse = log sum e^lse_s.

    Grid: (sequences * row_tiles, HEADS, BM).
    Reads: part fp32 [programs, BM, DV] and part_lse fp32 [programs, BM] of `attend_kernel`.
    Writes: out fp32 [num_queries, HEADS * SHARE, DV], lse fp32 [num_queries, HEADS * SHARE].
    """
    sequence = tl.program_id(0) // row_tiles
    head = tl.program_id(1)
    flat = tl.program_id(0) % row_tiles * BM + tl.program_id(2)
    row = tl.load(starts_ptr + sequence) + flat // SHARE
    if row >= tl.load(starts_ptr + sequence + 1):
        return
    first_program = ((tl.program_id(0) * HEADS + head) * splits).to(tl.int64)
    split = tl.arange(0, SPLITS)
    at = part_lse_ptr + (first_program + split) * BM + tl.program_id(2)
    part_lse = tl.load(at, mask=split < splits, other=float("-inf"))
    peak = tl.max(part_lse, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2((part_lse - shift) * LOG2_E), 0)
    column = tl.arange(0, WIDE_V)
    merged = tl.zeros([WIDE_V], tl.float32)
    for first in range(0, splits, CHUNK):
        index = first + tl.arange(0, CHUNK)
        place = (first_program + index) * BM + tl.program_id(2)
        chunk_lse = tl.load(part_lse_ptr + place, mask=index < splits, other=float("-inf"))
        weights = tl.exp2((chunk_lse - shift) * LOG2_E)
        part_at = part_ptr + place[:, None] * DV + column[None, :]
        some = (weights > 0)[:, None] & (column < DV)[None, :]
        parts = tl.load(part_at, mask=some, other=0.0)
        merged += tl.sum(parts * weights[:, None], 0)
    merged = merged / tl.where(total > 0, total, 1.0)
    query_head = (row * (HEADS * SHARE) + head * SHARE + flat % SHARE).to(tl.int64)
    tl.store(out_ptr + query_head * DV + column, merged, mask=column < DV)
    lse = tl.where(total > 0, peak + tl.log2(total) * LN_2, float("-inf"))
    tl.store(lse_ptr + query_head, lse)
