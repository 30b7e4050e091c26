"""Ways to attend to the same shapes, each ready to be called: for benchmarks/attention.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attention_baselines import GROUP, ROWS, Packed, pack
from torch import Tensor

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.attention.portable import PortableAttention
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.kernels.codec import Codec

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
SHAPE = BlockShape(128, KV_HEADS, HEAD_DIM, HEAD_DIM, "half", HEAD_DIM)
# Distinct random blocks; longer prefixes repeat them at random.
POOL_BLOCKS = 256
WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes of one row of the table.

    Attributes:
        sequences: stored prefixes.
        tokens: tokens of each, a multiple of 128.
        sessions: query rows of each: sessions that share a prefix.
    """

    sequences: int
    tokens: int
    sessions: int = 1

    def __str__(self) -> str:
        """Returns the row's name."""
        shared = f", {self.sessions} sessions share it" if self.sessions > 1 else ""
        return f"B{self.sequences} L{self.tokens}{shared}"

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.sequences * self.sessions


@dataclass(frozen=True, slots=True)
class Ready:
    """One way to attend, over one set of data.

    Attributes:
        attend: takes query fp16 [rows, Hq, D] and out fp32 [rows, Hq, D], or returns it.
        num_bytes: bytes of keys and values that it reads.
        keys: what the keys are decoded to, [S, L, Hkv, D]; None where only time counts.
        values: likewise.
    """

    attend: Callable[[Tensor, Tensor], Tensor]
    num_bytes: int
    keys: Tensor | None
    values: Tensor | None


