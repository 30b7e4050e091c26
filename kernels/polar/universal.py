"""Universal polar codec: mixed vectors as pairs of universal radii and phases, one gain a row.

Mixing makes the channels of a row nearly Gaussian, so a pair's radius has a Rayleigh density and
its angle is uniform: one codebook serves every model, and a row needs only its gain. Ours, from
arXiv 2502.02617 and 2504.19874. Math: README.md, section 3.
"""

import math

import torch
from torch import Tensor

from polarcache.kernels.options import Polar
from polarcache.kernels.polar.codebook import rayleigh_points
from polarcache.kernels.polar.rotation import mixing, rotated
from polarcache.kernels.values import store

_TAU = 2 * math.pi


def encode(x: Tensor, codec: Polar) -> tuple[Tensor, Tensor]:
    """Codes rows.

    Args:
        x: fp16, bf16 or fp32 [N, T, H, D], D a multiple of 16.
        codec: bits.

    Returns:
        codes: uint8 [N, T, H, D/2], radius code << angle_bits | angle code.
        gains: fp32 [N, T, H], not negative; not finite where an element is NaN or infinite.

    Precision: fp32. Leave `torch.backends.cuda.matmul.allow_tf32` off, as it is by default.
    """
    head_dim = x.shape[-1]
    mixed = rotated(x.float().contiguous(), mixing(head_dim, x.device).T)
    first, second = mixed[..., : head_dim // 2], mixed[..., head_dim // 2 :]
    norm = mixed.square().sum(-1)
    # Radii in units of the RMS channel; a row of zeros divides by infinity.
    rms = (norm / head_dim).sqrt_()
    unit = torch.where(rms > 0, rms, math.inf).unsqueeze(-1)
    radius = torch.mul(first, first).addcmul_(second, second).sqrt_().div_(unit)
    points = _points(codec, x.device)
    radius_codes = torch.bucketize(radius, (points[1:] + points[:-1]) / 2)
    steps = 1 << codec.angle_bits
    angle = torch.atan2(second, first).mul_(steps / _TAU).floor_()
    angle_codes = angle.to(torch.int32) & (steps - 1)
    phase = angle_codes.float().add_(0.5).mul_(_TAU / steps)
    decoded = points[radius_codes]
    product = ((first * phase.cos() + second * phase.sin()) * decoded).sum(-1)
    # <row, decoded row> = <row, row>: attention scores keep their size on average.
    gains = torch.where(norm > 0, norm / product, norm)
    codes = (radius_codes.to(torch.int32) << codec.angle_bits) | angle_codes
    return codes.to(torch.uint8), gains


def decode(codes: Tensor, gains: Tensor, codec: Polar, out: Tensor) -> None:
    """Decodes rows; a slice decodes to the same bits alone and among others.

    Args:
        codes: uint8 [N, T, H, D/2].
        gains: fp16 or fp32 [N, T, H].
        codec: bits.
        out: fp16, bf16 or fp32 [N, T, H, D]; every element is written once.

    Precision: fp32, rounded once to the dtype of `out`; fp16 saturates.
    """
    steps = 1 << codec.angle_bits
    phase = (codes & (steps - 1)).float().add_(0.5).mul_(_TAU / steps)
    radius = _points(codec, out.device)[(codes >> codec.angle_bits).to(torch.int32)]
    radius.mul_(gains.float().unsqueeze(-1))
    mixed = torch.cat((phase.cos().mul_(radius), phase.sin_().mul_(radius)), -1)
    store(rotated(mixed, mixing(out.shape[-1], out.device)), out)


def _points(codec: Polar, device: torch.device) -> Tensor:
    """Returns radii in units of the RMS channel, fp32 [2**radius_bits]."""
    return torch.tensor(rayleigh_points(codec.radius_bits), dtype=torch.float32, device=device)
