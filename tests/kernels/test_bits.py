import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarcache.kernels.bits import pack_bits, unpack_bits
from polarcache.kernels.errors import ShapeError


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
