import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polarcache.kernels import BlockShape, Polar
from polarcache.kernels.polar import centre, universal
from polarcache.kernels.polar.rings import rings
from polarcache.kernels.polar.rotation import mixing

HEAD_DIMS = [16, 48, 64, 80, 96, 128, 256]
CODECS = [Polar(bits) for bits in range(3, 9)]
CODECS += [Polar(8, 3), Polar(6, 2), Polar(4, 1), Polar(3, 1)]


def gaussian(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def round_trip(x: Tensor, codec: Polar) -> Tensor:
    out = torch.full_like(x, math.nan)
    universal.decode(*universal.encode(x, codec), codec, out)
    return out


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mixing_is_orthogonal_and_spreads_a_single_channel(head_dim: int) -> None:
    matrix = mixing(head_dim, torch.device("cpu")).double()
    identity = torch.eye(head_dim, dtype=torch.float64)
    assert float((matrix @ matrix.T - identity).abs().max()) < 1e-6
    assert float(matrix.abs().max()) < 2 / math.sqrt(head_dim)
    assert float(matrix.sum(1).abs().max()) < 0.8 * math.sqrt(head_dim)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_gaussian_error_is_what_the_density_predicts(codec: Polar) -> None:
    # The gain makes <u, decoded> = <u, u>: the decoded row is longer by 1 / (1 - distortion).
    distortion = rings(codec).distortion
    expected = math.sqrt(distortion / (1 - distortion))
    x = gaussian(2, 128, 2, 256)
    error = round_trip(x, codec) - x
    assert float(error.norm() / x.norm()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("codec", [Polar(8), Polar(6), Polar(8, 3)], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_are_the_stated_formula_in_fp64(head_dim: int, codec: Polar) -> None:
    x = gaussian(1, 32, 2, head_dim)
    codes, gains = universal.encode(x, codec)
    mixed = x.double().numpy() @ mixing(head_dim, x.device).double().numpy().T
    half = head_dim // 2
    pair = mixed[..., :half] + 1j * mixed[..., half:]
    rms = np.sqrt((mixed**2).mean(-1, keepdims=True))
    book = rings(codec)
    ring = np.searchsorted(book.bounds, abs(pair / rms))
    count = np.array(book.counts)[ring]
    phase = np.floor(np.angle(pair) % math.tau / (math.tau / count)).astype(int)
    got = codes.numpy().astype(int)
    assert (got == np.array(book.firsts)[ring] + phase).mean() > 0.999
    got_ring = np.searchsorted(book.firsts, got, side="right") - 1
    step = math.tau / np.array(book.counts)[got_ring]
    turn = step * (got - np.array(book.firsts)[got_ring] + 0.5)
    unit = np.array(book.radii)[got_ring] * np.exp(1j * turn)
    exact_gain = (abs(pair) ** 2).sum(-1) / (pair * unit.conj()).real.sum(-1)
    np.testing.assert_allclose(gains.double().numpy(), exact_gain, rtol=1e-5)
    decoded = round_trip(x, codec).double().numpy()
    product = (decoded * x.double().numpy()).sum(-1)
    np.testing.assert_allclose(product, (x.double().numpy() ** 2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_rows_that_are_refused_name_points_that_there_are(codec: Polar) -> None:
    x = gaussian(1, 4, 1, 64)
    x[0, 1, 0, 3], x[0, 2, 0, 5] = math.nan, -math.inf
    codes, gains = universal.encode(x, codec)
    assert int(codes.max()) < 1 << codec.bits
    assert gains.isfinite().flatten().tolist() == [True, False, False, True]


@pytest.mark.parametrize("number", [0.0, 1.5, -3e4, 6e-8])
def test_equal_channels_decode_close(number: float) -> None:
    x = torch.full((1, 8, 1, 64), number)
    out = round_trip(x, Polar())
    assert bool(out.isfinite().all())
    assert float((out - x).norm()) <= 0.25 * float(x.norm())


@given(st.integers(0, 10_000), st.floats(1e-3, 1e2), st.floats(0, 50))
def test_means_are_within_half_a_step_and_leave_the_rest(
    seed: int, scale: float, offset: float
) -> None:
    x = (gaussian(2, 16, 2, 32, seed=seed) + offset * gaussian(2, 1, 2, 32, seed=seed + 1)) * scale
    centred, codes, scales = centre.encode_means(x)
    means = centre.decode_means(codes, scales)
    step = scales.float().unsqueeze(-1) / centre.MEAN_STEPS
    slack = 1e-3 * scales.float().unsqueeze(-1) + 2.0**-24  # of the largest mean as fp16
    assert bool(((means - x.mean(1)).abs() <= 0.51 * step + slack).all())
    torch.testing.assert_close(centred + means.unsqueeze(1), x, rtol=1e-5, atol=1e-4 * scale)


def test_means_of_nothing_are_nothing_and_of_nan_are_refused() -> None:
    centred, codes, scales = centre.encode_means(torch.zeros(1, 8, 1, 16))
    assert not centred.any()
    assert not centre.decode_means(codes, scales).any()
    bad = torch.zeros(1, 8, 1, 16)
    bad[0, 3, 0, 5] = math.nan
    assert not bool(centre.encode_means(bad)[2].isfinite().any())


def test_balance_evens_out_pairs_and_turns_with_rope() -> None:
    shape = BlockShape(64, 1, 32, 32, "half", 32)
    spread = torch.logspace(-1, 1, 16).repeat(2)
    x = gaussian(1, 64, 1, 32) * spread
    energies = []
    for query in (None, torch.ones((1, 1, 16))):
        balanced, codes = centre.encode_balance(x, shape, query)
        energy = balanced.square().mean((0, 1, 2))
        energies.append(float(energy.max() / energy.min()))
        scale = centre.decode_balance(codes, shape)
        assert torch.equal(scale[..., :16], scale[..., 16:])
        torch.testing.assert_close(balanced / scale.unsqueeze(1), x)
    # Energies, 10,000 apart, to the power of 3/4 by default, of 1/2 for equal queries.
    assert 700 < energies[0] < 1700
    assert 70 < energies[1] < 170


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=20))
def test_gains_are_within_a_64th_of_an_octave(numbers: list[float]) -> None:
    gains = torch.tensor(numbers).view(1, -1, 1)
    decoded = centre.decode_gains(*centre.encode_gains(gains))
    largest = float(gains.max())
    near = gains > largest / 200
    torch.testing.assert_close(decoded[near], gains[near], rtol=0.0125, atol=1e-4)
    assert bool((decoded[~near] <= largest / 150 + 1e-4).all())
