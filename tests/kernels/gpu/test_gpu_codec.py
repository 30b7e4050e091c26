import math

import pytest
import torch
from torch import Tensor

from polarcache.kernels import BlockShape, NonFiniteError, Profile
from polarcache.kernels.bits import unpack_field
from polarcache.kernels.codec import Codec, check_refused

pytestmark = pytest.mark.gpu

BITS = [(r, t) for r in range(1, 8) for t in range(1, 8) if 3 <= r + t <= 8]
SHAPES = [
    pytest.param(BlockShape(128, 2, 64, 64, "half", 64), id="T128-H2-D64"),
    pytest.param(BlockShape(128, 1, 80, 96, "interleaved", 80), id="T128-H1-D80-Dv96-interleaved"),
    pytest.param(BlockShape(256, 3, 96, 64, "half", 48), id="T256-H3-D96-Dv64-rotary48"),
    pytest.param(BlockShape(128, 8, 128, 128, "half", 128), id="T128-H8-D128"),
    pytest.param(BlockShape(256, 2, 128, 96, "half", 32), id="T256-H2-D128-Dv96-rotary32"),
    pytest.param(BlockShape(128, 2, 128, 256, "interleaved", 64), id="T128-H2-D128-interleaved64"),
    pytest.param(BlockShape(128, 1, 256, 128, "half", 0), id="T128-H1-D256-no-rope"),
]
PROFILES = [
    "k=pair:r4t4,v=int4",
    "k=pair:r4t4:minmax,v=int4:g16",
    "k=pair:r3t3:g32,v=int2:g16",
    "k=pair:r2t5:minmax:g64,v=exact",
    "k=exact,v=int4:g32",
]
ARCS = [
    "k=pair:r4t4:arc2,v=int4",
    "k=pair:r3t4:arc2:g32,v=int4",
    "k=pair:tiers5,v=int4",
    "k=pair:tiers8:g64,v=int4",
]
ROTATED = [
    "k=polar:b8,v=polar:b6",
    "k=polar:b6,v=polar:b8",
    "k=recursive,v=recursive:seed3",
    "k=recursive:log8,v=recursive:deep",
    "k=recursive:deep,v=recursive:log8",
]
# Only numbers within a rounding of a bin edge may take the neighbouring code, and a parameter
# within fp32's rounding of a tie of fp16, such as the zero of an angle close to 0, the next one.
LARGEST_SHARE = {"code": 1e-3, "float16": 1e-2}


