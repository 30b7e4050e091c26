"""Universal polar codec: mixed vectors as pairs of universal radii and phases, one gain a row.

Mixing makes the channels of a row nearly Gaussian, so a pair's radius has a Rayleigh density and
its angle is uniform: one codebook of rings serves every model, and a row needs only its gain. Ours,
from arXiv 2502.02617 and 2504.19874. Math: README.md, section 3.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from polarcache.kernels.options import Polar
from polarcache.kernels.polar.rings import rings
from polarcache.kernels.polar.rotation import mixing, rotated
from polarcache.kernels.values import store

_TAU = 2 * math.pi


def encode(x: Tensor, codec: Polar) -> tuple[Tensor, Tensor]:
    """Codes rows.

    Args:
        x: fp16, bf16 or fp32 [N, T, H, D], D a multiple of 16.
        codec: bits.

    Returns:
        codes: uint8 [N, T, H, D/2]: points before the pair's ring, and its phase there.
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
    bounds, *of_rings = _rings(codec, x.device)
    ring = torch.bucketize(radius, bounds)
    counts, firsts = (numbers[ring] for numbers in of_rings)
    steps = torch.atan2(second, first).mul_(counts * (1 / _TAU)).floor_().to(torch.int32)
    # Angles are in [-pi, pi]. A row with NaN, which is refused, must not name points there are not.
    steps = torch.where(steps < 0, steps + counts, steps)
    codes = torch.minimum(steps.clamp_(min=0), counts - 1).add_(firsts)
    x_points, y_points = _points(codec, x.device)
    product = (first * x_points[codes]).addcmul_(second, y_points[codes]).sum(-1)
    # <row, decoded row> = <row, row>: attention scores keep their size on average.
    gains = torch.where(norm > 0, norm / product, norm)
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
    chosen = codes.to(torch.int32)
    mixed = torch.cat([points[chosen] for points in _points(codec, out.device)], -1)
    mixed.mul_(gains.float().unsqueeze(-1))
    store(rotated(mixed, mixing(out.shape[-1], out.device)), out)


@lru_cache(maxsize=32)
def _points(codec: Polar, device: torch.device) -> Tensor:
    """Returns both channels of every code in units of the RMS channel, fp32 [2, 2**bits]."""
    return torch.from_numpy(rings(codec).points().T.copy()).float().to(device)


@lru_cache(maxsize=32)
def _rings(codec: Polar, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns bounds fp32, points and first codes of the rings, int64."""
    book = rings(codec)
    bounds, counts, firsts = (
        torch.tensor(numbers, device=device) for numbers in (book.bounds, book.counts, book.firsts)
    )
    return bounds, counts, firsts