def random_kv(sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns keys around means, as RoPE leaves them, and values; fp16 [S, L, Hkv, D]."""
    size = (sequences, tokens, KV_HEADS, HEAD_DIM)
    keys = torch.randn(size, device="cuda", dtype=torch.float16)
    keys += 2 * torch.randn(size[2:], device="cuda", dtype=torch.float16)
    return keys, torch.randn(size, device="cuda", dtype=torch.float16)


def sdpa(case: Case, *, check: bool) -> Ready:
    """PyTorch's scaled_dot_product_attention in fp16, with the backend that it picks."""
    keys, values = random_kv(case.sequences, case.tokens)
    k, v = (x.transpose(1, 2).contiguous() for x in (keys, values))

    def attend(query: Tensor, out: Tensor) -> Tensor:
        q = query.view(case.sequences, case.sessions, QUERY_HEADS, HEAD_DIM).transpose(1, 2)
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return result.transpose(1, 2).reshape(out.shape)

    kept = (keys, values) if check else (None, None)
    return Ready(attend, k.nbytes + v.nbytes, *kept)


def flashinfer(case: Case, *, dtype: torch.dtype, check: bool) -> Ready:
    """FlashInfer's batch decode over pages of 16 tokens; with sessions its paged prefill kernel.

    The prefill kernel reads a shared prefix once for all of its sessions, without a mask, as the
    first level of FlashInfer's cascade does. Its second backend is asked for: the third, which it
    would pick for fp16 on Hopper, does not split a sequence and takes ten times as long here.
    """
    import flashinfer as library

    page = 16
    keys, values = (x.to(dtype) for x in random_kv(case.sequences, case.tokens))
    pages = case.sequences * case.tokens // page
    order = torch.randperm(pages, device="cuda")
    cache = torch.empty((pages, 2, page, KV_HEADS, HEAD_DIM), dtype=dtype, device="cuda")
    cache[order, 0], cache[order, 1] = (
        x.view(pages, page, KV_HEADS, HEAD_DIM) for x in (keys, values)
    )
    starts = torch.arange(case.sequences + 1, dtype=torch.int32, device="cuda")
    indptr = starts * (case.tokens // page)
    last = torch.full((case.sequences,), page, dtype=torch.int32, device="cuda")
    work = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper: Any
    if case.sessions > 1:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(work, "NHD", backend="fa2")
        wrapper.plan(
            starts * case.sessions, indptr, order.int(), last, QUERY_HEADS, KV_HEADS, HEAD_DIM,
            page, causal=False, q_data_type=torch.float16, kv_data_type=dtype,
        )  # fmt: skip
    else:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(work, "NHD", use_tensor_cores=True)
        wrapper.plan(
            indptr, order.int(), last, QUERY_HEADS, KV_HEADS, HEAD_DIM, page,
            q_data_type=torch.float16, kv_data_type=dtype,
        )  # fmt: skip

    def attend(query: Tensor, out: Tensor) -> Tensor:
        result: Tensor = wrapper.run(query, cache)
        return result.view(out.shape)

    kept = (keys, values) if check else (None, None)
    return Ready(attend, cache.nbytes, *kept)


def baseline(case: Case, *, lookup: bool, check: bool) -> Ready:
    """A published kernel's algorithm; sessions are sequences of their own, as it has no pages."""
    keys, values = random_kv(1, min(case.tokens, POOL_BLOCKS * GROUP))
    packed, decoded_keys, decoded_values = pack(keys, values, lookup=lookup)
    repeats = case.tokens // packed.length
    shares = (
        part.repeat(case.rows, 1, repeats, *[1] * (part.dim() - 3))
        for part in (packed.k_codes, packed.k_params, packed.v_codes, packed.v_params)
    )
    packed = Packed(lookup, KV_HEADS, case.tokens, *shares)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    splits = max(1, min(4 * sms // (case.rows * KV_HEADS), case.tokens // (2 * GROUP)))
    rows = case.rows * KV_HEADS * splits * ROWS
    work = torch.empty(rows * (HEAD_DIM + 1), device="cuda")
    starts = torch.arange(case.rows + 1, dtype=torch.int32, device="cuda")
    lse = torch.empty((case.rows, QUERY_HEADS), device="cuda")

    def attend(query: Tensor, out: Tensor) -> Tensor:
        packed.attend(query, out, lse, starts, work, splits)
        return out

    if not check:
        return Ready(attend, packed.num_bytes, None, None)
    decoded = (x.repeat(case.sequences, repeats, 1, 1) for x in (decoded_keys, decoded_values))
    return Ready(attend, packed.num_bytes, *decoded)


def polarcache(case: Case, *, profile: str, portable: bool, check: bool) -> Ready:
    """This package, over pages in random order; `portable` leaves the form for new GPUs out."""
    codec = Codec(Profile.parse(profile), SHAPE, torch.float16)
    slice_bytes = codec.layout.slice_bytes
    blocks = case.sequences * case.tokens // SHAPE.tokens
    pool = blocks if check else min(blocks, POOL_BLOCKS)
    keys, values = random_kv(pool, SHAPE.tokens)
    packed = torch.full((pool, slice_bytes), 0xA5, dtype=torch.uint8, device="cuda")
    codec.encode(keys, values, packed)
    units = -(-slice_bytes // PAGE_UNIT_BYTES)
    order = torch.randperm(blocks, device="cuda")
    chosen = torch.arange(blocks, device="cuda") % pool
    memory = torch.empty((blocks, units * PAGE_UNIT_BYTES), dtype=torch.uint8, device="cuda")
    for part in torch.split(torch.arange(blocks, device="cuda"), 4 * POOL_BLOCKS):
        memory[order[part], :slice_bytes] = packed[chosen[part]]
    starts = torch.arange(case.sequences + 1, dtype=torch.int32, device="cuda") * case.sessions
    batch = PrefixBatch(
        memory=memory.view(-1),
        page_table=(order.int() * units).view(case.sequences, -1),
        slice_offset=0,
        lengths=torch.full((case.sequences,), case.tokens, dtype=torch.int32, device="cuda"),
        query_starts=starts.int(),
        max_rows=case.sessions,
    )
    attention = PrefixAttention(codec, QUERY_HEADS)
    call: Callable[..., None] = attention
    sizes = (case.rows, case.sequences, batch.page_table.shape[1])
    workspace_bytes = attention.workspace_bytes(*sizes)
    if portable:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        kernels = PortableAttention.of(codec, QUERY_HEADS, AttentionOptions(), sms)
        call, workspace_bytes = kernels.attend, kernels.workspace_bytes(*sizes)
    workspace = torch.full((workspace_bytes,), 0xFF, dtype=torch.uint8, device="cuda")
    lse = torch.empty((case.rows, QUERY_HEADS), device="cuda")

    def attend(query: Tensor, out: Tensor) -> Tensor:
        call(query, batch, out, lse, workspace)
        return out

    num_bytes = blocks * slice_bytes
    if not check:
        return Ready(attend, num_bytes, None, None)
    exact = profile == "exact"
    decoded = [x.clone() if exact else x.float() for x in (keys, values)]
    codec.decode(packed, *decoded)
    size = (case.sequences, case.tokens, KV_HEADS, HEAD_DIM)
    return Ready(attend, num_bytes, *(x.view(size) for x in decoded))
