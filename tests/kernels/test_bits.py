import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarcache.kernels.bits import pack_bits, pack_field, unpack_bits, unpack_field
from polarcache.kernels.errors import ShapeError
from polarcache.kernels.layout import BlockShape, PackedLayout
from polarcache.kernels.profile import Profile


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pack_bits_is_a_little_endian_stream_and_unpacks_to_the_codes(
    bits: int, rows: int, words: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, 8 * words), dtype=np.uint8)
    wide = torch.full((rows, words * bits + 3), 0xA5, dtype=torch.uint8)
    pack_bits(torch.from_numpy(codes), bits, wide[:, 1:-2])
    for row, packed in zip(codes, wide[:, 1:-2].numpy(), strict=True):
        stream = sum(int(code) << (bits * index) for index, code in enumerate(row))
        assert packed.tobytes() == stream.to_bytes(words * bits, "little")
    assert bool((wide[:, :1] == 0xA5).all())
    assert bool((wide[:, -2:] == 0xA5).all())
    assert torch.equal(unpack_bits(wide[:, 1:-2], bits, 8 * words), torch.from_numpy(codes))


def test_bits_of_another_shape_or_dtype_are_refused() -> None:
    codes = torch.zeros((2, 16), dtype=torch.uint8)
    for bits, width in ((0, 16), (9, 18), (4, 7)):
        with pytest.raises(ShapeError, match="expected"):
            pack_bits(codes, bits, torch.zeros((2, width), dtype=torch.uint8))
    with pytest.raises(ShapeError, match="expected"):
        pack_bits(codes.int(), 4, torch.zeros((2, 8), dtype=torch.uint8))
    with pytest.raises(ShapeError, match="expected"):
        unpack_bits(torch.zeros((2, 7), dtype=torch.uint8), 4, 16)


@pytest.mark.parametrize("shape", [(128, 2, 128), (64, 3, 64), (32, 1, 256), (8, 2, 128)])
@pytest.mark.parametrize(
    "profile",
    [
        "k=pair:r4t4:g32,v=int4",
        "k=pair:r3t3:g32,v=int2",
        "k=pair:r2t2:g32,v=int4",
        "k=pair:tiers6,v=int2",
        "k=pair:tiers8,v=int4",
        "k=recursive,v=recursive",
        "k=recursive:deep,v=recursive:kmeans",
        "k=polar:r3t5,v=polar:r2t4",
    ],
)
def test_fields_unpack_to_the_numbers_that_were_packed(
    profile: str, shape: tuple[int, int, int]
) -> None:
    tokens, heads, head_dim = shape
    try:
        layout = PackedLayout.of(
            Profile.parse(profile), BlockShape(tokens, heads, head_dim, head_dim, "half", 0), 2
        )
    except ShapeError:
        pytest.skip("the profile does not fit the shape")
    generator = torch.Generator().manual_seed(0)
    # At odd addresses and with gaps between the rows.
    packed = torch.full((3, layout.slice_bytes + 3), 0xA5, dtype=torch.uint8)[:, 1:-2]
    for field in layout.fields:
        numbers = torch.randint(0, 1 << min(8, field.bits), (3, *field.shape), generator=generator)
        numbers = numbers.to(torch.uint8 if field.dtype == "code" else torch.float16)
        pack_field(field, numbers, packed)
        unpacked = unpack_field(field, packed)
        assert unpacked.dtype == numbers.dtype
        assert torch.equal(unpacked, numbers), field.name


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_bits_on_a_gpu_equals_the_cpu(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 4096), dtype=torch.uint8)
    packed = torch.empty((3, 512 * bits), dtype=torch.uint8)
    on_gpu = torch.empty_like(packed, device="cuda")
    pack_bits(codes, bits, packed)
    pack_bits(codes.cuda(), bits, on_gpu)
    assert torch.equal(on_gpu.cpu(), packed)
    assert torch.equal(unpack_bits(on_gpu, bits, 4096).cpu(), codes)
