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

# The interpreter rounds as NumPy does, so only exact ties may fall to the other side.
LARGEST_SHARE = 1e-3
CASES = [
    ("k=pair:r4t4:minmax:g32,v=int4", BlockShape(64, 1, 64, 32, "half", 64)),
    ("k=pair:r4t4:g32,v=int4:g16", BlockShape(32, 2, 64, 64, "interleaved", 32)),
    ("k=pair:r3t3:g32,v=int2", BlockShape(64, 1, 64, 64, "half", 32)),
    ("k=pair:r2t1:g64,v=int4", BlockShape(128, 1, 80, 80, "half", 80)),
    ("k=pair:r2t3:g32,v=int4:g32", BlockShape(64, 1, 96, 96, "half", 0)),
    ("k=pair:r4t4:arc2:g32,v=int4", BlockShape(64, 1, 64, 64, "half", 64)),
    ("k=pair:r2t3:arc2:g32,v=int4", BlockShape(128, 1, 48, 32, "interleaved", 32)),
    ("k=exact,v=int2:g16", BlockShape(32, 1, 32, 80, "half", 32)),
    ("k=polar:r3t5,v=polar:r2t4", BlockShape(32, 1, 128, 128, "half", 128)),
    ("k=polar:r2t4,v=polar:r1t3", BlockShape(128, 1, 96, 80, "half", 48)),
    ("k=polar:r1t2,v=polar:r4t4", BlockShape(64, 2, 64, 64, "interleaved", 64)),
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
            # Rotations multiply fp16 numbers: 2**-12 of each, summed over a row.
            codec_of_side = codec.profile.key if side == "key" else codec.profile.value
            rotated = isinstance(codec_of_side, Polar | Recursive)
            atol = 2.0**-9 * float(x.float().square().mean().sqrt()) if rotated else 1e-6
            torch.testing.assert_close(out, x, rtol=2.0**-10, atol=atol)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_set_the_flag_of_their_side_and_slice(number: float) -> None:
    shape = BlockShape(32, 1, 64, 32, "half", 64)
    codec = Codec(Profile.parse("k=pair:g32,v=int4"), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    for side in range(2):
        both = tensors(shape)
        both[side][1, 17, 0, 30] = number
        out = torch.zeros((2, codec.layout.slice_bytes), dtype=torch.uint8)
        refused = torch.zeros((2, 2), dtype=torch.int32)
        plan.encode(*both, None, out, refused)
        assert refused.nonzero().tolist() == [[side, 1]]


def test_slots_name_the_rows_of_tokens() -> None:
    shape = BlockShape(32, 1, 64, 32, "half", 64)
    codec = Codec(Profile.parse("k=pair:g32,v=int4"), shape, torch.float16)
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
    assert torch.equal(out, expected)
