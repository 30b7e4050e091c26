import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from polarcache.kernels import BlockShape, NonFiniteError, Profile, ShapeError
from polarcache.kernels.bits import unpack_field
from polarcache.kernels.codec import Codec

POISON = 0xA5
PROFILES = [
    "exact",
    "k=pair:r4t4,v=int4",
    "k=pair:r3t3:minmax:g64,v=int2:g16",
    "k=recursive:seed2,v=recursive:kmeans",
    "k=recursive:kmeans,v=exact",
    "k=exact,v=int4:g16",
    "k=pair:tiers8,v=polar",
    "k=pair:r3t3:arc2:g64,v=polar:b6",
    "k=polar,v=recursive:deep",
    "k=recursive:deep,v=recursive:log8",
]
SHAPES = [
    pytest.param(BlockShape(128, 2, 64, 64, "half", 64), id="T128-H2-D64"),
    pytest.param(BlockShape(128, 1, 80, 96, "interleaved", 80), id="T128-H1-D80-Dv96-mqa"),
    pytest.param(BlockShape(128, 8, 96, 64, "half", 32), id="T128-H8-D96-Dv64-rotary32"),
    pytest.param(BlockShape(256, 1, 256, 128, "half", 0), id="T256-H1-D256-Dv128-no-rope"),
]
ALL_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Relative L2 on Gaussian data, with room for the small samples; exact sides have none.
LARGEST_ERROR = {"pair:r4t4": 0.12, "pair:r3t3": 0.25, "int4": 0.13, "int2": 0.42, "recurs": 0.19}
LARGEST_ERROR |= {"pair:tiers8": 0.13, "polar:b8": 0.1, "polar:b6": 0.19}


