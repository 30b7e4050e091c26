"""Codebooks of the universal polar codec: points on rings around 0, for two Gaussian channels.

A pair of mixed channels has a Rayleigh radius and a uniform angle. Its code names a ring, chosen by
the radius alone, and one of the ring's evenly spaced phases. Radii are Lloyd-Max for the numbers of
phases given. Math: README.md, section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from polarcache.kernels.options import Polar

Floats = npt.NDArray[np.float64]

# Points of each ring, innermost first, for 2**bits points: none moved to another ring lessens the
# error. Found by descent from points in proportion to radii.
SHARED_OUT = {
    3: (1, 7),
    4: (1, 6, 9),
    5: (1, 7, 12, 12),
    6: (5, 10, 15, 18, 16),
    7: (1, 7, 13, 18, 22, 24, 24, 19),
    8: (3, 9, 15, 20, 25, 29, 32, 34, 34, 31, 24),
}

_MAX_ITERATIONS = 20_000


@dataclass(frozen=True, slots=True)
class Rings:
    """Points of a code, in units of the standard deviation of a channel.

    Attributes:
        counts: points of each ring, innermost first.
        radii: of the rings, rising.
        bounds: radii between rings, one less; a radius on a bound belongs to the inner ring.
        distortion: mean squared error of a channel of variance 1.
    """

    counts: tuple[int, ...]
    radii: tuple[float, ...]
    bounds: tuple[float, ...]
    distortion: float

    @property
    def firsts(self) -> tuple[int, ...]:
        """Code of the first point of each ring."""
        return tuple(accumulate(self.counts[:-1], initial=0))

    def points(self) -> Floats:
        """Returns both channels of every code, fp64 [codes, 2]; phases begin half a step past 0."""
        counts = np.array(self.counts)
        phases = np.concatenate([(np.arange(n) + 0.5) * (math.tau / n) for n in self.counts])
        radii = np.repeat(np.array(self.radii), counts)
        return np.stack((radii * np.cos(phases), radii * np.sin(phases)), -1)


def rings(codec: Polar) -> Rings:
    """Returns the codebook of a codec, bits and radius bits of which it depends on."""
    if codec.radius_bits == 0:
        return lloyd_max(SHARED_OUT[codec.bits])
    return lloyd_max((1 << codec.angle_bits,) * (1 << codec.radius_bits))


@lru_cache(maxsize=64)
def lloyd_max(counts: Sequence[int]) -> Rings:
    """Returns rings of given numbers of points with the least mean squared error.

    The mean of e^(i angle) over a step of 1/n of a turn has the size s = sin(pi/n)/(pi/n), so a
    ring's radius is s times the mean radius of its cell, and the bound between rings a and b lies
    where they err alike: (b^2 - a^2) / 2 (b s_b - a s_a).

    Args:
        counts: points of each ring, innermost first; a tuple.
    """
    number = np.array(counts, dtype=np.float64)
    shrink = np.sinc(1 / number)
    # To start from: a share of the area under the cube root of the density, by points.
    grid = np.linspace(0, 8, 8192)
    area = np.cumsum(grid * np.exp(-(grid**2) / 4))
    bounds = np.interp(np.cumsum(number)[:-1] / number.sum(), area / area[-1], grid)
    for _ in range(_MAX_ITERATIONS):
        mass, moment = _moments(bounds)
        radii = shrink * moment / mass
        moved = np.diff(radii**2) / (2 * np.diff(radii * shrink))
        change = np.abs(moved - bounds).max(initial=0)
        bounds = moved
        if change < 1e-14:
            break
    mass, moment = _moments(bounds)
    radii = shrink * moment / mass
    # A pair's squares sum to 2, its cross term with its point is moment x radius x shrink.
    error = 2 - 2 * (moment * radii * shrink).sum() + (mass * radii**2).sum()
    return Rings(tuple(counts), tuple(radii.tolist()), tuple(bounds.tolist()), float(error) / 2)


def _moments(bounds: Floats) -> tuple[Floats, Floats]:
    """Returns mass and first moment of r exp(-r^2 / 2) between bounds, 0 and infinity."""
    edges = [0.0, *bounds.tolist()]
    tail = np.array([math.exp(-(r**2) / 2) for r in edges] + [0.0])
    root = math.sqrt(math.pi / 2)
    below = np.array([root * math.erf(r / math.sqrt(2)) for r in edges] + [root])
    first = below - np.array([*edges, 0.0]) * tail
    return -np.diff(tail), np.diff(first)
