import math
from itertools import pairwise

import pytest
from scipy.integrate import quad

from polarcache.kernels.polar.codebook import centroids, expected_distortion

# Angles and distortions to six digits, from an independent fixed-point run in fp64.
KNOWN = {
    2: ((0.309756, 0.633980, 0.936816, 1.261040), 0.009909),
    3: ((0.426250, 0.674385, 0.896411, 1.144547), 0.006162),
    4: ((0.524214, 0.705909, 0.864887, 1.046582), 0.003393),
}


def density(level: int, angle: float) -> float:
    """Density of a level by its Gamma-function normalisation."""
    if level == 1:
        return 1 / (2 * math.pi)
    chi = 2 ** (level - 1)  # channels below each of the two radii
    norm = math.gamma(chi) / (2 ** (chi - 2) * math.gamma(chi / 2) ** 2)
    return norm * math.sin(2 * angle) ** (chi - 1)


def cells(level: int) -> list[tuple[float, float, float]]:
    """(start, point, stop) of every cell, by the midpoint rule."""
    points = centroids(level)
    middles = [(low + high) / 2 for low, high in pairwise(points)]
    bounds = [0.0, *middles, 2 * math.pi if level == 1 else math.pi / 2]
    return [
        (start, point, stop) for (start, stop), point in zip(pairwise(bounds), points, strict=True)
    ]


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_centroids_are_the_means_of_their_cells(level: int) -> None:
    for start, point, stop in cells(level):
        mass = quad(lambda a: density(level, a), start, stop)[0]
        moment = quad(lambda a: a * density(level, a), start, stop)[0]
        assert point == pytest.approx(moment / mass, abs=1e-8)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_expected_distortion_is_the_integral_over_the_cells(level: int) -> None:
    total = sum(
        quad(lambda a, point=point: (a - point) ** 2 * density(level, a), start, stop)[0]
        for start, point, stop in cells(level)
    )
    assert expected_distortion(level) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_centroids_match_known_digits_and_mirror_at_a_quarter_turn(level: int) -> None:
    points, distortion = KNOWN[level]
    assert centroids(level) == pytest.approx(points, abs=1e-6)
    assert expected_distortion(level) == pytest.approx(distortion, abs=1e-6)
    for low, high in zip(centroids(level), reversed(centroids(level)), strict=True):
        assert low + high == pytest.approx(math.pi / 2, abs=1e-12)


def test_centroids_of_level_1_are_uniform() -> None:
    step = 2 * math.pi / 16
    assert centroids(1) == pytest.approx([(index + 0.5) * step for index in range(16)], abs=1e-9)
    assert expected_distortion(1) == pytest.approx(step**2 / 12, rel=1e-6)
