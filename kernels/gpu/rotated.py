"""Launches of the rotated codecs, one side at a time: constants, matrices, tables."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polarcache.kernels.gpu import polar_kernels, tree, tree_kernels
from polarcache.kernels.layout import TILE_TOKENS, BlockShape, Field, PackedLayout
from polarcache.kernels.options import Polar, Recursive
from polarcache.kernels.polar.codebook import centroids, rayleigh_points
from polarcache.kernels.polar.rotation import mixing, rotation
from polarcache.kernels.profile import Profile

# Rows of a program, and warps for so many numbers of them.
_MAX_ROWS = 128
_NUMBERS_PER_WARP = 2048
# Numbers of a head's tokens that a program can hold, for keys whose means are taken off.
_MAX_HEAD_NUMBERS = 32768
# Matrices, in two parts where entries are not whole, must fit shared memory beside the rows.
_KEY_DIMS = tuple(range(32, 129, 16))
_VALUE_DIMS = (*_KEY_DIMS, 256)
_TREE_DIMS = (32, 64, 128)
_MATRIX_SCALE = 256
_ENTRIES = tree.ENTRIES.value

_Floats = npt.NDArray[np.float64]
_Tables = Callable[[torch.device], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel and what it is always launched with.

    Attributes:
        kernel: the Triton kernel.
        constants: its constexpr arguments.
        tables: returns its tensors of matrices and tables on a device.
        num_warps: warps of a program.
        programs: programs on each multiprocessor.
    """

    kernel: Any
    constants: Mapping[str, Any]
    tables: _Tables
    num_warps: int
    programs: int = 2

    def __call__(self, num_slices: int, device: torch.device, *arguments: object) -> None:
        """Launches as many programs as the device runs at a time, at most one an item.

        Args:
            num_slices: slices to code.
            device: where the tensors are.
            arguments: tensors before the tables; strides after them.
        """
        if num_slices == 0:
            return
        processors = 1
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = min(num_slices * self.constants["ITEMS"], processors * self.programs)
        tensors = [item for item in arguments if not isinstance(item, int)]
        strides = [item for item in arguments if isinstance(item, int)]
        self.kernel[(programs,)](
            *tensors, *self.tables(device), num_slices, *strides,
            **self.constants, num_warps=self.num_warps,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RotatedPlan:
    """The kernels of one side in a rotated codec.

    Attributes:
        side: `key` or `value`.
        by_query: whether the encoder takes energies of queries.
        encoder: launch of the encoder.
        decoder: launch of the decoder.
    """

    side: str
    by_query: bool
    encoder: Launch
    decoder: Launch

    @classmethod
    def of(cls, profile: Profile, shape: BlockShape, layout: PackedLayout, side: str) -> Self | None:
        """Returns the plan of a side, or None where it has no kernel.

        Args:
            profile: how keys and values are coded.
            shape: shape of one layer of one block.
            layout: where the bytes of a packed slice lie.
            side: `key` or `value`.
        """
        codec = profile.key if side == "key" else profile.value
        fields = {
            field.name.removeprefix(f"{side}_"): field
            for field in layout.fields
            if field.name.startswith(f"{side}_")
        }
        if isinstance(codec, Polar):
            launches = _polar_launches(codec, shape, fields, side)
        elif isinstance(codec, Recursive) and codec.codebook == "analytic":
            launches = _tree_launches(codec, shape, fields, side)
        else:
            return None
        if launches is None:
            return None
        return cls(side, side == "key" and isinstance(codec, Polar), *launches)

    def encode(
        self, x: Tensor, slots: Tensor | None, query: Tensor | None, out: Tensor, flags: Tensor
    ) -> None:
        """Launches the encoder, without waiting for it.

        Args:
            x: [N, T, H, D], or [rows, H, D] with slots; last dim contiguous.
            slots: int64 [N, T] contiguous, the row of every token, or None.
            query: fp32 [N, H, P] contiguous, energies of queries, or None.
            out: uint8 [N, slice_bytes], rows at multiples of 16 bytes.
            flags: int32 [N]; set to 1 where a slice is refused.
        """
        queries = (query,) if self.by_query else ()
        strides = (*row_strides(x), out.stride(0))
        self.encoder(out.shape[0], out.device, x, slots, *queries, out, flags, *strides)

    def decode(self, packed: Tensor, slots: Tensor | None, out: Tensor) -> None:
        """Launches the decoder, without waiting for it; arguments as `encode`."""
        strides = (packed.stride(0), *row_strides(out))
        self.decoder(packed.shape[0], packed.device, packed, out, slots, *strides)


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Returns strides of slices, tokens and heads; rows named by slots have none of slices."""
    strides = tensor.stride()
    return strides[0] if tensor.dim() == 4 else 0, strides[-3], strides[-2]


def _items(shape: BlockShape, head_dim: int, *, whole_heads: bool) -> tuple[int, int] | None:
    """Returns items of a slice and rows of an item, None where a program cannot hold them."""
    if whole_heads:
        tokens = shape.tokens
        if tokens & (tokens - 1) or tokens < TILE_TOKENS or tokens * head_dim > _MAX_HEAD_NUMBERS:
            return None
        return shape.kv_heads, tokens
    total = shape.kv_heads * shape.tokens
    rows = min(total & -total, _MAX_ROWS * 128 // max(128, head_dim))
    return None if rows < TILE_TOKENS else (total // rows, rows)


def _warps(rows: int, head_dim: int) -> int:
    """Returns warps of a program, a power of two."""
    warps = 1
    while warps < 16 and warps * _NUMBERS_PER_WARP < rows * head_dim:
        warps *= 2
    return warps


def _polar_launches(
    codec: Polar, shape: BlockShape, fields: Mapping[str, Field], side: str
) -> tuple[Launch, Launch] | None:
    head_dim = shape.head_dim if side == "key" else shape.v_head_dim
    order = fields["codes"].order
    items = _items(shape, head_dim, whole_heads=side == "key")
    dims = _KEY_DIMS if side == "key" else _VALUE_DIMS
    if order.streams == 1 or items is None or head_dim not in dims:
        return None
    points = rayleigh_points(codec.radius_bits)
    whole = head_dim & (head_dim - 1) == 0
    common = {
        "T": shape.tokens,
        "D": head_dim,
        "ITEMS": items[0],
        "TILES": order.stream_codes // (head_dim // 16),
        "PARTS": 1 if whole else 2,
        "SCALE": head_dim**-0.5 if whole else 1 / _MATRIX_SCALE,
    }
    pairing = {"ROTARY": shape.rotary_dim, "INTERLEAVED": shape.pairing == "interleaved"}
    codes = {
        "R_BITS": codec.radius_bits,
        "T_BITS": codec.angle_bits,
        "BOUNDS": tuple(((low + high) / 2) ** 2 for low, high in pairwise(points)),
    }
    names = ("codes", "gains")
    if side == "key":
        names = ("means", "scales", "balance", "codes", "gains")
    offsets = tuple(fields[name].offset for name in names)
    warps = _warps(items[1], head_dim)
    decoder = Launch(
        polar_kernels.decode_rows,
        {**common, **pairing, "KEY": side == "key", "ROWS": items[1], "FIELDS": offsets,
         "BITS": codec.bits},
        partial(_polar_decoder_tables, codec, head_dim, side),
        warps,
    )  # fmt: skip
    if side == "key":
        encoder = Launch(
            polar_kernels.encode_keys,
            {**common, **pairing, **codes, "FIELDS": offsets},
            partial(_key_mixing, codec, shape),
            warps,
        )
    else:
        encoder = Launch(
            polar_kernels.encode_values,
            {**common, **codes, "ROWS": items[1], "CODES": offsets[0], "GAINS": offsets[1],
             "STAGES": 2},
            partial(_value_mixing, codec, head_dim),
            warps,
        )  # fmt: skip
    return encoder, decoder


def _tree_launches(
    codec: Recursive, shape: BlockShape, fields: Mapping[str, Field], side: str
) -> tuple[Launch, Launch] | None:
    head_dim = shape.head_dim if side == "key" else shape.v_head_dim
    centred = side == "key" and codec.form == "deep"
    items = _items(shape, head_dim, whole_heads=centred)
    if items is None or head_dim not in _TREE_DIMS:
        return None
    bits = codec.level_bits(head_dim)
    blocks = head_dim // 16
    in_lanes = shape.tokens % TILE_TOKENS == 0 and blocks % (4 if side == "key" else 8) == 0
    names = [f"level{level}" for level in range(1, 1 + len(bits))] + ["radii"]
    names += ["means", "scales"] if centred else []
    common = {
        "T": shape.tokens,
        "D": head_dim,
        "ITEMS": items[0],
        "ROWS": items[1],
        "BITS": bits,
        "FORM": codec.form,
        "CENTRED": centred,
        "ORDER": side if in_lanes else "rows",
        "FIELDS": tuple(fields[name].offset for name in names),
        "SCALE": 1 / _MATRIX_SCALE,
    }
    cosines = _cosines(codec, head_dim).flatten().tolist()
    tangents = [0.0] * len(cosines)
    for level, width in enumerate(bits[1:], start=2):
        for index, (low, high) in enumerate(pairwise(centroids(level, width))):
            tangents[_ENTRIES * (level - 1) + index] = math.tan((low + high) / 2) ** 2
    by_lane = common["ORDER"] == "key"
    warps = _warps(items[1], head_dim)
    encoder = Launch(
        tree_kernels.encode_trees,
        {**common, "COSINES": tuple(cosines), "TANGENTS": tuple(tangents), "STAGES": 1},
        partial(_tree_tables, codec, head_dim, by_lane, True),
        warps,
    )
    decoder = Launch(
        tree_kernels.decode_trees,
        {**common, "COSINES": tuple(cosines)},
        partial(_tree_tables, codec, head_dim, by_lane, False),
        warps,
    )
    return encoder, decoder


def _parts(matrix: _Floats, device: torch.device) -> Tensor:
    """Returns fp16 [2, ...]: what is nearest to MATRIX_SCALE times fp64 numbers, and the rest."""
    scaled = matrix * _MATRIX_SCALE
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


def _points(codec: Polar, device: torch.device) -> Tensor:
    """Returns the radii of codes, fp32 [2**radius_bits], in units of the RMS channel."""
    return torch.tensor(rayleigh_points(codec.radius_bits), dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _value_mixing(codec: Polar, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Returns what mixes values, fp16 [PARTS, K, K] padded with zeros, and radii of codes."""
    pairs = _pair_columns(head_dim, "value")
    columns = np.concatenate((pairs, pairs + head_dim // 2))
    parts = _mixing_parts(head_dim)
    padded = np.zeros((len(parts), len(columns), len(columns)))
    padded[:, :head_dim] = parts[:, columns].swapaxes(1, 2)
    return torch.from_numpy(padded).to(device, torch.float16), _points(codec, device)


@lru_cache(maxsize=16)
def _key_mixing(
    codec: Polar, shape: BlockShape, device: torch.device
) -> tuple[Tensor, ...]:
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
    return torch.from_numpy(padded).to(device, torch.float16), _points(codec, device)


@lru_cache(maxsize=16)
def _polar_decoder_tables(
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
    return torch.from_numpy(padded).to(device, torch.float16), _channels_of_codes(codec).to(device)


def _channels_of_codes(codec: Polar) -> Tensor:
    """Returns both channels of every code, int32 [2, 256]: halves nearest to them, and the rest."""
    code = np.arange(1 << codec.bits)
    phases = (code % (1 << codec.angle_bits) + 0.5) * (2 * np.pi / (1 << codec.angle_bits))
    radii = np.array(rayleigh_points(codec.radius_bits))[code >> codec.angle_bits]
    pairs = np.stack((radii * np.cos(phases), radii * np.sin(phases)), -1)
    high = pairs.astype(np.float16)
    halves = np.zeros((2, 256, 2), np.float16)
    halves[:, : len(code)] = np.stack((high, (pairs - high).astype(np.float16)))
    return torch.from_numpy(halves.view(np.int32)[..., 0].copy())


@lru_cache(maxsize=64)
def _tree_tables(
    codec: Recursive, head_dim: int, by_lane: bool, encode: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """Returns parts of the rotation, fp16 [2, D, D], and cosines of all levels, fp32 [levels, 16].

    The encoder's columns and the decoder's rows are channels in the order of the kernel.
    """
    matrix = rotation(head_dim, codec.seed, torch.device("cpu")).numpy().astype(np.float64)
    blocks = head_dim // 16
    column = np.arange(head_dim)
    if by_lane:
        place = column % blocks
        column = column - place + place // (blocks // 4) + place % (blocks // 4) * 4
    matrix = matrix[column].T if encode else matrix[column]
    return _parts(np.ascontiguousarray(matrix), device), _cosines(codec, head_dim).to(device)


def _cosines(codec: Recursive, head_dim: int) -> Tensor:
    """Returns cosines of the angles of all levels, fp32 [levels, ENTRIES]."""
    bits = codec.level_bits(head_dim)
    cosines = torch.zeros((len(bits), _ENTRIES), dtype=torch.float32)
    for level, width in enumerate(bits, start=1):
        cosines[level - 1, : 1 << width] = torch.tensor(centroids(level, width)).cos()
    return cosines
