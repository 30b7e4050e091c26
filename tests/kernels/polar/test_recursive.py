import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from polarcache.kernels import Recursive
from polarcache.kernels.polar import recursive
from polarcache.kernels.polar.codebook import centroids
from polarcache.kernels.polar.rotation import rotation

HEAD_DIMS = [16, 64, 80, 96, 128, 256]
CODECS = [Recursive(), Recursive("kmeans", 3)]


def gaussian(head_dim: int, slices: int = 2, tokens: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((slices, tokens, 2, head_dim), generator=generator)


def round_trip(x: Tensor, codec: Recursive) -> Tensor:
    out = torch.full_like(x, math.nan)
    recursive.decode(recursive.encode(x, codec), codec, out)
    return out


def relative(decoded: Tensor, x: Tensor) -> float:
    return float((decoded - x).double().norm() / x.double().norm())


def predicted_relative_l2() -> float:
    """Relative error on Gaussian data, from the densities.

    The dot product of a unit vector and its decoded one splits at each node into
    cos a cos b <u1, v1> + sin a sin b <u2, v2>, where both halves are alike and independent of
    the node's angle a and code b. Its mean is so the product over levels of E cos(a - b), and
    both vectors have the stored radius: ||x - x'||^2 / ||x||^2 is 2 - 2 times that product.
    """
    product = 1.0
    for level in range(1, 5):
        end = 2 * math.pi if level == 1 else math.pi / 2
        power = 0 if level == 1 else 2 ** (level - 1) - 1
        points = centroids(level)
        bounds = [0.0, *((a + b) / 2 for a, b in pairwise(points)), end]
        mass = quad(lambda a, power=power: math.sin(2 * a) ** power, 0, end)[0]
        cosine = sum(
            quad(
                lambda a, point=point, power=power: math.cos(a - point) * math.sin(2 * a) ** power,
                start,
                stop,
            )[0]
            for (start, stop), point in zip(pairwise(bounds), points, strict=True)
        )
        product *= cosine / mass
    return math.sqrt(2 - 2 * product)


def test_gaussian_error_is_what_the_densities_predict() -> None:
    x = gaussian(128, tokens=256)
    assert predicted_relative_l2() == pytest.approx(math.sqrt(0.0320), rel=0.01)
    assert relative(round_trip(x, Recursive()), x) == pytest.approx(
        predicted_relative_l2(), rel=0.02
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_encode_matches_a_tree_walked_channel_by_channel(head_dim: int) -> None:
    x = gaussian(head_dim, slices=1, tokens=8)
    codes = recursive.encode(x, Recursive(seed=5))
    matrix = rotation(head_dim, 5, x.device).double().numpy()
    vectors = x.double().numpy().reshape(-1, head_dim) @ matrix.T
    wrong = total = 0
    for row, vector in enumerate(vectors):
        radii = vector
        for level in range(1, 5):
            half = len(radii) // 2
            got = codes.levels[level - 1].flatten(0, 2)[row].numpy()
            for index in range(half):
                angle = math.atan2(radii[index + half], radii[index]) % (2 * math.pi)
                nearest = np.argmin([abs(angle - point) for point in centroids(level)])
                wrong += int(got[index] != nearest)
                total += 1
            radii = np.hypot(radii[:half], radii[half:])
        stored = codes.radii.flatten(0, 2)[row].double().numpy()
        np.testing.assert_allclose(stored, radii, rtol=2.0**-10)
    # An angle within fp32 rounding of a boundary may take the other side.
    assert wrong <= total * 1e-3


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_of_one_slice_is_bit_for_bit_that_of_many(codec: Recursive, head_dim: int) -> None:
    x = gaussian(head_dim, slices=5)
    codes = recursive.encode(x, codec)
    together = torch.empty_like(x)
    recursive.decode(codes, codec, together)
    for index in range(5):
        one = slice(index, index + 1)
        book = None if codes.codebook is None else codes.codebook[one]
        alone = torch.empty_like(x[one])
        recursive.decode(
            recursive.Codes(tuple(level[one] for level in codes.levels), codes.radii[one], book),
            codec,
            alone,
        )
        assert torch.equal(alone, together[one])


def test_kmeans_fits_what_the_density_does_not_predict() -> None:
    # One shared direction: rotation cannot make this look Gaussian.
    x = gaussian(64, tokens=128) * 0.05 + gaussian(64, slices=1, tokens=1, seed=1)
    fitted = relative(round_trip(x, Recursive("kmeans")), x)
    assert fitted < 0.8 * relative(round_trip(x, Recursive()), x)


def test_kmeans_on_gaussian_data_stays_with_the_analytic_error() -> None:
    x = gaussian(128)
    assert relative(round_trip(x, Recursive("kmeans")), x) == pytest.approx(
        predicted_relative_l2(), rel=0.02
    )
    book = recursive.encode(x, Recursive("kmeans")).codebook
    assert book is not None
    assert book.shape == (2, 28)
    for points in torch.split(book.float(), [16, 4, 4, 4], 1):
        assert bool((points.diff(dim=1) > 0).all())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_zero_and_constant_slices_survive(codec: Recursive) -> None:
    zeros = torch.zeros((1, 8, 2, 64))
    assert not round_trip(zeros, codec).any()
    ones = torch.ones((1, 8, 2, 64))
    assert relative(round_trip(ones, codec), ones) < 0.35


def test_huge_fp16_numbers_stay_finite() -> None:
    x = torch.full((1, 8, 1, 64), 8000.0, dtype=torch.float16)
    x[..., ::2] *= -1
    assert bool(round_trip(x, Recursive()).isfinite().all())
