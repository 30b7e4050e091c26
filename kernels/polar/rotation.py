"""Seeded rotations that make the channels of a vector look Gaussian and independent."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_SIGNS_KEY = 0x706F6C6172


@lru_cache(maxsize=64)
def rotation(head_dim: int, seed: int, device: torch.device) -> Tensor:
    """Returns a random orthogonal matrix, equal on all machines up to the last bits of fp32.

    The Q of a Gaussian matrix is uniform over rotations and reflections once the diagonal of R is
    made positive (Mezzadri, arXiv math-ph/0609050). Computed in fp64, rounded once to fp32.

    Args:
        head_dim: D, any positive number.
        seed: names the rotation, 0 to 2**32 - 1.
        device: where the matrix lies.

    Returns:
        fp32 [D, D]; shared by callers, not to be written to.
    """
    # NumPy keeps the raw words of Philox stable, but not the stream of its normal numbers.
    words = np.random.Philox(key=seed).random_raw((2, head_dim, head_dim))
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    gaussian = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * np.pi * uniform[1])
    orthogonal, triangular = np.linalg.qr(gaussian)
    signs = np.where(np.diagonal(triangular) < 0, -1.0, 1.0)
    matrix = np.ascontiguousarray(orthogonal * signs, dtype=np.float32)
    return torch.from_numpy(matrix).to(device)


@lru_cache(maxsize=64)
def mixing(head_dim: int, device: torch.device) -> Tensor:
    """Returns a fixed orthogonal matrix that mixes all channels: signs, then Hadamard.

    An odd factor m of D is mixed by the orthonormal cosine transform (DCT-II) of size m. The
    signs keep a row of equal channels from becoming one spike.

    Args:
        head_dim: D, a multiple of 16.
        device: where the matrix lies.

    Returns:
        fp32 [D, D]; shared by callers, not to be written to.
    """
    odd = head_dim // (head_dim & -head_dim)
    index = np.arange(odd)
    matrix = np.cos(np.pi / odd * np.outer(index, index + 0.5)) * np.sqrt(2 / odd)
    matrix[0] = np.sqrt(1 / odd)
    while matrix.shape[0] < head_dim:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]) * np.sqrt(0.5), matrix)
    words = np.random.Philox(key=_SIGNS_KEY).random_raw(head_dim)
    signs = 1.0 - 2.0 * (words >> np.uint64(63)).astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(matrix * signs, dtype=np.float32)).to(device)


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiplies rows of fp32 [N, T, H, D] with a matrix [D, D], one product a slice.

    A product over all slices at once may sum in another order than one over a single slice.
    """
    out = torch.empty_like(x)
    for index in range(x.shape[0]):
        torch.mm(x[index].flatten(0, 1), matrix, out=out[index].flatten(0, 1))
    return out