def tensors(shape: BlockShape, dtype: torch.dtype, slices: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    size = (slices, shape.tokens, shape.kv_heads)
    spread = torch.rand(shape.head_dim, generator=generator)
    mean = 3 * torch.randn((shape.kv_heads, shape.head_dim), generator=generator)
    keys = torch.randn((*size, shape.head_dim), generator=generator) * spread + mean
    values = torch.randn((*size, shape.v_head_dim), generator=generator)
    return keys.to(dtype), values.to(dtype)


def encoded(codec: Codec, keys: Tensor, values: Tensor, poison: int) -> Tensor:
    out = torch.full(
        (keys.shape[0], codec.layout.slice_bytes), poison, dtype=torch.uint8, device=keys.device
    )
    codec.encode(keys, values, out)
    return out


def assert_nearly_equal(codec: Codec, got: Tensor, expected: Tensor) -> None:
    for field in codec.layout.fields:
        numbers, reference = unpack_field(field, got.cpu()), unpack_field(field, expected)
        if field.dtype == "element":
            assert torch.equal(numbers, reference)
            continue
        wrong = int((numbers != reference).sum())
        allowed = max(2, LARGEST_SHARE[field.dtype] * numbers.numel())
        assert wrong <= allowed, f"{field.name}: {wrong} of {numbers.numel()} differ"
        if field.dtype == "float16":
            # Half an ulp of fp16 either way, and angles whose zero lies at the cut.
            error = (numbers.double() - reference.double()).abs()
            error = torch.minimum(error, (error - 2 * math.pi).abs())
            assert bool((error <= 2.0**-9 * reference.double().abs() + 1e-6).all()), field.name


def check(text: str, shape: BlockShape, dtype: torch.dtype) -> None:
    codec = Codec(Profile.parse(text), shape, dtype)
    keys, values = tensors(shape, dtype)
    expected = encoded(codec, keys, values, 0)
    got = encoded(codec, keys.cuda(), values.cuda(), 0xA5)
    assert torch.equal(got, encoded(codec, keys.cuda(), values.cuda(), 0x5A))
    assert_nearly_equal(codec, got, expected)
    decoded = [torch.full_like(x, math.nan, device="cuda") for x in (keys, values)]
    codec.decode(expected.cuda(), *decoded)
    for out, x in zip(decoded, (keys, values), strict=True):
        reference = [torch.empty_like(keys), torch.empty_like(values)]
        codec.decode(expected, *reference)
        on_cpu = reference[0 if x is keys else 1]
        # Rotations multiply fp16 numbers, each 2**-12 off, and sum them over a row.
        atol = max(2e-3, 2.0**-8 * float(on_cpu.double().square().mean().sqrt()))
        torch.testing.assert_close(out.cpu(), on_cpu, rtol=2.0**-7, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", PROFILES + ARCS + ROTATED)
def test_kernels_code_as_plain_torch(text: str, shape: BlockShape) -> None:
    check(text, shape, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("text", PROFILES[:4] + ARCS + ROTATED)
def test_kernels_code_other_dtypes_as_plain_torch(text: str, dtype: torch.dtype) -> None:
    check(text, BlockShape(128, 2, 128, 64, "half", 128), dtype)


@pytest.mark.parametrize(("radius_bits", "angle_bits"), BITS, ids=lambda bits: f"b{bits}")
def test_kernels_code_pairs_of_all_bits(radius_bits: int, angle_bits: int) -> None:
    angle_range = ("arc", "minmax")[radius_bits % 2]
    dim = (64, 96, 128)[angle_bits % 3]
    text = f"k=pair:r{radius_bits}t{angle_bits}:{angle_range},v=exact"
    check(text, BlockShape(128, 2, dim, 64, "half", dim), torch.float16)


@pytest.mark.parametrize(
    "bits", ["b3", "b4", "b5", "b6", "b7", "b8", "r3t5", "r2t4", "r1t2", "r4t1"]
)
def test_kernels_code_polar_rows_of_all_bits(bits: str) -> None:
    dim = (64, 96, 128)[int(bits[-1]) % 3]
    text = f"k=polar:{bits},v=polar:{bits}"
    check(text, BlockShape(128, 2, dim, dim, "half", dim), torch.float16)


@pytest.mark.parametrize("tokens", [16, 32, 48, 64, 80, 256])
@pytest.mark.parametrize("text", ROTATED)
def test_kernels_code_blocks_of_any_length(text: str, tokens: int) -> None:
    check(text, BlockShape(tokens, 2, 128, 128, "half", 128), torch.float16)


@pytest.mark.parametrize("text", ["k=pair,v=int4", *ARCS, *ROTATED])
def test_strided_and_paged_tensors_give_the_same_bytes(text: str) -> None:
    shape = BlockShape(128, 4, 128, 128, "half", 128)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    keys, values = (x.cuda() for x in tensors(shape, torch.float16, 3))
    expected = encoded(codec, keys, values, 0)
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    assert torch.equal(encoded(codec, *head_major, 0xA5), expected)
    slots = torch.randperm(4 * 128, device="cuda")[: 3 * 128].view(3, 128)
    paged = [torch.full((512, 4, 128), math.nan, dtype=torch.float16, device="cuda") for _ in "kv"]
    for rows, x in zip(paged, (keys, values), strict=True):
        rows[slots] = x
    out = torch.full_like(expected, 0xA5)
    codec.encode(*paged, out, slots=slots)
    assert torch.equal(out, expected)
    decoded = [torch.full_like(rows, math.nan) for rows in paged]
    codec.decode(out, *decoded, slots=slots)
    plain = [torch.empty_like(keys), torch.empty_like(values)]
    codec.decode(out, *plain)
    for rows, x in zip(decoded, plain, strict=True):
        assert torch.equal(rows[slots], x)
        assert int(rows.isnan().sum()) == 128 * 4 * 128


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["k=pair,v=int4", "k=pair:minmax:g32,v=int2", *ARCS, *ROTATED])
def test_non_finite_numbers_are_refused_by_side_and_slice(text: str, number: float) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    for side in ("keys", "values"):
        for position in ((3, 0, 0, 0), (4, 127, 1, 63), (3, 77, 1, 30)):
            keys, values = (x.cuda() for x in tensors(shape, torch.float16))
            (keys if side == "keys" else values)[position] = number
            with pytest.raises(NonFiniteError, match=f"{side} of slice {position[0]}:"):
                encoded(codec, keys, values, 0)


def test_radius_beyond_fp16_is_refused() -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse("k=pair,v=int4"), shape, torch.float32)
    for side, number in (("keys", 65505.0), ("values", -7e4)):
        keys, values = torch.zeros((2, 1, 128, 2, 64), device="cuda").unbind(0)
        (keys if side == "keys" else values)[0, 5, 0, 1] = number
        with pytest.raises(NonFiniteError, match=side):
            encoded(codec, keys, values, 0)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.5, 8000.0, 6e-8])
