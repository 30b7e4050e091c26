import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polarcache.kernels import BlockShape, Pair
from polarcache.kernels.polar import pair

Floats = npt.NDArray[np.float64]

TAU = 2 * math.pi
SECTOR = TAU / pair.NUM_SECTORS
HALF_ULP = 2.0**-11  # relative rounding error of fp16
# fp32 radius and angle carry a few roundings of 2^-24, on numbers up to the group's largest.
FP32_SLACK = 2.0**-20

BITS = [(r, t) for r in range(1, 8) for t in range(1, 8) if 3 <= r + t <= 8]
SHAPES = [
    pytest.param(BlockShape(128, 2, 64, 64, "half", 64), id="T128-H2-D64-half"),
    pytest.param(BlockShape(256, 1, 80, 80, "interleaved", 80), id="T256-H1-D80-interleaved"),
    pytest.param(BlockShape(64, 3, 96, 64, "half", 48), id="T64-H3-D96-half-rotary48"),
    pytest.param(BlockShape(32, 8, 128, 128, "half", 128), id="T32-H8-D128-half"),
    pytest.param(BlockShape(128, 1, 256, 128, "half", 0), id="T128-H1-D256-no-rope"),
    pytest.param(BlockShape(128, 2, 128, 128, "interleaved", 32), id="T128-H2-D128-rotary32"),
]


def keys_of(shape: BlockShape, seed: int = 0, slices: int = 2) -> Tensor:
    """Keys whose pairs range from a full circle to a narrow cluster, fp16."""
    generator = torch.Generator().manual_seed(seed)
    size = (slices, shape.tokens, shape.kv_heads, shape.head_dim)
    spread = torch.rand((shape.kv_heads, shape.head_dim), generator=generator)
    mean = 4 * torch.randn((shape.kv_heads, shape.head_dim), generator=generator)
    return (torch.randn(size, generator=generator) * spread + mean).half()


