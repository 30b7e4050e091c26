"""What the rotated codecs take off the keys of a slice: the mean of each channel, and its energy.

Post-RoPE keys of a block lie around means that a rotation would spread over all channels as
error. The stored mean is 8 bits a channel; scores of a block get `q . mean` back as one number a
query. Balance scales pair j by (E|q_j|^2 / E|k_j|^2)^(1/4), which makes the error of q.k smallest;
RoPE commutes with it. Math: README.md, section 3.
"""

import torch
from torch import Tensor

from polarcache.kernels.layout import BlockShape

MEAN_STEPS = 127
MEAN_ZERO = 128
BALANCE_STEPS = 8
BALANCE_ONE = 128
GAIN_STEPS = 32
GAIN_ZERO = 255
LEAST_ENERGY = 2.0**-20
# Where queries are unknown: E|q_j|^2 grows like this power of E|k_j|^2. The slope measured on three
# small models of three architectures was 0.4 to 0.9 in most heads.
QUERY_POWER = 0.5


def encode_means(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtracts the mean of each channel over a slice's tokens.

    Args:
        x: fp16, bf16 or fp32 [N, T, H, D].

    Returns:
        centred: fp32 [N, T, H, D], newly allocated.
        codes: uint8 [N, H, D]: the mean is (code - 128) / 127 * scale.
        scales: fp16 [N, H], the largest mean; not finite where an element is NaN or infinite.
    """
    means = x.float().mean(1)
    scales = means.abs().amax(-1).half()
    divisor = torch.where(scales > 0, scales.float(), torch.inf).unsqueeze(-1)
    codes = (means * (MEAN_STEPS / divisor)).round_().clamp_(-MEAN_STEPS, MEAN_STEPS).nan_to_num_(0)
    codes = codes.add_(MEAN_ZERO).to(torch.int32).to(torch.uint8)
    return x.float() - decode_means(codes, scales).unsqueeze(1), codes, scales


def decode_means(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns means fp32 [N, H, D] of codes uint8 [N, H, D] and scales fp16 [N, H]."""
    return (codes.float() - MEAN_ZERO) * (scales.float() / MEAN_STEPS).unsqueeze(-1)


def encode_balance(
    x: Tensor, shape: BlockShape, query: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales pairs so that a rotation spreads error evenly over what queries see.

    Args:
        x: fp32 [N, T, H, D].
        shape: pairing and rotary_dim.
        query: energy of queries by pair, fp32 [N, H, P]; None guesses them from the keys'.

    Returns:
        balanced: fp32 [N, T, H, D], newly allocated.
        codes: uint8 [N, H, P]: the scale is 2**((code - 128) / 8).
    """
    energy = x.new_empty((x.shape[0], *x.shape[2:-1], shape.pairs))
    square = x.square().mean(1)
    for pairs, first, second in shape.pair_channels():
        energy[..., pairs] = square[..., first] + square[..., second]
    largest = energy.amax(-1, keepdim=True)
    relative = energy / torch.where(largest > 0, largest, 1.0)
    logs = relative.clamp_(min=LEAST_ENERGY).log2()
    if query is None:
        logs *= -0.25 * (1 - QUERY_POWER)
    else:
        logs = 0.25 * (query.clamp(min=LEAST_ENERGY).log2() - logs)
    logs -= logs.mean(-1, keepdim=True)
    codes = (logs * BALANCE_STEPS).round_().nan_to_num_(0).add_(BALANCE_ONE).clamp_(0, 255)
    codes = codes.to(torch.int32).to(torch.uint8)
    return x * decode_balance(codes, shape).unsqueeze(1), codes


def decode_balance(codes: Tensor, shape: BlockShape) -> Tensor:
    """Returns the scale of every channel, fp32 [N, H, D]."""
    by_pair = torch.exp2((codes.float() - BALANCE_ONE) / BALANCE_STEPS)
    scales = by_pair.new_empty((*codes.shape[:-1], shape.head_dim))
    for pairs, first, second in shape.pair_channels():
        scales[..., first] = by_pair[..., pairs]
        scales[..., second] = by_pair[..., pairs]
    return scales


def encode_gains(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Codes gains as logarithms below the largest of a head.

    Args:
        gains: fp32 [N, T, H], not negative.

    Returns:
        codes: uint8 [N, T, H]: the gain is largest * 2**(-code / 32), or 0 for code 255.
        largest: fp16 [N, H]; not finite where a gain is not.
    """
    largest = gains.amax(1).half()
    below = (largest.float().unsqueeze(1) / gains).log2_().mul_(GAIN_STEPS).round_()
    below = below.nan_to_num_(GAIN_ZERO).clamp_(0, GAIN_ZERO)
    return below.to(torch.int32).to(torch.uint8), largest


def decode_gains(codes: Tensor, largest: Tensor) -> Tensor:
    """Returns gains fp32 [N, T, H] of codes uint8 [N, T, H] and largest fp16 [N, H]."""
    gains = torch.exp2(codes.float() / -GAIN_STEPS) * largest.float().unsqueeze(1)
    return gains.mul_(codes < GAIN_ZERO)
