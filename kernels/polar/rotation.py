"""Seeded rotations that make the channels of a vector look Gaussian and independent."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


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