def polar_of(keys: Tensor, shape: BlockShape) -> tuple[Floats, Floats]:
    """Radius and angle in [0, 2 pi) of every pair, fp64, from the definition of the pairing."""
    half, rest = shape.rotary_dim // 2, (shape.head_dim - shape.rotary_dim) // 2
    if shape.pairing == "interleaved":
        first = [2 * j for j in range(shape.head_dim // 2)]
        second = [2 * j + 1 for j in range(shape.head_dim // 2)]
    else:
        first = list(range(half)) + [shape.rotary_dim + j for j in range(rest)]
        second = [j + half for j in range(half)]
        second += [shape.rotary_dim + rest + j for j in range(rest)]
    exact = keys.double().numpy()
    x, y = exact[..., first], exact[..., second]
    angle = np.arctan2(y, x)
    return np.hypot(x, y), np.where(angle < 0, angle + TAU, angle)


def grouped(numbers: Floats, group: int) -> Floats:
    slices, tokens, *rest = numbers.shape
    return numbers.reshape(slices, tokens // group, group, *rest)


def wrapped(angle: Floats) -> Floats:
    """The same angle in [-pi, pi)."""
    return (angle + math.pi) % TAU - math.pi


def exact_arc(angle: Floats) -> Floats:
    """Width of the smallest arc that holds all angles along axis 2, by sorting."""
    ordered = np.sort(angle % TAU, axis=2)
    around = np.concatenate((ordered, ordered[:, :, :1] + TAU), axis=2)
    return TAU - np.diff(around, axis=2).max(axis=2)


def encoded(keys: Tensor, codec: Pair, shape: BlockShape) -> tuple[Floats, Floats, Floats]:
    """Codes of radius and angle, grouped, and the stored parameters, fp64."""
    codes, parameters = pair.encode(keys, codec, shape)
    assert codes.dtype == torch.uint8
    assert parameters.dtype == torch.float16
    whole = grouped(codes.double().numpy(), codec.group_tokens)
    return whole // 2**codec.angle_bits, whole % 2**codec.angle_bits, parameters.double().numpy()


def assert_codes(numbers: Floats, codes: Floats, zero: Floats, scale: Floats, bits: int) -> None:
    """Codes are the floor of (number - zero) / scale unless that lies on a bin edge in fp32."""
    zero, scale = zero[:, :, None], scale[:, :, None]
    position = np.divide(numbers - zero, scale, out=np.zeros_like(numbers), where=scale > 0)
    expected = np.clip(np.floor(position), 0, 2**bits - 1)
    slack = np.divide(
        FP32_SLACK * (abs(numbers) + abs(zero) + math.pi), scale,
        out=np.zeros_like(numbers), where=scale > 0,
    )  # fmt: skip
    on_edge = abs(position - np.round(position)) <= slack
    wrong = (codes != expected) & ~(on_edge & (abs(codes - expected) <= 1))
    assert not wrong.any(), f"{wrong.sum()} wrong codes, first at {np.argwhere(wrong)[0]}"


def assert_half(name: str, stored: Floats, exact: Floats, absolute: float = 1e-6) -> None:
    """A stored parameter is the exact one rounded to fp16, give or take fp32's last bits."""
    slack = HALF_ULP * abs(exact) * 1.01 + absolute
    assert (abs(stored - exact) <= slack).all(), name


@pytest.mark.parametrize(("radius_bits", "angle_bits"), BITS, ids=lambda bits: f"b{bits}")
@pytest.mark.parametrize("group", [32, 64])
def test_encode_minmax_matches_the_published_formula(
    radius_bits: int, angle_bits: int, group: int
) -> None:
    shape = BlockShape(64, 2, 64, 64, "half", 64)
    check_minmax(shape, Pair(radius_bits, angle_bits, "minmax", group))


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_minmax_matches_the_published_formula_in_every_shape(shape: BlockShape) -> None:
    for group in (32, 64, 128, 256):
        if shape.tokens % group == 0:
            check_minmax(shape, Pair(4, 4, "minmax", group))


def check_minmax(shape: BlockShape, codec: Pair) -> None:
    keys = keys_of(shape)
    radius, angle = (grouped(side, codec.group_tokens) for side in polar_of(keys, shape))
    radius_codes, angle_codes, stored = encoded(keys, codec, shape)
    zero_r, scale_r, zero_t, scale_t = np.moveaxis(stored, 2, 0)
    for name, numbers, bits, zero, scale in (
        ("radius", radius, codec.radius_bits, zero_r, scale_r),
        ("angle", angle, codec.angle_bits, zero_t, scale_t),
    ):
        low, high = numbers.min(2), numbers.max(2)
        assert_half(f"{name} min", zero, low)
        assert_half(f"{name} scale", scale, (high - low) / 2**bits)
    assert_codes(radius, radius_codes, zero_r, scale_r, codec.radius_bits)
    assert_codes(angle, angle_codes, zero_t, scale_t, codec.angle_bits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle_range", ["arc", "minmax"])
@pytest.mark.parametrize(("radius_bits", "angle_bits"), [(4, 4), (3, 5), (3, 3), (1, 7), (7, 1)])
def test_decode_returns_bin_centres_within_half_a_bin(
    shape: BlockShape, angle_range: str, radius_bits: int, angle_bits: int
) -> None:
    codec = Pair(radius_bits, angle_bits, angle_range, 32)  # type: ignore[arg-type]
    keys = keys_of(shape)
    codes, parameters = pair.encode(keys, codec, shape)
    decoded = torch.full(keys.shape, math.nan)
    pair.decode(codes, parameters, codec, shape, decoded)
    zero_r, scale_r, zero_t, scale_t = np.moveaxis(parameters.double().numpy(), 2, 0)[:, :, :, None]
    radius, angle = (grouped(side, 32) for side in polar_of(keys, shape))
    radius_out, angle_out = (grouped(side, 32) for side in polar_of(decoded, shape))
    for error, zero, scale, bits in (
        (abs(radius - radius_out), zero_r, scale_r, radius_bits),
        (abs(wrapped(angle - angle_out)), zero_t, scale_t, angle_bits),
    ):
        rounding = HALF_ULP * (abs(zero) + 2**bits * scale) + 1e-4 * scale + 2e-5
        assert (error <= 0.5 * scale + rounding).all()
    centre = zero_t + (grouped(codes.numpy() % 2**angle_bits, 32) + 0.5) * scale_t
    assert abs(wrapped(centre - angle_out)).max() < 1e-4
    as_half = torch.full(keys.shape, math.nan, dtype=torch.float16)
    pair.decode(codes, parameters, codec, shape, as_half)
    assert torch.equal(as_half, decoded.half())


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.001, 8.0),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128, 256]),
)
def test_arc_is_never_wider_than_minmax_and_within_two_sectors_of_the_smallest(
    seed: int, spread: float, clusters: int, group: int
) -> None:
    random = np.random.default_rng(seed)
    shape = BlockShape(group, 2, 32, 32, "half", 32)
    centres = random.uniform(0, TAU, (clusters, 1, 1, 2, 16))
    pick = random.integers(0, clusters, (1, group, 2, 16))
    angle = np.take_along_axis(centres, pick[None], 0)[0] + spread * (
        random.random((1, group, 2, 16)) - 0.5
    )
    radius = random.uniform(1, 5, angle.shape)
    keys = torch.from_numpy(np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), -1))
    keys = keys.float()
    widths = {}
    for angle_range in ("arc", "minmax"):
        codec = Pair(4, 4, angle_range, group)  # type: ignore[arg-type]
        _, angle_codes, stored = encoded(keys, codec, shape)
        widths[angle_range] = stored[:, :, 3] * 16
        decoded = stored[:, :, None, 2] + (angle_codes + 0.5) * stored[:, :, None, 3]
        true = grouped(polar_of(keys, shape)[1], group)
        error = abs(wrapped(true - decoded))
        assert (error <= (0.5 + 17 * HALF_ULP) * stored[:, :, None, 3] + 0.004).all()
    rounding = TAU * 2 * HALF_ULP
    assert (widths["arc"] <= widths["minmax"] + rounding).all()
    true = grouped(polar_of(keys, shape)[1], group)
    assert (widths["arc"] <= exact_arc(true) + 2 * SECTOR + rounding).all()
    assert (widths["arc"] >= exact_arc(true) - rounding).all()


