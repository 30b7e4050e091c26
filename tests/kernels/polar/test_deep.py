import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from polarcache.kernels import Recursive
from polarcache.kernels.polar import recursive
from polarcache.kernels.polar.codebook import centroids, expected_distortion
from polarcache.kernels.polar.rotation import rotation

DEEP, LOG8 = Recursive(form="deep"), Recursive(form="log8")


def gaussian(head_dim: int, slices: int = 2, tokens: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn((slices, tokens, 2, head_dim), generator=generator)


def round_trip(x: Tensor, codec: Recursive) -> Tensor:
    out = torch.full_like(x, math.nan)
    recursive.decode(recursive.encode(x, codec), codec, out)
    return out


def relative(decoded: Tensor, x: Tensor) -> float:
    return float((decoded - x).double().norm() / x.double().norm())


@pytest.mark.parametrize("level", [5, 6])
def test_centroids_of_high_levels_are_the_means_of_their_cells(level: int) -> None:
    power = 2 ** (level - 1) - 1
    points = centroids(level, 3)
    bounds = [0.0, *((a + b) / 2 for a, b in pairwise(points)), math.pi / 2]
    for (low, high), point in zip(pairwise(bounds), points, strict=True):
        mass = quad(lambda a: math.sin(2 * a) ** power, low, high)[0]
        mean = quad(lambda a: a * math.sin(2 * a) ** power, low, high)[0] / mass
        assert point == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "levels"), [(16, 4), (48, 4), (64, 6), (80, 4), (96, 5), (128, 6), (256, 6)]
)
def test_deep_halves_as_far_as_the_channels_do(head_dim: int, levels: int) -> None:
    assert len(DEEP.level_bits(head_dim)) == levels
    codes = recursive.encode(gaussian(head_dim, 1, 8), DEEP)
    assert [level.shape[-1] for level in codes.levels] == [
        head_dim >> level for level in range(1, levels + 1)
    ]
    assert codes.radii.shape[-1] == head_dim >> levels
    assert codes.radii.dtype == torch.uint8


def test_gaussian_error_is_the_sum_of_the_levels() -> None:
    x = gaussian(128, 4)
    angles = sum(
        expected_distortion(level, bits) for level, bits in enumerate((4, 4, 3, 3, 3, 3), 1)
    )
    radius = (math.log(2) / recursive._STEPS_PER_OCTAVE) ** 2 / 12
    assert relative(round_trip(x, DEEP), x) == pytest.approx(math.sqrt(angles + radius), rel=0.03)
    published = relative(round_trip(x, Recursive()), x)
    assert relative(round_trip(x, DEEP), x) ** 2 < published**2 / 1.8
    assert relative(round_trip(x, LOG8), x) == pytest.approx(
        math.sqrt(published**2 + radius), rel=0.02
    )


def test_stored_radius_keeps_scores_of_a_block_with_itself() -> None:
    x = gaussian(64, 1, 64)
    codes = recursive.encode(x, DEEP)
    mixed = x.double().numpy() @ rotation(64, 0, x.device).double().numpy().T
    # Unit vectors of the codes, walked down the tree.
    unit = np.ones((*x.shape[:3], 1))
    for level in range(6, 0, -1):
        book = np.array(centroids(level, (4, 4, 3, 3, 3, 3)[level - 1]))
        angle = book[codes.levels[level - 1].numpy()]
        unit = np.concatenate((np.cos(angle) * unit, np.sin(angle) * unit), -1)
    exact = (mixed**2).sum(-1) / (mixed * unit).sum(-1)
    stored = 2.0 ** ((codes.radii.double().numpy()[..., 0] - 128) / 8)
    assert abs(np.log2(stored / exact)).max() <= 1 / 16 + 1e-4


@pytest.mark.parametrize("codec", [DEEP, LOG8], ids=str)
def test_peaks_tell_what_logarithms_cannot(codec: Recursive) -> None:
    x = gaussian(64, 3, 8)
    x[1, 3, 0, 5] = math.nan
    x[2, 3, 0, 5] = math.inf
    peaks = recursive.encode(x, codec).peaks
    assert peaks is not None
    assert peaks.shape == (3, 1)
    assert peaks.isfinite().flatten().tolist() == [True, False, False]
    assert not round_trip(torch.zeros(1, 8, 1, 64), codec).any()
