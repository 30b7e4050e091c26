import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad

from polarcache.kernels import Polar
from polarcache.kernels.polar.rings import SHARED_OUT, Rings, lloyd_max, rings


def rayleigh(r: float) -> float:
    return r * math.exp(-r * r / 2)


def shrink(count: int) -> float:
    return math.sin(math.pi / count) / (math.pi / count)


def cells(book: Rings) -> list[tuple[float, float]]:
    return list(pairwise([0.0, *book.bounds, 12.0]))


@pytest.mark.parametrize("bits", SHARED_OUT)
def test_radii_and_bounds_are_each_best_for_the_other(bits: int) -> None:
    book = rings(Polar(bits))
    assert sum(book.counts) == 2**bits
    for count, radius, (low, high) in zip(book.counts, book.radii, cells(book), strict=True):
        mean = quad(lambda r: r * rayleigh(r), low, high)[0] / quad(rayleigh, low, high)[0]
        assert radius == pytest.approx(shrink(count) * mean, abs=1e-6)
    for index, bound in enumerate(book.bounds):
        inner, outer = (
            book.radii[i] ** 2 - 2 * bound * book.radii[i] * shrink(book.counts[i])
            for i in (index, index + 1)
        )
        assert inner == pytest.approx(outer, abs=1e-6)


@pytest.mark.parametrize("bits", SHARED_OUT)
def test_no_point_moved_to_another_ring_lessens_the_error(bits: int) -> None:
    counts = SHARED_OUT[bits]
    least = lloyd_max(counts).distortion
    for source in range(len(counts)):
        for target in range(len(counts)):
            moved = list(counts)
            moved[source] -= 1
            moved[target] += 1
            if source != target and min(moved) > 0:
                assert lloyd_max(tuple(moved)).distortion > least - 1e-6


def test_distortion_is_that_of_samples() -> None:
    book = rings(Polar(6))
    samples = np.random.default_rng(0).standard_normal((100_000, 2))
    points = book.points()
    ring = np.searchsorted(book.bounds, np.hypot(*samples.T))
    counts, firsts = np.array(book.counts)[ring], np.array(book.firsts)[ring]
    angles = np.arctan2(samples[:, 1], samples[:, 0]) % math.tau
    codes = firsts + np.minimum(angles * counts / math.tau, counts - 1).astype(int)
    assert ((samples - points[codes]) ** 2).mean() == pytest.approx(book.distortion, rel=0.02)


def test_shared_out_points_err_less_than_as_many_on_equal_rings() -> None:
    assert rings(Polar(8)).distortion < 0.85 * rings(Polar(8, 3)).distortion
    assert rings(Polar(6)).distortion < 0.88 * rings(Polar(6, 2)).distortion
    assert rings(Polar(4)).distortion < 0.92 * rings(Polar(4, 1)).distortion


def test_equal_rings_have_the_known_lloyd_max_radii_of_a_rayleigh_density() -> None:
    known = (0.328611, 0.669692, 0.980477, 1.289819, 1.616563, 1.983522, 2.432928, 3.08638)
    radii = [radius / shrink(32) for radius in rings(Polar(8, 3)).radii]
    assert radii == pytest.approx(known, abs=1e-5)
