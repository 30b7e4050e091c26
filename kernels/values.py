"""Integer codec of values: asymmetric 4 or 2 bits per token, ranges per group of channels.

Source: arXiv 2402.02750, section 3. scale = (max - min) / (2^b - 1), zero = min, both rounded to
fp16 first; code = round((v - zero) / scale), half to even; decode = zero + code * scale.
"""

import math

import torch
from torch import Tensor

from polarcache.kernels.polar.pair import FP16_MAX


def encode(x: Tensor, bits: int, group_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes values.

    Args:
        x: fp16, bf16 or fp32 [N, T, Hkv, Dv].
        bits: 4 or 2.
        group_channels: channels of a group; divides Dv.

    Returns:
        codes: uint8 [N, T, Hkv, Dv].
        scales: fp16 [N, T, Hkv, G]; not finite where a value is NaN, infinite or out of reach.
        zeros: fp16 [N, T, Hkv, G]; likewise.

    Precision: fp32 with fp16 scale and zero.
    """
    grouped = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    grouped = torch.unflatten(grouped, -1, (-1, group_channels))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    largest = (1 << bits) - 1
    zeros = low.half()
    scales = ((high - low) / largest).half()
    rounded = scales.float()
    # Dividing by infinity is code 0, which is what a group of one single number gets.
    grouped.sub_(zeros.float()).div_(torch.where(rounded > 0, rounded, math.inf))
    codes = grouped.round_().clamp_(0, largest).flatten(-2).to(torch.int32).to(torch.uint8)
    return codes, scales.squeeze(-1), zeros.squeeze(-1)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor) -> None:
    """Decodes values.

    Args:
        codes: uint8 [N, T, Hkv, Dv].
        scales: fp16 [N, T, Hkv, G].
        zeros: fp16 [N, T, Hkv, G].
        out: fp16, bf16 or fp32 [N, T, Hkv, Dv]; every element is written once.

    Precision: fp32, rounded once to the dtype of `out`.
    """
    numbers = torch.unflatten(codes.float(), -1, (scales.shape[-1], -1))
    numbers.mul_(scales.float().unsqueeze(-1)).add_(zeros.float().unsqueeze(-1))
    store(numbers.flatten(-2), out)


def store(numbers: Tensor, out: Tensor) -> None:
    """Writes fp32 numbers in the dtype of `out`; fp16 saturates, so finite stays finite.

    Args:
        numbers: fp32 of any shape; overwritten.
        out: fp16, bf16 or fp32 of the same shape.
    """
    if out.dtype == torch.float16:
        numbers.clamp_(-FP16_MAX, FP16_MAX)
    out.copy_(numbers)
