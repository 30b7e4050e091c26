"""Rows of a product in memory and on the tensor cores: device functions that keep them in place.

Of 16 rows, lane 4 g + c of a warp holds rows g and g + 8 of what it multiplies and of a product,
there at columns 16 j + 8 f + 2 c + e. A column of a product is a channel of any choice, that of the
matrix: with channel 32 q + 8 c + 4 (j % 2) + 2 f + e, q = j // 2, a lane's channels are runs of
eight, one access to memory each, and rows go from memory to the tensor cores and back in the
threads that they are in. Triton finds that out from the shape of the accesses: tiles of 32
channels, whose rows lie as `tile_rows` says.
"""

import triton
import triton.language as tl


@triton.jit
def column_channels(D: tl.constexpr):
    """Returns the channel of each column, int32 [D], D a multiple of 32; tables.column_channels."""
    column = tl.arange(0, D)
    run = column // 8 % 4 * 2 + column % 2
    return column // 32 * 32 + column // 2 % 4 * 8 + run


@triton.jit
def tile_rows(M: tl.constexpr, D: tl.constexpr):
    """Returns the row and the first channel of each row of tiles of M rows: int32 [M D / 32]."""
    index = tl.arange(0, M * D // 32)
    place = index % (M // 2)
    row = place // 8 * 16 + index // (M // 2) % 2 * 8 + place % 8
    return row, index // M * 32


@triton.jit
def to_columns(tiles, M: tl.constexpr, D: tl.constexpr):
    """Orders tiles [M D / 32, 32] as rows of columns [M, D]."""
    tiles = tl.reshape(tiles, [D // 32, 2, M // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(tiles, (2, 1, 3, 0, 5, 6, 4, 7)), [M, D])


@triton.jit
def to_tiles(rows, M: tl.constexpr, D: tl.constexpr):
    """The inverse."""
    rows = tl.reshape(rows, [M // 16, 2, 8, D // 32, 2, 2, 4, 2])
    return tl.reshape(tl.permute(rows, (3, 1, 0, 2, 6, 4, 5, 7)), [M * D // 32, 32])