def tensors(shape: BlockShape, dtype: torch.dtype, slices: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    size = (slices, shape.tokens, shape.kv_heads)
    keys = torch.randn((*size, shape.head_dim), generator=generator)
    values = torch.randn((*size, shape.v_head_dim), generator=generator)
    return keys.to(dtype), values.to(dtype)


def packed_of(codec: Codec, keys: Tensor, values: Tensor, poison: int = POISON) -> Tensor:
    size = (keys.shape[0], codec.layout.slice_bytes)
    out = torch.full(size, poison, dtype=torch.uint8, device=keys.device)
    codec.encode(keys, values, out)
    return out


def decoded_of(codec: Codec, packed: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    keys_out, values_out = torch.full_like(keys, math.nan), torch.full_like(values, math.nan)
    codec.decode(packed, keys_out, values_out)
    return keys_out, values_out


def same_bits(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", PROFILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_round_trip_writes_every_byte_and_stays_within_the_codecs_error(
    text: str, shape: BlockShape, dtype: torch.dtype
) -> None:
    codec = Codec(Profile.parse(text), shape, dtype)
    keys, values = tensors(shape, dtype)
    packed = packed_of(codec, keys, values)
    assert torch.equal(packed, packed_of(codec, keys, values, poison=0x5A))
    for pad in codec.layout.pads():
        assert not packed[:, pad].any()
    for name, x, out in zip(
        (str(codec.profile.key), str(codec.profile.value)),
        (keys, values),
        decoded_of(codec, packed, keys, values),
        strict=True,
    ):
        if name == "exact":
            assert same_bits(out, x)
            continue
        bound = next(limit for prefix, limit in LARGEST_ERROR.items() if name.startswith(prefix))
        assert (out.float() - x.float()).norm() < bound * x.float().norm()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=["fp16", "bf16", "fp32"])
def test_exact_keeps_every_bit_pattern(dtype: torch.dtype) -> None:
    shape = BlockShape(256, 1, 256, 16, "half", 256)
    codec = Codec(Profile.parse("exact"), shape, dtype)
    if dtype == torch.float32:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 65537
    else:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    keys = patterns.view(dtype).view(1, 256, 1, 256)
    values = keys[..., :16]
    packed = packed_of(codec, keys, values)
    keys_out, values_out = decoded_of(codec, packed, keys, values.contiguous())
    assert same_bits(keys_out, keys)
    assert same_bits(values_out, values)


@pytest.mark.parametrize("text", PROFILES)
def test_strided_and_unaligned_views_give_the_same_bytes(text: str) -> None:
    shape = BlockShape(128, 2, 64, 32, "interleaved", 32)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    keys, values = tensors(shape, torch.float16)
    expected = packed_of(codec, keys, values)
    # Head-major storage, every other token, channels inside a wider row.
    wide_keys = torch.zeros((3, 2, 256, 70), dtype=torch.float16)
    wide_values = torch.zeros((3, 2, 256, 70), dtype=torch.float16)
    key_view = wide_keys[:, :, ::2, 3:67].transpose(1, 2)
    value_view = wide_values[:, :, ::2, 1:33].transpose(1, 2)
    key_view.copy_(keys)
    value_view.copy_(values)
    wide = torch.full((3, codec.layout.slice_bytes + 7), POISON, dtype=torch.uint8)
    out = wide[:, 3:-4]
    codec.encode(key_view, value_view, out)
    assert torch.equal(out, expected)
    assert bool((wide[:, :3] == POISON).all())
    assert bool((wide[:, -4:] == POISON).all())
    contiguous = decoded_of(codec, expected, keys, values)
    wide_keys.fill_(1)
    wide_values.fill_(1)
    codec.decode(out, key_view, value_view)
    assert same_bits(key_view, contiguous[0])
    assert same_bits(value_view, contiguous[1])
    assert bool((wide_keys[:, :, 1::2] == 1).all())
    assert bool((wide_values[..., 33:] == 1).all())


@pytest.mark.parametrize("text", PROFILES)
def test_read_only_buffers_are_read(text: str) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    keys, values = tensors(shape, torch.float16)
    frame = b"\x01" + keys.numpy().tobytes() + values.numpy().tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the buffer is not writable
        elements = torch.frombuffer(frame, dtype=torch.float16, offset=1)
    count = keys.numel()
    packed = packed_of(
        codec, elements[:count].view(keys.shape), elements[count:].view(values.shape)
    )
    assert torch.equal(packed, packed_of(codec, keys, values))


@pytest.mark.parametrize("text", PROFILES)
def test_slices_code_alone_as_they_do_together(text: str) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    keys, values = tensors(shape, torch.float16, slices=5)
    packed = packed_of(codec, keys, values)
    keys_out, values_out = decoded_of(codec, packed, keys, values)
    for index in range(5):
        one = slice(index, index + 1)
        assert torch.equal(packed_of(codec, keys[one], values[one]), packed[one])
        alone = decoded_of(codec, packed[one], keys[one], values[one])
        assert same_bits(alone[0], keys_out[one])
        assert same_bits(alone[1], values_out[one])


@pytest.mark.parametrize("text", [text for text in PROFILES if "exact" not in text])
def test_fp32_tensors_code_as_their_fp16_numbers(text: str) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    keys, values = tensors(shape, torch.float16)
    packed = packed_of(codec, keys, values)
    assert torch.equal(packed_of(codec, keys.float(), values.float()), packed)
    wide = decoded_of(codec, packed, keys.float(), values.float())
    narrow = decoded_of(codec, packed, keys, values)
    assert torch.equal(wide[0].half(), narrow[0])
    assert torch.equal(wide[1].half(), narrow[1])


@pytest.mark.parametrize("text", PROFILES)
@pytest.mark.parametrize("number", [0.0, 1.5, 8000.0, 6e-8])
def test_constant_blocks_decode_to_finite_numbers(text: str, number: float) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    keys = torch.full((1, 128, 2, 64), number, dtype=torch.float16)
    for out in decoded_of(codec, packed_of(codec, keys, keys), keys, keys):
        assert bool(out.isfinite().all())
        error = (out.float() - keys.float()).norm() / keys.float().norm().clamp(1e-9)
        # Logarithmic radii below 2**-16 are zero.
        assert float(error) < 0.4 or (number < 2.0**-16 and not out.any())
        assert number != 0 or not out.any()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("text", "side"),
    [
        (text, side)
        for text in PROFILES
        for side in ("keys", "values")
        if f"{side[0]}=exact" not in text and text != "exact"
    ],
)
def test_non_finite_numbers_are_refused_by_side_and_slice(
    text: str, number: float, side: str
) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    for position in ((3, 0, 0, 0), (4, 127, 1, 63), (3, 77, 1, 30)):
        keys, values = tensors(shape, torch.float16, slices=5)
        (keys if side == "keys" else values)[position] = number
        with pytest.raises(NonFiniteError, match=f"{side} of slice {position[0]}:"):
            packed_of(codec, keys, values)


@pytest.mark.parametrize(
    ("text", "side", "number"),
    [
        ("k=pair:r4t4,v=int4", "keys", 65505.0),
        ("k=recursive,v=int4", "keys", 3e5),
        ("k=exact,v=int4", "values", -7e4),
        ("k=exact,v=int2", "values", 3e5),
    ],
)
def test_numbers_beyond_fp16_parameters_are_refused(text: str, side: str, number: float) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float32)
    keys, values = torch.zeros((2, 1, 128, 2, 64)).unbind(0)
    (keys if side == "keys" else values)[0, 5, 0, 1] = number
    with pytest.raises(NonFiniteError, match=side):
        packed_of(codec, keys, values)


def test_the_largest_fp16_numbers_decode_to_finite_keys() -> None:
    shape = BlockShape(128, 1, 16, 16, "half", 16)
    keys = torch.zeros((1, 128, 1, 16), dtype=torch.float16)
    keys[..., :8] = torch.linspace(-65504, 65504, 128)[:, None, None].half()
    for text in ("k=pair:r7t1,v=exact", "k=pair:r1t7,v=exact", "k=pair:r4t4:minmax,v=exact"):
        codec = Codec(Profile.parse(text), shape, torch.float16)
        keys_out, _ = decoded_of(codec, packed_of(codec, keys, keys), keys, keys)
        assert bool(keys_out.isfinite().all())


