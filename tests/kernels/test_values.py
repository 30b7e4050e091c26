import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polarcache.kernels import values

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@given(
    st.sampled_from([(4, 64), (4, 128), (4, 16), (2, 32), (2, 16), (2, 128)]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
    st.floats(1e-3, 1e3),
)
def test_encode_is_the_rounded_affine_map(
    bits_and_group: tuple[int, int], dtype: torch.dtype, seed: int, spread: float
) -> None:
    bits, group = bits_and_group
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn((1, 8, 2, 128), generator=generator) * spread).to(dtype)
    codes, scales, zeros = values.encode(x, bits, group)
    exact = x.float().numpy().reshape(1, 8, 2, -1, group)
    low, high = exact.min(-1), exact.max(-1)
    top = np.float32(2**bits - 1)
    np.testing.assert_array_equal(zeros.numpy(), low.astype(np.float16))
    np.testing.assert_array_equal(scales.numpy(), ((high - low) / top).astype(np.float16))
    zero, scale = (side.float().numpy()[..., None] for side in (zeros, scales))
    steps = np.divide(exact - zero, scale, out=np.zeros_like(exact), where=scale > 0)
    expected = np.clip(np.rint(steps), 0, top)
    np.testing.assert_array_equal(codes.numpy().reshape(exact.shape), expected)
    decoded = torch.full((1, 8, 2, 128), math.nan)
    values.decode(codes, scales, zeros, decoded)
    np.testing.assert_array_equal(decoded.numpy().reshape(exact.shape), expected * scale + zero)


@pytest.mark.parametrize("number", [0.0, 5.0, -65504.0, 65504.0, 1e-7])
def test_constant_values_survive(number: float) -> None:
    x = torch.full((1, 8, 1, 32), number, dtype=torch.float16)
    decoded = torch.full_like(x, math.nan)
    values.decode(*values.encode(x, 4, 32), decoded)
    assert torch.equal(decoded, x)


def test_the_widest_fp16_range_stays_finite() -> None:
    x = torch.full((1, 8, 1, 32), -65504.0, dtype=torch.float16)
    x[..., ::2] = 65504.0
    for bits in (2, 4):
        decoded = torch.full_like(x, math.nan)
        values.decode(*values.encode(x, bits, 32), decoded)
        torch.testing.assert_close(decoded, x, rtol=2e-3, atol=0)
