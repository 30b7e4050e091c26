import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polarcache.kernels import ArcPair, BlockShape
from polarcache.kernels.polar import arcs

Floats = npt.NDArray[np.float64]

TAU = 2 * math.pi
START_STEP = TAU / (1 << arcs.START_BITS)
CODECS = [ArcPair(4, 4), ArcPair(2, 4), ArcPair(1, 7), ArcPair(0, 0, 8), ArcPair(0, 0, 5)]
SHAPES = [
    pytest.param(BlockShape(128, 2, 64, 64, "half", 64), id="T128-H2-D64-half"),
    pytest.param(BlockShape(256, 1, 80, 80, "interleaved", 80), id="T256-H1-D80-interleaved"),
    pytest.param(BlockShape(128, 3, 96, 64, "half", 48), id="T128-H3-D96-half-rotary48"),
    pytest.param(BlockShape(128, 1, 256, 128, "half", 0), id="T128-H1-D256-no-rope"),
]


def keys_of(shape: BlockShape, seed: int = 0, slices: int = 2) -> Tensor:
    """Keys whose pairs range from a full circle to a narrow cluster, fp16."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand((shape.kv_heads, shape.head_dim), generator=generator)
    mean = 4 * torch.randn((shape.kv_heads, shape.head_dim), generator=generator)
    size = (slices, shape.tokens, shape.kv_heads, shape.head_dim)
    return (torch.randn(size, generator=generator) * spread + mean).half()


def pairs_of(keys: Tensor, shape: BlockShape) -> npt.NDArray[np.complex128]:
    """Pairs as complex numbers, from the definition of the pairing."""
    half, rest = shape.rotary_dim // 2, (shape.head_dim - shape.rotary_dim) // 2
    if shape.pairing == "interleaved":
        first = [2 * j for j in range(shape.pairs)]
        second = [2 * j + 1 for j in range(shape.pairs)]
    else:
        first = list(range(half)) + [shape.rotary_dim + j for j in range(rest)]
        second = [j + half for j in range(half)]
        second += [shape.rotary_dim + rest + j for j in range(rest)]
    exact = keys.double().numpy()
    return exact[..., first] + 1j * exact[..., second]


def round_trip(keys: Tensor, codec: ArcPair, shape: BlockShape) -> tuple[arcs.Codes, Tensor]:
    codes = arcs.encode(keys, codec, shape)
    out = torch.full(keys.shape, math.nan)
    arcs.decode(codes, codec, shape, out)
    return codes, out


def ranked_bits(codec: ArcPair, pairs: int) -> list[tuple[int, int]]:
    return [(r, t) for count, r, t in codec.classes(pairs) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_decode_is_the_stated_formula_in_fp64(codec: ArcPair, shape: BlockShape) -> None:
    codes, out = round_trip(keys_of(shape), codec, shape)
    radius_codes = np.concatenate([part.double().numpy() for part in codes.radius], -1)
    angle_codes = np.concatenate([part.double().numpy() for part in codes.angle], -1)
    arc = codes.arcs.double().numpy()
    arc = (arc[:, :, 0] * 256 + arc[:, :, 1]).astype(int)
    zero, scale = np.moveaxis(codes.radii.double().numpy(), 2, 0)
    got = pairs_of(out, shape)
    group = codec.group_tokens
    for n, h in np.ndindex(got.shape[0], shape.kv_heads):
        order = range(shape.pairs) if codes.order is None else codes.order[n, h].tolist()
        assert sorted(order) == list(range(shape.pairs))
        for rank, (p, (_, t)) in enumerate(
            zip(order, ranked_bits(codec, shape.pairs), strict=True)
        ):
            groups = np.arange(shape.tokens) // group
            start, exponent = arc[n, groups, h, p] >> 4, arc[n, groups, h, p] & 15
            phase = start / 4096 + (angle_codes[n, :, h, rank] + 0.5) / 2.0 ** (t + exponent)
            radius = (
                zero[n, groups, h, p] + (radius_codes[n, :, h, rank] + 0.5) * scale[n, groups, h, p]
            )
            expected = radius * np.exp(1j * TAU * phase)
            np.testing.assert_allclose(got[n, :, h, p], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_key_is_within_half_a_bin_of_its_code(codec: ArcPair, shape: BlockShape) -> None:
    keys = keys_of(shape)
    codes, out = round_trip(keys, codec, shape)
    exact, decoded = pairs_of(keys, shape), pairs_of(out, shape)
    arc = codes.arcs.double().numpy()
    exponent = (arc[:, :, 1].astype(int) & 15).repeat(codec.group_tokens, 1)
    radius_bits = np.zeros((keys.shape[0], 1, shape.kv_heads, shape.pairs))
    angle_bits = np.zeros_like(radius_bits)
    for n, h in np.ndindex(keys.shape[0], shape.kv_heads):
        order = range(shape.pairs) if codes.order is None else codes.order[n, h].tolist()
        for p, (r, t) in zip(order, ranked_bits(codec, shape.pairs), strict=True):
            radius_bits[n, 0, h, p], angle_bits[n, 0, h, p] = r, t
    step = TAU / 2.0 ** (angle_bits + exponent)
    error = abs(np.angle(decoded / exact))
    # The start is rounded to a 4096th of a turn; fp32 angles and fp16 keys add a little.
    assert (error <= step / 2 + START_STEP / 2 + 1e-4).all()
    gain = (step / 2) / np.sin(step / 2)
    size = abs(exact).reshape(keys.shape[0], -1, codec.group_tokens, *exact.shape[2:])
    width = np.ptp(size, axis=2).repeat(codec.group_tokens, 1)
    bound = (width / 2.0**radius_bits / 2) * gain + abs(exact).max() * 2.0**-10
    assert (abs(abs(decoded) - abs(exact) * gain) <= bound).all()


@given(st.floats(0, TAU), st.floats(0, 6.2), st.integers(0, 1000))
def test_the_arc_is_the_smallest_power_of_two_that_holds_the_group(
    start: float, width: float, seed: int
) -> None:
    shape = BlockShape(32, 1, 16, 16, "half", 16)
    generator = torch.Generator().manual_seed(seed)
    angle = start + width * torch.rand((1, 32, 1, 8), generator=generator, dtype=torch.float64)
    keys = torch.cat((angle.cos(), angle.sin()), -1).float()
    codec = ArcPair(2, 4, group_tokens=32)
    codes, out = round_trip(keys, codec, shape)
    span = float((angle.amax(1) - angle.amin(1)).amax())
    exponents = codes.arcs[0, 0, 1, 0] & 15
    for p, exponent in enumerate(exponents.tolist()):
        own = float(angle[..., p].amax() - angle[..., p].amin())
        assert TAU / 2**exponent >= own - 1e-5 or exponent == 0
        # The search for the gap may miss the smallest arc by two sectors of 11.25 degrees.
        assert exponent == arcs.MAX_ARC_EXPONENT or TAU / 2 ** (exponent + 1) < own + TAU / 16
    error = torch.atan2(out[..., 8:], out[..., :8]).double() - angle
    error -= TAU * torch.round(error / TAU)
    assert float(error.abs().max()) <= TAU / 2 ** (int(exponents.min()) + 5) + START_STEP
    assert span <= TAU


def test_scores_of_a_key_with_itself_keep_their_size() -> None:
    shape = BlockShape(128, 1, 128, 128, "half", 128)
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn((4, 128, 1, 128), generator=generator)
    # Without the gain, 8 phases of a circle alone would lose 2.6 %; radii of 1 bit lose 1 %.
    for codec, loss in ((ArcPair(3, 3), 0.005), (ArcPair(0, 0, 5), 0.015)):
        _, out = round_trip(keys, codec, shape)
        assert float((out * keys).sum() / keys.square().sum()) == pytest.approx(1, abs=loss)


def test_pairs_that_move_most_get_the_most_bits() -> None:
    shape = BlockShape(128, 1, 64, 64, "half", 64)
    generator = torch.Generator().manual_seed(4)
    spread = torch.linspace(1, 3, 32).repeat(2)
    keys = torch.randn((1, 128, 1, 64), generator=generator) * spread
    codec = ArcPair(0, 0, 8)
    order = arcs.encode(keys, codec, shape).order
    assert order is not None
    assert set(order[0, 0, :4].tolist()) <= set(range(16, 32))
    # Queries that look only at the quiet pairs turn the ranking around.
    query = torch.linspace(1, 1e-4, 32).square().view(1, 1, 32)
    turned = arcs.encode(keys, codec, shape, query).order
    assert turned is not None
    assert set(turned[0, 0, -2:].tolist()) <= set(range(28, 32))


def test_tiers_cost_the_mean_bits_for_every_head() -> None:
    for bits in range(5, 9):
        for pairs in (8, 32, 40, 48, 64, 128):
            classes = ArcPair(0, 0, bits).classes(pairs)
            assert sum(count for count, _, _ in classes) == pairs
            assert sum(count * (r + t) for count, r, t in classes) == bits * pairs
            assert all(1 <= r <= t <= 7 for _, r, t in classes)


def test_any_bytes_decode_to_every_element() -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = ArcPair(0, 0, 6)
    codes, _ = round_trip(keys_of(shape), codec, shape)
    assert codes.order is not None
    bad = arcs.Codes(
        torch.full_like(codes.order, 255), codes.radius, codes.angle,
        torch.full_like(codes.arcs, 255), codes.radii,
    )  # fmt: skip
    out = torch.full((2, 128, 2, 64), math.nan)
    arcs.decode(bad, codec, shape, out)
    assert bool(out.isfinite().all())
