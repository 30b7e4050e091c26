"""Matrices and tables of the rotated codecs as their kernels read them."""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polarcache.kernels.gpu.tree import ENTRIES
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.options import Polar, Recursive
from polarcache.kernels.polar.codebook import centroids
from polarcache.kernels.polar.rings import Rings, rings
from polarcache.kernels.polar.rotation import mixing, rotation

MATRIX_SCALE = 256
_ENTRIES = ENTRIES.value

_Floats = npt.NDArray[np.float64]


def _parts(matrix: _Floats, device: torch.device) -> Tensor:
    """Returns fp16 [2, ...]: what is nearest to MATRIX_SCALE times fp64 numbers, and the rest."""
    scaled = matrix * MATRIX_SCALE
    high = scaled.astype(np.float16)
    low = (scaled - high).astype(np.float16)
    return torch.from_numpy(np.stack((high, low))).to(device)


def _pair_columns(head_dim: int, side: str) -> npt.NDArray[np.int64]:
    """Returns the pair of each column of a product; columns past the last step repeat it."""
    columns = 1 << (head_dim // 2 - 1).bit_length()
    column = np.arange(columns)
    place = column % 8
    if side == "key":
        place = place // 2 + place % 2 * 4
    return np.minimum(column // 8, head_dim // 16 - 1) * 8 + place


def _mixing_parts(head_dim: int) -> _Floats:
    """Returns the mixing matrix, fp64 [PARTS, D, D], in numbers that fp16 holds."""
    matrix = mixing(head_dim, torch.device("cpu")).numpy().astype(np.float64)
    if head_dim & (head_dim - 1) == 0:
        return np.round(matrix * math.sqrt(head_dim))[np.newaxis]
    return _parts(matrix, torch.device("cpu")).numpy().astype(np.float64)


def _rings(codec: Polar, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns radii, fp32 [2**ring_bits], and first codes | points << 16 of rings, int32."""
    book = rings(codec)
    counts = [first | count << 16 for first, count in zip(book.firsts, book.counts, strict=True)]
    # What is past the last ring is never looked up.
    more = (1 << ring_bits(book)) - len(counts)
    radii = torch.tensor((*book.radii, *(0.0,) * more), dtype=torch.float32, device=device)
    return radii, torch.tensor((*counts, *(1 << 16,) * more), dtype=torch.int32, device=device)


def ring_bits(book: Rings) -> int:
    """Returns bits that number the rings, at least 1."""
    return max(1, (len(book.counts) - 1).bit_length())


@lru_cache(maxsize=16)
def value_mixing(codec: Polar, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Returns what mixes values, fp16 [PARTS, K, K] padded with zeros, and the rings."""
    pairs = _pair_columns(head_dim, "value")
    columns = np.concatenate((pairs, pairs + head_dim // 2))
    parts = _mixing_parts(head_dim)
    padded = np.zeros((len(parts), len(columns), len(columns)))
    padded[:, :head_dim] = parts[:, columns].swapaxes(1, 2)
    return torch.from_numpy(padded).to(device, torch.float16), *_rings(codec, device)


@lru_cache(maxsize=16)
def key_mixing(codec: Polar, shape: BlockShape, device: torch.device) -> tuple[Tensor, ...]:
    """Returns the same for the first and the second channels of keys: [2, PARTS, P, 2 P]."""
    head_dim = shape.head_dim
    pairs = _pair_columns(head_dim, "key")
    columns = np.concatenate((pairs, pairs + head_dim // 2))
    parts = _mixing_parts(head_dim)
    channels = np.arange(head_dim)
    padded = np.zeros((2, len(parts), len(pairs), len(columns)))
    for of_pairs, first, second in shape.pair_channels():
        for index, of_side in enumerate((first, second)):
            mixed = parts[:, columns][:, :, channels[of_side]].swapaxes(1, 2)
            padded[index, :, of_pairs] = mixed
    return torch.from_numpy(padded).to(device, torch.float16), *_rings(codec, device)


@lru_cache(maxsize=16)
def polar_decoder_tables(
    codec: Polar, head_dim: int, side: str, device: torch.device
) -> tuple[Tensor, ...]:
    """Returns what unmixes, fp16 [2, PARTS, P, K], and both channels of all codes."""
    pairs = _pair_columns(head_dim, side)
    parts = _mixing_parts(head_dim)
    size = 1 << (head_dim - 1).bit_length()
    padded = np.zeros((2, len(parts), len(pairs), size))
    real = head_dim // 2
    for index in range(2):
        padded[index, :, :real, :head_dim] = parts[:, pairs[:real] + index * real]
    return torch.from_numpy(padded).to(device, torch.float16), channels_of_codes(codec).to(device)


def channels_of_codes(codec: Polar) -> Tensor:
    """Returns both channels of every code, int32 [2, 256]: halves nearest to them, and the rest."""
    pairs = rings(codec).points()
    high = pairs.astype(np.float16)
    halves = np.zeros((2, 256, 2), np.float16)
    halves[:, : len(pairs)] = np.stack((high, (pairs - high).astype(np.float16)))
    return torch.from_numpy(halves.view(np.int32)[..., 0].copy())


def _tree_rotation(codec: Recursive, head_dim: int) -> _Floats:
    """Returns the rotation, fp64 [D, D]: row i of it makes channel i."""
    rotated = rotation(head_dim, codec.seed, torch.device("cpu"))
    return rotated.numpy().astype(np.float64)


def column_channels(head_dim: int) -> npt.NDArray[np.int64]:
    """Returns the channel of each column that fragments.py has, int64 [head_dim]."""
    column = np.arange(head_dim)
    run = column // 8 % 4 * 2 + column % 2
    return column // 32 * 32 + column // 2 % 4 * 8 + run


@lru_cache(maxsize=64)
def tree_encoder_tables(
    codec: Recursive, head_dim: int, order: str, centred: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """Returns parts of the rotation, fp16 [2, D, D], and cosines of all levels, fp32 [levels, 16].

    Rows are channels in the order of column_channels, of centred keys in order; columns are
    rotated channels in the order of the kernel.

    Args:
        codec: form and seed.
        head_dim: D.
        order: how trees lie, `key` for lanes of keys.
        centred: whether means are taken off.
        device: where the tensors lie.
    """
    blocks = head_dim // 16
    column = np.arange(head_dim)
    place = column % blocks
    column = column - place + _block_at(place, blocks, order)
    matrix = np.ascontiguousarray(_tree_rotation(codec, head_dim)[column].T)
    if not centred:
        matrix = matrix[column_channels(head_dim)]
    return _parts(matrix, device), level_cosines(codec, head_dim).to(device)


@lru_cache(maxsize=64)
def tree_decoder_tables(
    codec: Recursive, head_dim: int, order: str, device: torch.device
) -> tuple[Tensor, ...]:
    """Returns parts of the rotation and the rotation, fp16 [3, D, D], and angles of all levels.

    Rows are rotated channels in the order of the kernel, tree by tree, bits of their places
    reversed; columns are channels in that of column_channels. Angles are int32 [3, levels, 16]:
    cosine and sine as fp32, then both as fp16. Last come those of code % 4 and code // 4 of the
    first four levels, int64 [4, 16].
    """
    blocks = head_dim // 16
    row = np.arange(head_dim)
    if order != "rows":
        order = "key"  # values have trees of the same blocks in a lane
        lane, number = row // 2 % 4, row // 16 * 4 + row // 8 % 2 * 2 + row % 2
        row = lane * (head_dim // 4) + number
    place = row % 16
    channel = sum(((place >> bit) & 1) << (3 - bit) for bit in range(4))
    matrix = _tree_rotation(codec, head_dim)[channel * blocks + _block_at(row // 16, blocks, order)]
    matrix = matrix[:, column_channels(head_dim)]
    plain = torch.from_numpy(matrix.astype(np.float16))[None].to(device)
    cosines = level_cosines(codec, head_dim)
    sines = (1 - cosines.double().square()).sqrt().float()
    sines[0] = cosines[0].roll(4)
    halves = torch.stack((cosines, sines), -1).half().view(torch.int32)[..., 0]
    angles = torch.stack((cosines.view(torch.int32), sines.view(torch.int32), halves))
    code = torch.arange(_ENTRIES)
    pairs = torch.stack((halves[:4, code % 4], halves[:4, code // 4]), -1).view(torch.int64)
    pairs = pairs[..., 0].contiguous()
    return torch.cat((_parts(matrix, device), plain)), angles.to(device), pairs.to(device)


def _block_at(place: npt.NDArray[np.int64], blocks: int, order: str) -> npt.NDArray[np.int64]:
    """Returns the block of each place of a row: lanes c of keys own blocks c, c + 4, ..."""
    if order != "key":
        return place
    return place // (blocks // 4) + place % (blocks // 4) * 4


def level_cosines(codec: Recursive, head_dim: int) -> Tensor:
    """Returns cosines of the angles of all levels, fp32 [levels, ENTRIES]."""
    bits = codec.level_bits(head_dim)
    cosines = torch.zeros((len(bits), _ENTRIES), dtype=torch.float32)
    for level, width in enumerate(bits, start=1):
        cosines[level - 1, : 1 << width] = torch.tensor(centroids(level, width)).cos()
    return cosines