def test_constant_blocks_decode_to_finite_numbers(number: float) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    keys = torch.full((1, 128, 2, 64), number, dtype=torch.float16, device="cuda")
    for text in PROFILES:
        codec = Codec(Profile.parse(text), shape, torch.float16)
        decoded = torch.full_like(keys, math.nan), torch.full_like(keys, math.nan)
        codec.decode(encoded(codec, keys, keys, 0xA5), *decoded)
        for out in decoded:
            torch.testing.assert_close(out, keys, rtol=3e-3, atol=6e-8)


@pytest.mark.parametrize("text", ROTATED)
def test_constant_blocks_of_rotated_codecs_decode_to_finite_numbers(text: str) -> None:
    shape = BlockShape(128, 2, 64, 64, "half", 64)
    codec = Codec(Profile.parse(text), shape, torch.float16)
    for number in (0.0, -0.0, 1.5, 8000.0, -65504.0):
        keys = torch.full((1, 128, 2, 64), number, dtype=torch.float16, device="cuda")
        decoded = torch.full_like(keys, math.nan), torch.full_like(keys, math.nan)
        try:
            codec.decode(encoded(codec, keys, keys, 0xA5), *decoded)
        except NonFiniteError:
            # Norms of blocks of the largest numbers do not fit fp16.
            assert abs(number) == 65504.0
            continue
        for out in decoded:
            error = (out.double() - number).square().mean().sqrt()
            assert float(error) <= 0.5 * abs(number)


def test_zero_radius_tokens_do_not_widen_the_arc() -> None:
    shape = BlockShape(128, 1, 64, 64, "half", 64)
    codec = Codec(Profile.parse("k=pair,v=exact"), shape, torch.float16)
    keys, values = tensors(shape, torch.float16)
    keys[:, ::5] = 0.0
    got, expected = encoded(codec, keys.cuda(), values.cuda(), 0), encoded(codec, keys, values, 0)
    fields = {field.name: field for field in codec.layout.fields}
    parameters = fields["key_parameters"]
    torch.testing.assert_close(
        unpack_field(parameters, got.cpu()), unpack_field(parameters, expected), rtol=2e-3, atol=0
    )
    codes = (
        unpack_field(fields["key_codes"], got.cpu()),
        unpack_field(fields["key_codes"], expected),
    )
    present = torch.ones(128, dtype=torch.bool)
    present[::5] = False
    assert float((codes[0] != codes[1])[:, present].float().mean()) < 1e-3


def test_unchecked_encode_runs_in_a_cuda_graph() -> None:
    shape = BlockShape(128, 2, 128, 128, "half", 128)
    codec = Codec(Profile.parse("k=pair,v=int4"), shape, torch.float16)
    keys, values = (x.cuda() for x in tensors(shape, torch.float16))
    expected = encoded(codec, keys, values, 0)
    out, refused = torch.zeros_like(expected), torch.zeros((2, 5), dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codec.encode_unchecked(keys, values, out, refused)
    graph.replay()
    check_refused(refused)
    assert torch.equal(out, expected)
    values[2, 0, 0, 0] = math.nan
    graph.replay()
    with pytest.raises(NonFiniteError, match="values of slice 2"):
        check_refused(refused)
