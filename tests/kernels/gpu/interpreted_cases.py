"""Cases for Triton's interpreter; test_interpreted.py runs them with TRITON_INTERPRET set."""

import math

import pytest
import torch
from torch import Tensor

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.bits import unpack_field
from polarcache.kernels.codec import Codec
from polarcache.kernels.gpu.launch import Plan
from polarcache.kernels.options import Polar, Recursive
from polarcache.kernels.polar import sides

# The interpreter rounds as NumPy does, so only exact ties may fall to the other side.
LARGEST_SHARE = 1e-3
CASES = [
    ("k=pair:r4t4:minmax:g32,v=int4", BlockShape(64, 1, 64, 32, "half", 64)),
    ("k=pair:r4t4:g32,v=int4:g16", BlockShape(32, 2, 64, 64, "interleaved", 32)),
    ("k=pair:r3t3:g32,v=int2", BlockShape(64, 1, 64, 64, "half", 32)),
    ("k=pair:r2t1:g64,v=int4", BlockShape(128, 1, 80, 80, "half", 80)),
    ("k=pair:r2t3:g32,v=int4:g32", BlockShape(64, 1, 96, 96, "half", 0)),
    ("k=pair:r4t4:arc2:g32,v=exact", BlockShape(64, 1, 64, 64, "half", 32)),
    ("k=pair:r3t5:arc2:g32,v=exact", BlockShape(32, 1, 64, 32, "interleaved", 32)),
    ("k=exact,v=int2:g16", BlockShape(32, 1, 32, 80, "half", 32)),
    ("k=polar:b8,v=polar:b6", BlockShape(32, 1, 128, 128, "half", 128)),
    ("k=polar:b6,v=polar:b4", BlockShape(128, 1, 96, 80, "half", 48)),
    ("k=polar:b3,v=polar:r4t4", BlockShape(64, 2, 64, 64, "interleaved", 64)),
    ("k=pair:tiers6:g32,v=exact", BlockShape(64, 2, 128, 32, "half", 128)),
    ("k=pair:tiers7:g64,v=exact", BlockShape(64, 1, 64, 32, "interleaved", 32)),
    ("k=recursive,v=recursive", BlockShape(32, 1, 128, 128, "half", 128)),
    ("k=recursive:log8,v=recursive:seed7", BlockShape(48, 2, 64, 32, "half", 64)),
    ("k=recursive:deep,v=recursive:deep", BlockShape(32, 1, 128, 128, "half", 128)),
    ("k=recursive:deep,v=recursive:deep", BlockShape(16, 2, 32, 64, "half", 32)),
]


def tensors(shape: BlockShape) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = (2, shape.tokens, shape.kv_heads)
    mean = 2 * torch.randn(shape.head_dim, generator=generator)
    keys = torch.randn((*size, shape.head_dim), generator=generator) + mean
    values = torch.randn((*size, shape.v_head_dim), generator=generator)
    return keys.half(), values.half()


