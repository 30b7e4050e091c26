"""Two published ways to attend to packed keys and values, in our own writing, for comparison.

`lookup`: the pair codec (arXiv 2502.00527) with its look-up table of q.k, one table a query head
and group, read with tl.gather. `dequantize`: KIVI's form (arXiv 2402.02750), 4-bit keys per channel
in groups of 128 tokens, decoded and multiplied. Both have 4-bit values per token, split the tokens
among programs and merge as `polarcache.kernels.attention.flash` does. Codes lie as they come, one
tensor a sequence; there is no page table.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polarcache.kernels import BlockShape, values
from polarcache.kernels.attention.flash import merge_kernel
from polarcache.kernels.attention.load_keys import cosine_and_sine
from polarcache.kernels.options import Pair
from polarcache.kernels.polar import pair

GROUP = 128
ROWS = 16
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _nibbles(codes_ptr, first, C: tl.constexpr, BT: tl.constexpr):
    """Loads int32 codes [BT, C] of channels 0 to C - 1 and of C to 2 C - 1."""
    at = first * C + tl.arange(0, BT)[:, None] * C + tl.arange(0, C)[None, :]
    codes = tl.load(codes_ptr + at).to(tl.int32)
    return codes & 15, codes >> 4


@triton.jit
def baseline_kernel(
    q_ptr,
    k_codes_ptr,
    k_params_ptr,
    v_codes_ptr,
    v_params_ptr,
    part_ptr,
    part_lse_ptr,
    scale,
    length,
    splits,
    LOOKUP: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """Attends with the SHARE query rows of one sequence and KV head to one split of its tokens.

    Grid: (sequences * KV heads, splits).
    Reads: q fp16 [sequences * KV heads, SHARE, D], codes and parameters as `Packed` has them.
    Writes: part fp32 [programs, BM, D], part_lse fp32 [programs, BM].
    """
    C: tl.constexpr = D // 2
    both = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    row = tl.arange(0, BM)
    q_at = q_ptr + (both * SHARE + row)[:, None] * D + column[None, :]
    q_low = tl.load(q_at, mask=(row < SHARE)[:, None], other=0.0)
    q_high = tl.load(q_at + C, mask=(row < SHARE)[:, None], other=0.0)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    low_sum = tl.zeros([BM, C], tl.float32)
    high_sum = tl.zeros([BM, C], tl.float32)
    groups = length // BT
    each = (groups + splits - 1) // splits
    begin = tl.program_id(1) * each
    for group in range(begin, tl.minimum(begin + each, groups)):
        first = both * length + group * BT
        params = k_params_ptr + (both * groups + group) * (4 * C) + column
        if LOOKUP:
            codes_at = k_codes_ptr + first * C + tl.arange(0, BT)[:, None] * C + column[None, :]
            codes = tl.load(codes_at).to(tl.int32)
            radius = tl.load(params)[None, :].to(tl.float32)
            radius += ((codes >> 4).to(tl.float32) + 0.5) * tl.load(params + C)[None, :]
            step = tl.arange(0, 16).to(tl.float32)[:, None] + 0.5
            angle = tl.load(params + 2 * C).to(tl.float32)[None, :]
            angle += step * tl.load(params + 3 * C).to(tl.float32)[None, :]
            cosine, sine = cosine_and_sine(angle, True)
            scores = tl.zeros([BM, BT], tl.float32)
            for head in tl.static_range(SHARE):
                head_at = q_ptr + (both * SHARE + head) * D + column
                table = cosine * tl.load(head_at)[None, :] + sine * tl.load(head_at + C)[None, :]
                found = tl.gather(table, codes & 15, 0) * radius
                scores = tl.where((row == head)[:, None], tl.sum(found, 1)[None, :], scores)
        else:
            low, high = _nibbles(k_codes_ptr, first, C, BT)
            k_low = low.to(tl.float32) * tl.load(params)[None, :] + tl.load(params + 2 * C)[None, :]
            k_high = high.to(tl.float32) * tl.load(params + C)[None, :]
            k_high += tl.load(params + 3 * C)[None, :]
            scores = tl.dot(q_low, tl.trans(k_low.to(tl.float16)))
            scores = tl.dot(q_high, tl.trans(k_high.to(tl.float16)), scores)
        scores = scores * (scale * LOG2_E)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
        low, high = _nibbles(v_codes_ptr, first, C, BT)
        v_params = v_params_ptr + (first + tl.arange(0, BT)) * 2
        v_scale, v_zero = tl.load(v_params)[:, None], tl.load(v_params + 1)[:, None]
        v_low = (low.to(tl.float32) * v_scale + v_zero).to(tl.float16)
        v_high = (high.to(tl.float32) * v_scale + v_zero).to(tl.float16)
        low_sum = tl.dot(weights.to(tl.float16), v_low, low_sum * decay[:, None])
        high_sum = tl.dot(weights.to(tl.float16), v_high, high_sum * decay[:, None])
    some = total > 0
    place = (both * splits + tl.program_id(1)) * BM + row
    inverse = 1.0 / tl.where(some, total, 1.0)
    at = part_ptr + place[:, None] * D + column[None, :]
    tl.store(at, low_sum * inverse[:, None])
    tl.store(at + C, high_sum * inverse[:, None])
    lse = tl.where(some, (peak + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(part_lse_ptr + place, lse)


@dataclass(frozen=True, slots=True)
class Packed:
    """Packed keys and values of sequences of one length, a multiple of 128 tokens.

    Attributes:
        lookup: whether keys are pair codes; else integers per channel.
        heads: KV heads.
        length: tokens of a sequence.
        k_codes: uint8 [S, Hkv, L, D/2]: radius << 4 | angle, or channels j and j + D/2.
        k_params: fp16 [S, Hkv, L/128, 4, D/2] of pairs, or [.., 2, D]: scales, zeros of channels.
        v_codes: uint8 [S, Hkv, L, D/2], channels j and j + D/2.
        v_params: fp16 [S, Hkv, L, 2]: scale, zero.
    """

    lookup: bool
    heads: int
    length: int
    k_codes: Tensor
    k_params: Tensor
    v_codes: Tensor
    v_params: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that attention reads."""
        parts = (self.k_codes, self.k_params, self.v_codes, self.v_params)
        return sum(part.nbytes for part in parts)

    def attend(
        self, query: Tensor, out: Tensor, lse: Tensor, starts: Tensor, work: Tensor, splits: int
    ) -> None:
        """Writes attention of one query row a sequence.

        Args:
            query: fp16 [S, Hq, D].
            out: fp32 [S, Hq, D].
            lse: fp32 [S, Hq].
            starts: int32 [S + 1]: 0 to S.
            work: fp32, at least S * Hkv * splits * 16 * (D + 1) long.
            splits: programs that share a sequence and head.
        """
        sequences, query_heads, head_dim = query.shape
        rows = sequences * self.heads * splits * ROWS
        part, part_lse = work[: rows * head_dim], work[rows * head_dim :]
        share = query_heads // self.heads
        baseline_kernel[(sequences * self.heads, splits)](
            query, self.k_codes, self.k_params, self.v_codes, self.v_params, part, part_lse,
            head_dim**-0.5, self.length, splits, LOOKUP=self.lookup, SHARE=share, D=head_dim,
            BM=ROWS, BT=GROUP, num_warps=8 if self.lookup else 4, num_stages=1,
        )  # fmt: skip
        merge_kernel[(sequences, self.heads, share)](
            part, part_lse, starts, out, lse, 1, splits, HEADS=self.heads, DV=head_dim,
            SHARE=share, BM=ROWS, WIDE_V=head_dim, SPLITS=triton.next_power_of_2(splits),
            CHUNK=min(32, triton.next_power_of_2(splits)),
        )  # fmt: skip


