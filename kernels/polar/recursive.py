"""Recursive codec: rotated vectors as one radius and 15 angles per block of 16 channels.

Source: arXiv 2502.02617, sections 3 and 4. Math: README.md, section 2.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from polarcache.kernels.layout import RECURSIVE_BITS
from polarcache.kernels.polar.codebook import centroids, span
from polarcache.kernels.polar.rotation import rotation
from polarcache.kernels.profile import Recursive
from polarcache.kernels.values import store

_SIZES = tuple(1 << bits for bits in RECURSIVE_BITS)
_LLOYD_ITERATIONS = 12


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of N slices.

    Attributes:
        levels: four uint8 tensors [N, T, Hkv, D/2], [.., D/4], [.., D/8], [.., D/16].
        radii: fp16 [N, T, Hkv, D/16].
        codebook: fp16 [N, 28], the angles of all levels; None for the analytic codebook.
    """

    levels: tuple[Tensor, ...]
    radii: Tensor
    codebook: Tensor | None


def encode(x: Tensor, codec: Recursive) -> Codes:
    """Codes keys or values.

    Args:
        x: fp16, bf16 or fp32 [N, T, H, D], D a multiple of 16.
        codec: codebook and seed.

    Returns:
        Codes; radii are not finite where an element is NaN or infinite, or a block of 16 rotated
        channels is longer than 65504.

    Precision: fp32. Leave `torch.backends.cuda.matmul.allow_tf32` off, as it is by default.
    """
    matrix = rotation(x.shape[-1], codec.seed, x.device)
    radii = _rotated(x.float().contiguous(), matrix.T)
    levels: list[Tensor] = []
    books: list[Tensor] = []
    for level in range(1, len(RECURSIVE_BITS) + 1):
        half = radii.shape[-1] // 2
        first, second = radii[..., :half], radii[..., half:]
        if codec.codebook == "kmeans":
            book = _fit(_angles(first, second, level), level)
            levels.append(_nearest(_angles(first, second, level), book))
            books.append(book)
        else:
            levels.append(_analytic_codes(first, second, level))
        radii = torch.mul(first, first).addcmul_(second, second).sqrt_()
    return Codes(tuple(levels), radii.half(), torch.cat(books, 1) if books else None)


def decode(codes: Codes, codec: Recursive, out: Tensor) -> None:
    """Decodes keys or values; a slice decodes to the same bits alone and among others.

    Args:
        codes: as `encode` returns them.
        codec: codebook and seed.
        out: fp16, bf16 or fp32 [N, T, H, D]; every element is written once.

    Precision: fp32, rounded once to the dtype of `out`; fp16 saturates.
    """
    books = [_analytic_book(level, out.device) for level in range(1, len(_SIZES) + 1)]
    if codes.codebook is not None:
        books = list(torch.split(codes.codebook.float(), list(_SIZES), 1))
    radii = codes.radii.float()
    for level_codes, book in zip(reversed(codes.levels), reversed(books), strict=True):
        radii = torch.cat(
            (_look_up(book.cos(), level_codes) * radii, _look_up(book.sin(), level_codes) * radii),
            -1,
        )
    store(_rotated(radii, rotation(out.shape[-1], codec.seed, out.device)), out)


def _rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiplies rows of fp32 [N, T, H, D] with a matrix [D, D], one product a slice.

    A product over all slices at once may sum in another order than one over a single slice.
    """
    out = torch.empty_like(x)
    for index in range(x.shape[0]):
        torch.mm(x[index].flatten(0, 1), matrix, out=out[index].flatten(0, 1))
    return out


def _angles(first: Tensor, second: Tensor, level: int) -> Tensor:
    """Returns angles in [0, span], fp32: of signed channels at level 1, of radii above."""
    if level > 1:
        return torch.atan2(second, first)
    return torch.atan2(-(second + 0.0), -first).add_(math.pi)


def _analytic_codes(first: Tensor, second: Tensor, level: int) -> Tensor:
    """Returns codes of the analytic codebook, uint8, without angles where radii are enough."""
    points = centroids(level)
    if level == 1:
        scaled = _angles(first, second, level).mul_(len(points) / span(level))
        return scaled.clamp_(0, len(points) - 1).to(torch.int32).to(torch.uint8)
    codes = torch.zeros_like(first, dtype=torch.uint8)
    for low, high in pairwise(points):
        codes += (second > first * math.tan((low + high) / 2)).view(torch.uint8)
    return codes


def _analytic_book(level: int, device: torch.device) -> Tensor:
    """Returns the analytic angles of a level, fp32 [1, size]."""
    return torch.tensor([centroids(level)], dtype=torch.float32, device=device)


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
    points = _analytic_book(level, angles.device).double().repeat(angles.shape[0], 1)
    for _ in range(_LLOYD_ITERATIONS):
        bounds = (points[:, 1:] + points[:, :-1]) / 2
        cuts = torch.searchsorted(ordered, bounds)
        cuts = torch.nn.functional.pad(cuts, (1, 0), value=0)
        cuts = torch.nn.functional.pad(cuts, (0, 1), value=ordered.shape[1])
        counts = cuts.diff(dim=1)
        means = sums.gather(1, cuts).diff(dim=1) / counts
        points = torch.where(counts > 0, means, points)
    return points.half()