def test_arc_beats_minmax_where_angles_straddle_the_cut() -> None:
    shape = BlockShape(128, 4, 64, 64, "half", 64)
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn((1, 128, 4, 64), generator=generator) * 0.3
    keys[..., :32] += 4  # every pair lies around angle 0
    errors = {}
    for angle_range in ("arc", "minmax"):
        codec = Pair(4, 4, angle_range)  # type: ignore[arg-type]
        decoded = torch.empty_like(keys)
        pair.decode(*pair.encode(keys, codec, shape), codec, shape, decoded)
        errors[angle_range] = float((decoded - keys).norm() / keys.norm())
    assert errors["arc"] < 0.02
    assert errors["minmax"] > 5 * errors["arc"]


def test_arc_ignores_the_angle_of_zero_radius_tokens() -> None:
    shape = BlockShape(32, 1, 16, 16, "half", 16)
    keys = torch.zeros((1, 32, 1, 16))
    keys[..., :8] = -2.0
    keys[..., 8:] = torch.linspace(-0.1, 0.1, 32)[:, None, None]
    wide = keys.clone()
    wide[:, ::5] = 0.0  # angle 0, half a turn away from the others
    wide[:, 1::5] = -0.0
    codec = Pair(4, 4, "arc", 32)
    _, parameters = pair.encode(wide, codec, shape)
    assert float(parameters[:, :, 3].max()) * 16 < 0.11
    decoded = torch.empty_like(wide)
    pair.decode(*pair.encode(wide, codec, shape), codec, shape, decoded)
    kept = wide.abs().sum(-1) > 0
    assert float((decoded - wide)[kept].abs().max()) < 0.08


@pytest.mark.parametrize("angle_range", ["arc", "minmax"])
@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.0, 40000.0, 6e-8])
def test_constant_keys_survive(angle_range: str, number: float) -> None:
    shape = BlockShape(32, 2, 32, 32, "interleaved", 32)
    codec = Pair(3, 3, angle_range, 32)  # type: ignore[arg-type]
    keys = torch.full((1, 32, 2, 32), number, dtype=torch.float16)
    codes, parameters = pair.encode(keys, codec, shape)
    assert not codes.any()
    decoded = torch.full_like(keys, math.nan)
    pair.decode(codes, parameters, codec, shape, decoded)
    # Radius and angle zero are rounded to fp16: 2^-11 of the number, and 2^-10 radians.
    torch.testing.assert_close(decoded, keys, rtol=2e-3, atol=6e-8)


def test_pairing_decides_the_error_of_rotated_keys() -> None:
    tokens, dim = 128, 64
    position = np.arange(tokens)[:, None]
    speed = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    turn = np.exp(1j * position * speed)
    random = np.random.default_rng(5)
    content = random.normal(size=(tokens, dim // 2)) + 1j * random.normal(size=(tokens, dim // 2))
    rotated = (0.1 * content + np.linspace(2, 20, dim // 2)) * turn
    keys = torch.empty((1, tokens, 1, dim))
    keys[0, :, 0, : dim // 2] = torch.from_numpy(rotated.real)
    keys[0, :, 0, dim // 2 :] = torch.from_numpy(rotated.imag)
    errors = {}
    for pairing in ("half", "interleaved"):
        shape = BlockShape(tokens, 1, dim, dim, pairing, dim)  # type: ignore[arg-type]
        codec = Pair(2, 6)  # few radius bits are enough exactly where RoPE draws rings
        decoded = torch.empty_like(keys)
        pair.decode(*pair.encode(keys, codec, shape), codec, shape, decoded)
        errors[pairing] = float((decoded - keys).norm())
    assert errors["interleaved"] > 2 * errors["half"]


def test_fp32_and_fp16_inputs_of_equal_numbers_give_equal_codes() -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 32)
    keys = keys_of(shape)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = keys.to(dtype)
        for got, expected in zip(
            pair.encode(narrow, Pair(), shape), pair.encode(narrow.float(), Pair(), shape),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(got, expected)
