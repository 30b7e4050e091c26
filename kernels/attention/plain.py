"""Attention over packed pages in plain torch: for services without a GPU, and as the reference.

Decodes a few pages at a time and keeps a running softmax (Milakov and Gimelshein, arXiv
1805.02867), so temporaries do not grow with the prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from polarcache.kernels.profile import Exact

__all__ = ["attend"]

# Tokens decoded at a time: enough to amortize calls, few enough to stay in a core's caches.
_CHUNK_TOKENS = 512


def attend(
    codec: Codec,
    query: Tensor,
    batch: PrefixBatch,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Computes what `PrefixAttention` promises, sequence by sequence. Waits for the device.

    Args:
        codec: the codec of the pages.
        query: [num_queries, Hq, D], fp16, bf16 or fp32.
        batch: what to attend to.
        options: how scores become weights.
        out: fp32 [num_queries, Hq, Dv], written.
        lse: fp32 [num_queries, Hq], written.
    """
    starts, lengths = batch.query_starts.tolist(), batch.lengths.tolist()
    for sequence, length in enumerate(lengths):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start < rows.stop:
            positions = None if batch.positions is None else batch.positions[rows]
            table = batch.page_table[sequence].tolist()
            pages = [unit * PAGE_UNIT_BYTES + batch.slice_offset for unit in table]
            _attend_one(
                codec, query[rows], batch.memory, pages, length, positions, options,
                out[rows], lse[rows],
            )  # fmt: skip


def _attend_one(
    codec: Codec,
    query: Tensor,
    memory: Tensor,
    pages: list[int],
    length: int,
    positions: Tensor | None,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attends with the rows [R, Hq, D] of one sequence to its first `length` tokens."""
    shape = codec.shape
    num_rows, query_heads, _ = query.shape
    heads, tokens = shape.kv_heads, shape.tokens
    share = query_heads // heads
    scale = options.scale or shape.head_dim**-0.5
    q = query.float() * scale
    # [Hkv, R * share, D]: all rows of a KV head are one matrix product.
    q = q.view(num_rows, heads, share, -1).transpose(0, 1).flatten(1, 2)
    peak = q.new_full((heads, num_rows * share), -torch.inf)
    total = torch.zeros_like(peak)
    summed = q.new_zeros((heads, num_rows * share, shape.v_head_dim))
    step = max(1, _CHUNK_TOKENS // tokens)
    num_pages = -(-length // tokens)
    for first in range(0, num_pages, step):
        chunk = pages[first : min(first + step, num_pages)]
        keys, values = _decoded(codec, memory, chunk)
        scores = q @ keys.permute(1, 2, 0)
        if options.soft_cap:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        token = torch.arange(first * tokens, (first + len(chunk)) * tokens, device=q.device)
        hidden = (token >= length).unsqueeze(0)
        if options.window and positions is not None:
            old = token <= (positions.unsqueeze(1) - options.window)
            old &= token >= options.sink_tokens
            hidden = hidden | old.repeat_interleave(share, 0)
        scores = scores.masked_fill(hidden, -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1))
        # A row that has seen no token yet has peak -inf: shift by 0 there.
        shift = torch.where(torch.isfinite(new_peak), new_peak, 0.0)
        weights = torch.exp(scores - shift.unsqueeze(-1))
        decay = torch.exp(peak - shift)
        total = total * decay + weights.sum(-1)
        summed = summed * decay.unsqueeze(-1) + weights @ values.transpose(0, 1)
        peak = new_peak
    some = total > 0
    result = summed / torch.where(some, total, 1.0).unsqueeze(-1)
    out.copy_(result.view(heads, num_rows, share, -1).transpose(0, 1).flatten(1, 2))
    log_sum = peak + torch.log(total)
    log_sum = torch.where(some, log_sum, -torch.inf)
    lse.copy_(log_sum.view(heads, num_rows, share).transpose(0, 1).flatten(1, 2))


def _decoded(codec: Codec, memory: Tensor, pages: list[int]) -> tuple[Tensor, Tensor]:
    """Returns keys [n * T, Hkv, D] and values [n * T, Hkv, Dv], fp32, of n slices."""
    shape = codec.shape
    size = codec.layout.slice_bytes
    packed = torch.stack([memory[start : start + size] for start in pages])
    sides = []
    for side, channels in (
        (codec.profile.key, shape.head_dim),
        (codec.profile.value, shape.v_head_dim),
    ):
        dtype = codec.dtype if isinstance(side, Exact) else torch.float32
        size_of = (len(pages), shape.tokens, shape.kv_heads, channels)
        sides.append(torch.empty(size_of, dtype=dtype, device=memory.device))
    codec.decode(packed, *sides)
    keys, values = (side.flatten(0, 1).float() for side in sides)
    return keys, values
