"""Codebooks of the rotated codecs: numbers that minimise the mean squared error.

The angle of two radii that each sum 2^(l-1) Gaussian channels has, at level l >= 2, a density
proportional to sin(2a)^(2^(l-1) - 1) on [0, pi/2]; at level 1 it is uniform on [0, 2 pi).
Source: arXiv 2502.02617, section 3.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from polarcache.kernels.layout import RECURSIVE_BITS

Floats = npt.NDArray[np.float64]

_STEPS = 1 << 15
_MAX_ITERATIONS = 2000


def span(level: int) -> float:
    """Returns the end of the range of angles that starts at 0: 2 pi at level 1, else pi/2."""
    return 2 * np.pi if level == 1 else np.pi / 2


def density(angles: Floats, level: int) -> Floats:
    """Returns the density of a level at `angles`, up to a constant factor."""
    if level == 1:
        return np.ones_like(angles)
    result: Floats = np.sin(2 * angles) ** (2 ** (level - 1) - 1)
    return result


@lru_cache(maxsize=64)
def centroids(level: int, bits: int | None = None) -> tuple[float, ...]:
    """Returns the Lloyd-Max angles of a level in rising order, exact to about 1e-9.

    Args:
        level: 1 to 6.
        bits: bits of a code; None for the published bits of levels 1 to 4.

    Returns:
        2**bits angles in radians.
    """
    count = 1 << (RECURSIVE_BITS[level - 1] if bits is None else bits)
    edges, mass, moment, _ = _moments(level)
    # Quantiles to start from: high levels are so narrow that even steps would leave cells empty.
    points = np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, edges)
    for _ in range(_MAX_ITERATIONS):
        bounds = np.concatenate(([0.0], (points[1:] + points[:-1]) / 2, [span(level)]))
        cell_mass = np.diff(np.interp(bounds, edges, mass))
        cell_moment = np.diff(np.interp(bounds, edges, moment))
        moved = cell_moment / cell_mass
        # Both densities are symmetric; keeping the points so stops rounding from drifting.
        moved = (moved + span(level) - moved[::-1]) / 2
        change = np.abs(moved - points).max()
        points = moved
        if change < 1e-14:
            break
    return tuple(float(point) for point in points)


@lru_cache(maxsize=64)
def expected_distortion(level: int, bits: int | None = None) -> float:
    """Returns the mean squared angle error of `centroids(level, bits)`, in square radians."""
    points = np.array(centroids(level, bits))
    edges, mass, moment, square = _moments(level)
    bounds = np.concatenate(([0.0], (points[1:] + points[:-1]) / 2, [span(level)]))
    cell_mass, cell_moment, cell_square = (
        np.diff(np.interp(bounds, edges, cumulative)) for cumulative in (mass, moment, square)
    )
    return float((cell_square - 2 * points * cell_moment + points**2 * cell_mass).sum() / mass[-1])


def _moments(level: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Returns grid edges and the density's cumulative mass, first and second moment at them."""
    edges = np.linspace(0, span(level), _STEPS + 1)
    half_step = (edges[1] - edges[0]) / 2
    middle = (edges[1:] + edges[:-1]) / 2
    # Three-point Gauss-Legendre in each step.
    offsets = np.array([-1.0, 0.0, 1.0])[:, None] * np.sqrt(0.6) * half_step
    weights = np.array([5.0, 8.0, 5.0])[:, None] / 9 * half_step
    angles = middle + offsets
    weighted = density(angles, level) * weights
    mass, moment, square = (
        np.concatenate(([0.0], np.cumsum((weighted * angles**power).sum(0)))) for power in range(3)
    )
    return edges, mass, moment, square
