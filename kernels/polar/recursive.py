"""Recursive codec: rotated vectors as trees of angles with one radius for 16 or 64 channels.

Source: arXiv 2502.02617, sections 3 and 4; the forms `log8` and `deep` are ours. Math: README.md,
section 2.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from polarcache.kernels.options import Recursive
from polarcache.kernels.polar.codebook import centroids, span
from polarcache.kernels.polar.rotation import rotated, rotation
from polarcache.kernels.values import store

_LLOYD_ITERATIONS = 12
_STEPS_PER_OCTAVE = 8
_ONE = 128


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of N slices.

    Attributes:
        levels: uint8 tensors [N, T, Hkv, D/2], [.., D/4] and so on, one a level.
        radii: fp16 [N, T, Hkv, D/2**levels]; uint8 where the form has logarithmic radii.
        codebook: fp16 [N, 28], the angles of all levels; None for the analytic codebook.
        peaks: fp16 [N, 1], largest radius of a slice before it became a logarithm; None without.
            Not finite where an element is NaN, infinite or out of reach.
    """

    levels: tuple[Tensor, ...]
    radii: Tensor
    codebook: Tensor | None
    peaks: Tensor | None = None


def encode(x: Tensor, codec: Recursive) -> Codes:
    """Codes keys or values.

    Args:
        x: fp16, bf16 or fp32 [N, T, H, D], D a multiple of 16.
        codec: form, codebook and seed.

    Returns:
        Codes; radii (or their peaks) are not finite where an element is NaN or infinite, or a
        block of rotated channels is longer than 65504.

    Precision: fp32. Leave `torch.backends.cuda.matmul.allow_tf32` off, as it is by default.
    """
    matrix = rotation(x.shape[-1], codec.seed, x.device)
    radii = rotated(x.float().contiguous(), matrix.T)
    product = radii
    levels: list[Tensor] = []
    books: list[Tensor] = []
    for level, bits in enumerate(codec.level_bits(x.shape[-1]), start=1):
        half = radii.shape[-1] // 2
        first, second = radii[..., :half], radii[..., half:]
        if codec.codebook == "kmeans":
            book = _fit(_angles(first, second, level), level)
            levels.append(_nearest(_angles(first, second, level), book))
            books.append(book)
        else:
            levels.append(_analytic_codes(first, second, level, bits))
        if codec.form == "deep":
            book = _analytic_book(level, bits, x.device)
            product = _look_up(book.cos(), levels[-1]) * product[..., :half] + (
                _look_up(book.sin(), levels[-1]) * product[..., half:]
            )
        radii = torch.mul(first, first).addcmul_(second, second).sqrt_()
    codebook = torch.cat(books, 1) if books else None
    if codec.form == "published":
        return Codes(tuple(levels), radii.half(), codebook)
    if codec.form == "deep":
        # <block, decoded block> = <block, block>: attention scores keep their size on average.
        radii = torch.where(product > 0, radii.square() / product, radii)
    return Codes(
        tuple(levels), _log_codes(radii), codebook, radii.flatten(1).amax(1, keepdim=True).half()
    )


def decode(codes: Codes, codec: Recursive, out: Tensor) -> None:
    """Decodes keys or values; a slice decodes to the same bits alone and among others.

    Args:
        codes: as `encode` returns them.
        codec: form, codebook and seed.
        out: fp16, bf16 or fp32 [N, T, H, D]; every element is written once.

    Precision: fp32, rounded once to the dtype of `out`; fp16 saturates.
    """
    level_bits = codec.level_bits(out.shape[-1])
    books = [
        _analytic_book(level, bits, out.device) for level, bits in enumerate(level_bits, start=1)
    ]
    if codes.codebook is not None:
        books = list(torch.split(codes.codebook.float(), [1 << bits for bits in level_bits], 1))
    radii = codes.radii.float()
    if codec.form != "published":
        radii = torch.exp2((radii - _ONE) / _STEPS_PER_OCTAVE).mul_(radii > 0)
    for level_codes, book in zip(reversed(codes.levels), reversed(books), strict=True):
        radii = torch.cat(
            (_look_up(book.cos(), level_codes) * radii, _look_up(book.sin(), level_codes) * radii),
            -1,
        )
    store(rotated(radii, rotation(out.shape[-1], codec.seed, out.device)), out)


def _log_codes(radii: Tensor) -> Tensor:
    """Returns uint8 codes c of radii nearest to 2**((c - 128) / 8) in logarithm; 0 for zero."""
    codes = (radii.log2() * _STEPS_PER_OCTAVE).round_().add_(_ONE)
    return codes.nan_to_num_(0).clamp_(0, 255).to(torch.int32).to(torch.uint8)


def _angles(first: Tensor, second: Tensor, level: int) -> Tensor:
    """Returns angles in [0, span], fp32: of signed channels at level 1, of radii above."""
    if level > 1:
        return torch.atan2(second, first)
    return torch.atan2(-(second + 0.0), -first).add_(math.pi)


def _analytic_codes(first: Tensor, second: Tensor, level: int, bits: int) -> Tensor:
    """Returns codes of the analytic codebook, uint8, without angles where radii are enough."""
    points = centroids(level, bits)
    if level == 1:
        scaled = _angles(first, second, level).mul_(len(points) / span(level))
        return scaled.clamp_(0, len(points) - 1).to(torch.int32).to(torch.uint8)
    codes = torch.zeros_like(first, dtype=torch.uint8)
    for low, high in pairwise(points):
        codes += (second > first * math.tan((low + high) / 2)).view(torch.uint8)
    return codes


def _analytic_book(level: int, bits: int | None, device: torch.device) -> Tensor:
    """Returns the analytic angles of a level, fp32 [1, size]."""
    return torch.tensor([centroids(level, bits)], dtype=torch.float32, device=device)


def _look_up(book: Tensor, codes: Tensor) -> Tensor:
    """Returns fp32 entries of `book` [1 or N, size] for codes uint8 [N, ...]."""
    if book.shape[0] == 1:
        return book[0].index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
    return book.gather(1, codes.flatten(1).long()).view(codes.shape)


def _nearest(angles: Tensor, book: Tensor) -> Tensor:
    """Returns codes uint8 of angles [N, ...] by the midpoints of a rising fp16 book [N, size]."""
    points = book.float()
    bounds = (points[:, 1:] + points[:, :-1]) / 2
    codes = torch.searchsorted(bounds.contiguous(), angles.flatten(1), out_int32=True)
    return codes.to(torch.uint8).view(angles.shape)


def _fit(angles: Tensor, level: int) -> Tensor:
    """Fits a codebook to each slice by Lloyd's iterations from the analytic one.

    Args:
        angles: fp32 [N, ...].
        level: 1 to 4.

    Returns:
        fp16 [N, size], rising. An entry that no angle is nearest to stays where it was.
    """
    ordered = angles.flatten(1).double().sort(1).values
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    points = _analytic_book(level, None, angles.device).double().repeat(angles.shape[0], 1)
    for _ in range(_LLOYD_ITERATIONS):
        bounds = (points[:, 1:] + points[:, :-1]) / 2
        cuts = torch.searchsorted(ordered, bounds)
        cuts = torch.nn.functional.pad(cuts, (1, 0), value=0)
        cuts = torch.nn.functional.pad(cuts, (0, 1), value=ordered.shape[1])
        counts = cuts.diff(dim=1)
        means = sums.gather(1, cuts).diff(dim=1) / counts
        points = torch.where(counts > 0, means, points)
    return points.half()