def test_no_slices_are_no_work() -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    for text in PROFILES:
        codec = Codec(Profile.parse(text), shape, torch.float16)
        keys, values = tensors(shape, torch.float16, slices=0)
        decoded_of(codec, packed_of(codec, keys, values), keys, values)


def test_tensors_that_do_not_fit_are_refused() -> None:
    shape = BlockShape(128, 2, 64, 32, "half", 64)
    codec = Codec(Profile.parse("k=pair,v=exact"), shape, torch.float16)
    keys, values = tensors(shape, torch.float16)
    out = torch.zeros((3, codec.layout.slice_bytes), dtype=torch.uint8)
    strided = torch.zeros((*keys.shape[:3], 128), dtype=torch.float16)[..., ::2]
    for bad_keys, bad_values, bad_out, message in (
        (keys[:2], values, out, "keys (2, 128, 2, 64): expected (3, 128, 2, 64)"),
        (keys, values[..., :16], out, "values (3, 128, 2, 16): expected (3, 128, 2, 32)"),
        (keys.bfloat16(), values, out, "expected torch.float16 or torch.float32"),
        (keys, values.float(), out, "values torch.float32: expected torch.float16"),
        (strided, values, out, "keys: expected a contiguous last dim"),
        (keys.to("meta"), values, out, "keys on meta: expected cpu"),
        (keys, values, out[:, :-1], f"expected {codec.layout.slice_bytes}"),
        (keys, values, out.short(), "expected uint8"),
        (keys, values, out[0], "expected uint8"),
    ):
        for call in (codec.encode, lambda k, v, p: codec.decode(p, k, v)):
            with pytest.raises(ShapeError, match=re.escape(message)):
                call(bad_keys, bad_values, bad_out)
    with pytest.raises(ShapeError, match="expected float16"):
        Codec(Profile.parse("exact"), shape, torch.float64)


def test_encode_leaves_its_inputs_alone() -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    for text, dtype in itertools.product(PROFILES, ALL_DTYPES):
        codec = Codec(Profile.parse(text), shape, dtype)
        keys, values = tensors(shape, dtype)
        before = keys.clone(), values.clone()
        packed_of(codec, keys, values)
        assert torch.equal(keys, before[0])
        assert torch.equal(values, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", PROFILES)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=["fp16", "bf16", "fp32"])
def test_a_gpu_decodes_cpu_bytes_and_codes_nearly_alike(
    text: str, shape: BlockShape, dtype: torch.dtype
) -> None:
    codec = Codec(Profile.parse(text), shape, dtype)
    keys, values = tensors(shape, dtype)
    packed = packed_of(codec, keys, values)
    on_gpu = packed_of(codec, keys.cuda(), values.cuda())
    # Codes on a bin edge may differ by one, parameters by an ulp: both are rare.
    assert float((on_gpu.cpu() != packed).float().mean()) < 0.01
    expected = decoded_of(codec, packed, keys, values)
    got = decoded_of(codec, packed.cuda(), keys.cuda(), values.cuda())
    for on_cpu, out in zip(expected, got, strict=True):
        torch.testing.assert_close(out.cpu().float(), on_cpu.float(), rtol=1e-2, atol=1e-3)
    alone = decoded_of(codec, packed[1:2].cuda(), keys[1:2].cuda(), values[1:2].cuda())
    assert same_bits(alone[0], got[0][1:2])
    assert same_bits(alone[1], got[1][1:2])
    bad = keys.cuda()
    bad[2, 5, 0, 3] = math.nan
    if str(codec.profile.key) != "exact":
        with pytest.raises(NonFiniteError, match="keys of slice 2"):
            packed_of(codec, bad, values.cuda())


def test_packed_bytes_read_back_with_nothing_but_the_layout() -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse("k=pair:r3t3,v=int4"), shape, torch.float16)
    keys, values = tensors(shape, torch.float16, slices=1)
    packed = packed_of(codec, keys, values)
    numbers = {
        field.name: unpack_field(field, packed)[0].double().numpy() for field in codec.layout.fields
    }
    keys_out, values_out = decoded_of(codec, packed, keys, values)

    scale, zero = numbers["value_parameters"][..., None]
    expected = (numbers["value_codes"][..., None, :] * scale + zero)[..., 0, :]
    np.testing.assert_allclose(values_out[0].double().numpy(), expected, rtol=1e-3, atol=1e-6)

    codes = numbers["key_codes"].astype(int)
    radius_min, radius_scale, angle_zero, angle_scale = numbers["key_parameters"][0]
    radius = radius_min + ((codes >> 3) + 0.5) * radius_scale
    angle = angle_zero + ((codes & 7) + 0.5) * angle_scale
    pairs = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), -1)
    np.testing.assert_allclose(keys_out[0].double().numpy(), pairs, rtol=1e-3, atol=1e-5)