@pytest.mark.parametrize(("text", "shape"), CASES, ids=[text for text, _ in CASES])
def test_kernels_code_as_plain_torch(text: str, shape: BlockShape) -> None:
    codec = Codec(Profile.parse(text), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    keys, values = tensors(shape)
    expected = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
    codec.encode(keys, values, expected)
    got = torch.full_like(expected, 0xA5)
    refused = torch.zeros((2, 2), dtype=torch.int32)
    plan.encode(keys, values, None, got, refused)
    assert not refused.any()
    for field in codec.layout.fields:
        if field.name.split("_")[0] in plan.sides:
            differ = unpack_field(field, got) != unpack_field(field, expected)
            assert float(differ.float().mean()) < LARGEST_SHARE, field.name
    reference = [torch.empty_like(keys), torch.empty_like(values)]
    codec.decode(expected, *reference)
    decoded = [torch.full_like(x, math.nan) for x in (keys, values)]
    plan.decode(expected, None, *decoded)
    for side, out, x in zip(("key", "value"), decoded, reference, strict=True):
        if side in plan.sides:
            # Rotations multiply fp16 numbers, after up to seven roundings to them, and sum a row.
            codec_of_side = codec.profile.key if side == "key" else codec.profile.value
            rotated = isinstance(codec_of_side, Polar | Recursive)
            atol = 2.0**-8 * float(x.float().square().mean().sqrt()) if rotated else 4e-6
            torch.testing.assert_close(out, x, rtol=2.0**-10, atol=atol)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("k=pair:g32,v=int4", math.nan),
        ("k=pair:g32,v=int4", math.inf),
        ("k=pair:arc2:g32,v=recursive", -math.inf),
        ("k=recursive:deep,v=recursive:log8", math.nan),
        ("k=recursive:deep,v=recursive:log8", math.inf),
        ("k=recursive,v=recursive:deep", math.nan),
    ],
)
def test_non_finite_numbers_set_the_flag_of_their_side_and_slice(text: str, number: float) -> None:
    shape = BlockShape(32, 1, 64, 32, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    for side in range(2):
        both = tensors(shape)
        both[side][1, 17, 0, 30] = number
        out = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
        refused = torch.zeros((2, 2), dtype=torch.int32)
        plan.encode(*both, None, out, refused)
        assert refused.nonzero().tolist() == [[side, 1]]


@pytest.mark.parametrize("text", ["k=pair:g32,v=int4", "k=recursive:deep,v=recursive"])
def test_slots_name_the_rows_of_tokens(text: str) -> None:
    shape = BlockShape(32, 1, 64, 32, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    keys, values = tensors(shape)
    expected = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
    refused = torch.zeros((2, 2), dtype=torch.int32)
    plan.encode(keys, values, None, expected, refused)
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:64].view(2, 32)
    paged = [torch.zeros((80, *x.shape[2:]), dtype=x.dtype) for x in (keys, values)]
    for rows, x in zip(paged, (keys, values), strict=True):
        rows[slots] = x
    out = torch.full_like(expected, 0xA5)
    plan.encode(*paged, slots, out, refused)
    for field in codec.layout.fields:
        assert torch.equal(unpack_field(field, out), unpack_field(field, expected)), field.name


@pytest.mark.parametrize("number", [math.nan, math.inf, -65504.0])
def test_polar_rows_that_are_refused_set_the_flag_of_their_side_and_slice(number: float) -> None:
    shape = BlockShape(64, 1, 64, 64, "half", 64)
    codec = Codec(Profile.parse("k=polar:b6,v=polar:b6"), shape, torch.float32)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    for side in range(2):
        both = [x.float() for x in tensors(shape)]
        both[side][1, 17, 0] = 8 * number
        out = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
        refused = torch.zeros((2, 2), dtype=torch.int32)
        plan.encode(*both, None, out, refused)
        assert refused.nonzero().tolist() == [[side, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rotated_rows_of_other_dtypes_keep_their_size(dtype: torch.dtype) -> None:
    shape = BlockShape(64, 1, 64, 64, "half", 64)
    for text in ("k=polar:b6,v=polar:b8", "k=recursive:log8,v=recursive:log8"):
        codec = Codec(Profile.parse(text), shape, dtype)
        plan = Plan.of(codec.profile, shape, codec.layout)
        assert plan is not None
        for scale in (1e-3, 1e3):
            both = [(scale * x.float()).to(dtype) for x in tensors(shape)]
            expected = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
            codec.encode(*both, expected)
            got = torch.full_like(expected, 0xA5)
            plan.encode(*both, None, got, torch.zeros((2, 2), dtype=torch.int32))
            for field in codec.layout.fields:
                differ = unpack_field(field, got) != unpack_field(field, expected)
                assert int(differ.sum()) <= max(1, LARGEST_SHARE * differ.numel()), field.name
            reference = [torch.empty_like(x) for x in both]
            codec.decode(expected, *reference)
            decoded = [torch.full_like(x, math.nan) for x in both]
            plan.decode(expected, None, *decoded)
            for out, x in zip(decoded, reference, strict=True):
                # fp32 rows are multiplied in two parts.
                tolerance = 2.0**-18 if dtype == torch.float32 else 2.0**-7
                rms = float(x.float().square().mean().sqrt())
                torch.testing.assert_close(out, x, rtol=tolerance, atol=tolerance * rms)


def test_polar_keys_are_balanced_by_energies_of_queries() -> None:
    shape = BlockShape(64, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse("k=polar:b6,v=exact"), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    keys, values = tensors(shape)
    query = torch.rand((2, 2, 32), generator=torch.Generator().manual_seed(2))
    numbers = sides.encode(codec.profile.key, "key", shape, keys, query)
    out = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
    plan.encode(keys, values, None, out, torch.zeros((2, 2), dtype=torch.int32), query)
    for field in codec.layout.fields:
        if field.name in ("key_balance", "key_codes", "key_gains"):
            differ = unpack_field(field, out) != numbers[field.name.removeprefix("key_")]
            assert int(differ.sum()) <= max(1, LARGEST_SHARE * differ.numel()), field.name
