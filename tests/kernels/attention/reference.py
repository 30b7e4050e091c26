"""A float64 reference of attention over a stored prefix, and batches to test with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from polarcache.kernels.profile import Exact

LAYERS = 2


@dataclass
class Stored:
    """Pages of several sequences in one memory, and what they decode to.

    Attributes:
        batch: what to attend to.
        keys: for each sequence the decoded keys [length, Hkv, D], float64.
        values: for each sequence the decoded values [length, Hkv, Dv], float64.
    """

    batch: PrefixBatch
    keys: list[Tensor]
    values: list[Tensor]


def store(
    codec: Codec,
    lengths: list[int],
    rows: list[int],
    positions: list[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    like: Tensor | None = None,
) -> Stored:
    """Packs random blocks of two layers into permuted pages; layer 1 is what is attended to.

    `like` [tokens, Hkv, D + Dv], where given, supplies the keys and values of every sequence.
    """
    shape = codec.shape
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // shape.tokens) for length in lengths]
    slice_bytes = codec.layout.slice_bytes
    units = -(-LAYERS * slice_bytes // PAGE_UNIT_BYTES)
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    memory = torch.randint(
        0, 256, ((sum(counts) + 2) * units * PAGE_UNIT_BYTES,), dtype=torch.uint8,
        generator=generator,
    )  # fmt: skip
    table = torch.full((len(lengths), max(1, *counts)), 2**30, dtype=torch.int32)
    keys_of, values_of, taken = [], [], 0
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        size = (count, shape.tokens, shape.kv_heads)
        keys = torch.randn(*size, shape.head_dim, generator=generator)
        keys += 2 * torch.randn(shape.head_dim, generator=generator)
        values = torch.randn(*size, shape.v_head_dim, generator=generator)
        if like is not None:
            both = like[: count * shape.tokens].view(*size, -1)
            keys, values = both.split([shape.head_dim, shape.v_head_dim], -1)
        keys, values = keys.to(codec.dtype).contiguous(), values.to(codec.dtype).contiguous()
        packed = torch.empty((count, slice_bytes), dtype=torch.uint8)
        codec.encode(keys, values, packed)
        for page in range(count):
            unit = order[taken] * units
            taken += 1
            table[index, page] = unit
            start = unit * PAGE_UNIT_BYTES + slice_bytes
            memory[start : start + slice_bytes] = packed[page]
        if not isinstance(codec.profile.key, Exact):
            keys = keys.float()
        if not isinstance(codec.profile.value, Exact):
            values = values.float()
        codec.decode(packed, keys, values)
        keys_of.append(keys.flatten(0, 1)[:length].double())
        values_of.append(values.flatten(0, 1)[:length].double())
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    batch = PrefixBatch(
        memory=memory.to(device),
        page_table=table.to(device),
        slice_offset=slice_bytes,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_starts=starts.to(device),
        max_rows=max(rows),
        positions=None
        if positions is None
        else torch.tensor(positions, dtype=torch.int32, device=device),
    )
    return Stored(batch, keys_of, values_of)


def attend(query: Tensor, stored: Stored, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) in float64, softmax written out."""
    num_queries, query_heads, head_dim = query.shape
    starts = stored.batch.query_starts.tolist()
    out = torch.zeros(num_queries, query_heads, stored.values[0].shape[-1], dtype=torch.float64)
    lse = torch.full((num_queries, query_heads), -torch.inf, dtype=torch.float64)
    scale = options.scale or head_dim**-0.5
    for index, (keys, values) in enumerate(zip(stored.keys, stored.values, strict=True)):
        share = query_heads // keys.shape[1]
        for row in range(starts[index], starts[index + 1]):
            for head in range(query_heads):
                scores = keys[:, head // share] @ query[row, head].double().cpu() * scale
                if options.soft_cap:
                    scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
                if options.window:
                    position = int(stored.batch.positions[row])
                    token = torch.arange(len(scores))
                    seen = (token > position - options.window) | (token < options.sink_tokens)
                    scores = scores.masked_fill(~seen, -torch.inf)
                if not torch.isfinite(scores).any():
                    continue
                lse[row, head] = torch.logsumexp(scores, 0)
                out[row, head] = torch.softmax(scores, 0) @ values[:, head // share]
    return out, lse
