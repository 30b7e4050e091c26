"""Bit packing: codes of b bits as a dense little-endian stream, on any device.

Eight codes fill eight bytes of a word. Three rounds close the gaps between neighbours (b, then 2b,
then 4b bits wide), which leaves the 8b code bits at the word's low end: its first b bytes.
"""

import torch
from torch import Tensor

from polarcache.kernels.errors import ShapeError

_WORD_CODES = 8


def pack_bits(codes: Tensor, bits: int, out: Tensor) -> None:
    """Packs codes into a dense bit stream.

    Args:
        codes: uint8 [N, M] contiguous, M a multiple of 8, every code below 2**bits (not checked).
        bits: 1 to 8.
        out: uint8 [N, M * bits / 8], last dim contiguous; every byte is written once.

    Raises:
        ShapeError: a shape or dtype differs from the above.
    """
    _check(codes, bits, out)
    if bits == 8:
        out.copy_(codes)
        return
    words = codes.view(torch.int64)
    for lane in (8, 16, 32):
        width = bits * lane // 8
        low, high = _lane_masks(lane, width)
        words = (words & low) | ((words >> (lane - width)) & high)
    packed = words.unsqueeze(-1).view(torch.uint8)[..., :bits]
    torch.unflatten(out, 1, (-1, bits)).copy_(packed)


def unpack_bits(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Unpacks a dense bit stream.

    Args:
        packed: uint8 [N, num_codes * bits / 8], last dim contiguous.
        bits: 1 to 8.
        num_codes: codes of a row, a multiple of 8.

    Returns:
        uint8 [N, num_codes]; a view of `packed` for 8 bits, else newly allocated.

    Raises:
        ShapeError: a shape or dtype differs from the above.
    """
    rows = packed.shape[0]
    if bits == 8:
        _check(packed, bits, packed)
        return packed
    buffer = packed.new_zeros((rows, num_codes // _WORD_CODES, _WORD_CODES))
    _check(buffer.flatten(1), bits, packed)
    buffer[..., :bits].copy_(torch.unflatten(packed, 1, (-1, bits)))
    words = buffer.flatten(1).view(torch.int64)
    for lane in (32, 16, 8):
        width = bits * lane // 8
        low, high = _lane_masks(lane, width)
        words = (words & low) | ((words & high) << (lane - width))
    return words.view(torch.uint8)


def _lane_masks(lane: int, width: int) -> tuple[int, int]:
    """Returns masks of the first and the second `width` bits of every two lanes of a word."""
    first = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * lane))
    return first, first << width


def _check(codes: Tensor, bits: int, packed: Tensor) -> None:
    if not 1 <= bits <= 8:
        raise ShapeError(f"bits {bits}: expected 1 to 8")
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % _WORD_CODES:
        raise ShapeError(
            f"codes {codes.dtype} {tuple(codes.shape)}: expected uint8 [N, M], M a multiple of 8"
        )
    expected = (codes.shape[0], codes.shape[1] * bits // 8)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise ShapeError(f"packed {packed.dtype} {tuple(packed.shape)}: expected uint8 {expected}")