def pack(keys: Tensor, vals: Tensor, *, lookup: bool) -> tuple[Packed, Tensor, Tensor]:
    """Packs keys and values, and returns what they decode to.

    Args:
        keys: fp16 [S, L, Hkv, D].
        vals: fp16 [S, L, Hkv, D].
        lookup: pair codes instead of integers per channel.

    Returns:
        (packed, decoded keys, decoded values), the latter fp32 [S, L, Hkv, D].
    """
    sequences, length, heads, head_dim = keys.shape
    decoded_keys = torch.empty_like(keys, dtype=torch.float32)
    if lookup:
        shape = BlockShape(GROUP, heads, head_dim, head_dim, "half", head_dim)
        codec = Pair(4, 4, "minmax", GROUP)
        blocks = keys.reshape(-1, GROUP, heads, head_dim)
        codes, params = pair.encode(blocks, codec, shape)
        pair.decode(codes, params, codec, shape, decoded_keys.view(blocks.shape))
        k_codes = codes.view(sequences, length, heads, -1).transpose(1, 2)
        k_params = params.view(sequences, -1, 4, heads, head_dim // 2).permute(0, 3, 1, 2, 4)
    else:
        grouped = keys.float().view(sequences, -1, GROUP, heads, head_dim).transpose(2, 4)
        numbers, scales, zeros = values.encode(grouped.reshape(-1, 1, 1, GROUP), 4, GROUP)
        back = torch.empty(numbers.shape, dtype=torch.float32, device=keys.device)
        values.decode(numbers, scales, zeros, back)
        back = back.view(grouped.shape).transpose(2, 4)
        decoded_keys.copy_(back.reshape(keys.shape))
        numbers = numbers.view(grouped.shape).transpose(2, 4).reshape(keys.shape).transpose(1, 2)
        k_codes = _halves(numbers)
        both = torch.stack((scales, zeros), 0).view(2, sequences, -1, head_dim, heads)
        k_params = both.permute(1, 4, 2, 0, 3)
    numbers, scales, zeros = values.encode(vals, 4, head_dim)
    decoded_values = torch.empty_like(vals, dtype=torch.float32)
    values.decode(numbers, scales, zeros, decoded_values)
    v_params = torch.cat((scales, zeros), -1).transpose(1, 2)
    packed = Packed(
        lookup, heads, length, k_codes.contiguous(), k_params.contiguous(),
        _halves(numbers.transpose(1, 2)).contiguous(), v_params.contiguous(),
    )  # fmt: skip
    return packed, decoded_keys, decoded_values


def _halves(numbers: Tensor) -> Tensor:
    """Packs codes of channels j and j + D/2 into bytes."""
    half = numbers.shape[-1] // 2
    return numbers[..., :half] | (numbers[..., half:] << 4)
