"""Launches of sides that are coded one at a time: rotated codecs and tiered pairs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from polarcache.kernels.gpu import polar_kernels, tier_kernels, tree_decode, tree_encode
from polarcache.kernels.gpu.tables import (
    MATRIX_SCALE,
    key_mixing,
    level_cosines,
    polar_decoder_tables,
    ring_bits,
    tree_decoder_tables,
    tree_encoder_tables,
    value_mixing,
)
from polarcache.kernels.layout import TILE_TOKENS, BlockShape, Field, PackedLayout
from polarcache.kernels.options import ArcPair, Polar, Recursive
from polarcache.kernels.polar.codebook import centroids
from polarcache.kernels.polar.rings import rings
from polarcache.kernels.profile import Profile

# A square of radii above that of any row.
_BEYOND = 1e30
_MAX_ROWS = 256
_MAX_WARPS = 16
# Numbers of a head's tokens that a program can hold, for keys whose means are taken off.
_MAX_POLAR_NUMBERS = 32768
_MAX_TREE_NUMBERS = 16384
_MAX_TIER_NUMBERS = 32768
# Matrices, in two parts where entries are not whole, must fit shared memory beside the rows.
_POLAR_DIMS = tuple(range(32, 129, 16))
_TREE_DIMS = (32, 64, 128)
# Classes of a power of two of pairs, whose streams fill words.
_TIER_DIMS = (64, 128)

_Tables = Callable[[torch.device], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of one kernel that change its speed alone.

    Attributes:
        rows: rows of an item.
        programs: programs on each multiprocessor.
        stages: items whose loads are under way, the one at work included.
        registers: at most so many a thread; 0 for no limit.
        numbers_per_warp: numbers of an item's rows that a warp codes.
    """

    rows: int
    programs: int
    stages: int = 1
    registers: int = 128
    numbers_per_warp: int = 2048


# Best of 64 and 128 rows, 2048 and 4096 numbers a warp, 1 to 4 programs, 1 and 2 stages (values of
# `polar` 3), 128 registers or no limit (H200, 2026-11-24, D 128, benchmarks/codec_sweep.py); with
# 128 registers two programs of 8 warps share a multiprocessor. By side where that pays.
_POLAR_ENCODER = {
    "key": Tuning(rows=128, programs=2),
    "value": Tuning(rows=64, programs=2, stages=3, registers=0),
}
_POLAR_DECODER = {
    "key": Tuning(rows=64, programs=3, registers=0),
    "value": Tuning(rows=64, programs=4, registers=0),
}
_TREE_ENCODER = {
    "key": Tuning(rows=128, programs=2, registers=0),
    "value": Tuning(rows=128, programs=2),
}
_DEEP_ENCODER = Tuning(rows=64, programs=2, stages=2, registers=0)
_TREE_DECODER = Tuning(rows=64, programs=4)
_TIER = Tuning(rows=128, programs=2, registers=0, numbers_per_warp=4096)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel and what it is always launched with.

    Attributes:
        kernel: the Triton kernel.
        constants: its constexpr arguments.
        tables: returns its tensors of matrices and tables on a device.
        num_warps: warps of a program.
        programs: programs on each multiprocessor.
        registers: at most so many a thread; 0 for no limit.
    """

    kernel: Any
    constants: Mapping[str, Any]
    tables: _Tables
    num_warps: int
    programs: int
    registers: int = 0

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
        options = {"maxnreg": self.registers} if self.registers else {}
        self.kernel[(programs,)](
            *tensors, *self.tables(device), num_slices, *strides,
            **self.constants, num_warps=self.num_warps, **options,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SidePlan:
    """The kernels of one side.

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
    def of(
        cls, profile: Profile, shape: BlockShape, layout: PackedLayout, side: str
    ) -> Self | None:
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
        elif isinstance(codec, ArcPair) and codec.tiers:
            launches = _tier_launches(codec, shape, fields)
        else:
            return None
        encoder, decoder = launches
        if encoder is None or decoder is None:
            return None
        by_query = side == "key" and isinstance(codec, Polar | ArcPair)
        return cls(side, by_query, encoder, decoder)

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


def _whole_heads(shape: BlockShape, most_numbers: int) -> bool:
    """Returns whether a program can hold all tokens of a key head."""
    tokens = shape.tokens
    powers = tokens & (tokens - 1) == 0
    return powers and tokens >= TILE_TOKENS and tokens * shape.head_dim <= most_numbers


def _launch(
    kernel: object,
    constants: Mapping[str, Any],
    tables: _Tables,
    shape: BlockShape,
    tuning: Tuning,
    least_rows: int,
    most_rows: int,
) -> Launch | None:
    """Returns a launch, or None where rows of all heads do not fill items of `least_rows`.

    Args:
        kernel: the Triton kernel.
        constants: all but ITEMS, ROWS and STAGES; D is the head's channels.
        tables: returns its tables on a device.
        shape: shape of one layer of one block.
        tuning: rows and what else changes speed alone.
        least_rows: a power of two.
        most_rows: likewise; the tokens of a head where an item may hold no more.
    """
    total = shape.kv_heads * shape.tokens
    rows = min(max(least_rows, tuning.rows), most_rows, total & -total)
    if rows < least_rows:
        return None
    warps = 1
    while warps < _MAX_WARPS and warps * tuning.numbers_per_warp < rows * constants["D"]:
        warps *= 2
    items = {"ITEMS": total // rows, "ROWS": rows, "STAGES": tuning.stages}
    return Launch(kernel, {**constants, **items}, tables, warps, tuning.programs, tuning.registers)


def _polar_launches(
    codec: Polar, shape: BlockShape, fields: Mapping[str, Field], side: str
) -> tuple[Launch | None, Launch | None]:
    is_key = side == "key"
    head_dim = shape.head_dim if is_key else shape.v_head_dim
    order = fields["codes"].order
    if order.streams == 1 or head_dim not in _POLAR_DIMS:
        return None, None
    if is_key and not _whole_heads(shape, _MAX_POLAR_NUMBERS):
        return None, None
    book = rings(codec)
    width = ring_bits(book)
    bounds = [bound**2 for bound in book.bounds]
    bounds += [_BEYOND] * ((1 << width) - 1 - len(bounds))
    whole = head_dim & (head_dim - 1) == 0
    tiles = order.stream_codes // (head_dim // 16)
    names = ("means", "scales", "balance", "codes", "gains") if is_key else ("codes", "gains")
    common = {
        "T": shape.tokens,
        "D": head_dim,
        "TILES": tiles,
        "FIELDS": tuple(fields[name].offset for name in names),
        "PARTS": 1 if whole else 2,
        "SCALE": head_dim**-0.5 if whole else 1 / MATRIX_SCALE,
    }
    pairing = {"ROTARY": shape.rotary_dim, "INTERLEAVED": shape.pairing == "interleaved"}
    codes = {
        "BITS": codec.bits,
        "RING_BITS": width,
        "BOUNDS": tuple(bounds),
        "FEWEST": min(n for n, radius in zip(book.counts, book.radii, strict=True) if radius > 0),
    }
    least = TILE_TOKENS * tiles
    most = shape.tokens if is_key else _MAX_ROWS
    if is_key:
        encoder = _launch(
            polar_kernels.encode_keys, {**common, **pairing, **codes},
            partial(key_mixing, codec, shape), shape, _POLAR_ENCODER[side], shape.tokens, most,
        )  # fmt: skip
    else:
        encoder = _launch(
            polar_kernels.encode_values, {**common, **codes},
            partial(value_mixing, codec, head_dim), shape, _POLAR_ENCODER[side], least, most,
        )  # fmt: skip
    decoder = _launch(
        polar_kernels.decode_rows, {**common, **pairing, "KEY": is_key, "BITS": codec.bits},
        partial(polar_decoder_tables, codec, head_dim, side), shape,
        _POLAR_DECODER[side], least, most,
    )  # fmt: skip
    return encoder, decoder


def _tier_launches(
    codec: ArcPair, shape: BlockShape, fields: Mapping[str, Field]
) -> tuple[Launch | None, Launch | None]:
    if shape.head_dim not in _TIER_DIMS or not _whole_heads(shape, _MAX_TIER_NUMBERS):
        return None, None
    classes, rank = [], 0
    names = ["order", "arcs", "radii"]
    for index, (count, radius_bits, angle_bits) in enumerate(codec.classes(shape.pairs)):
        classes.append((count, radius_bits, angle_bits, rank))
        names += [f"radius{index}", f"angle{index}"]
        rank += count
    constants = {
        "T": shape.tokens,
        "D": shape.head_dim,
        "ROTARY": shape.rotary_dim,
        "INTERLEAVED": shape.pairing == "interleaved",
        "GROUP": codec.group_tokens,
        "CLASSES": tuple(classes),
        "FIELDS": tuple(fields[name].offset for name in names),
    }
    encoder, decoder = (
        _launch(kernel, constants, _no_tables, shape, _TIER, shape.tokens, shape.tokens)
        for kernel in (tier_kernels.encode_tiers, tier_kernels.decode_tiers)
    )
    return encoder, decoder


def _no_tables(device: torch.device) -> tuple[Tensor, ...]:
    del device
    return ()


def _tree_launches(
    codec: Recursive, shape: BlockShape, fields: Mapping[str, Field], side: str
) -> tuple[Launch | None, Launch | None]:
    head_dim = shape.head_dim if side == "key" else shape.v_head_dim
    deep = codec.form == "deep"
    centred = deep and side == "key"
    if head_dim not in _TREE_DIMS or (centred and not _whole_heads(shape, _MAX_TREE_NUMBERS)):
        return None, None
    bits = codec.level_bits(head_dim)
    in_lanes = shape.tokens % TILE_TOKENS == 0 and head_dim // 16 % (4 if side == "key" else 8) == 0
    names = [f"level{level}" for level in range(1, 1 + len(bits))] + ["radii"]
    names += ["means", "scales"] if centred else []
    order = side if in_lanes else "rows"
    cosines = level_cosines(codec, head_dim)
    common = {
        "T": shape.tokens,
        "D": head_dim,
        "BITS": bits,
        "FORM": codec.form,
        "CENTRED": centred,
        "ORDER": order,
        "FIELDS": tuple(fields[name].offset for name in names),
        "SCALE": 1 / MATRIX_SCALE,
    }
    tangents = [0.0] * cosines.numel()
    for level, width in enumerate(bits[1:], start=2):
        for index, (low, high) in enumerate(pairwise(centroids(level, width))):
            tangents[cosines.shape[1] * (level - 1) + index] = math.tan((low + high) / 2) ** 2
    most = shape.tokens if centred else _MAX_ROWS
    encoder = _launch(
        tree_encode.encode_trees,
        {**common, "COSINES": tuple(cosines.flatten().tolist()), "TANGENTS": tuple(tangents)},
        partial(tree_encoder_tables, codec, head_dim, order, centred), shape,
        _DEEP_ENCODER if deep else _TREE_ENCODER[side],
        shape.tokens if centred else TILE_TOKENS, most,
    )  # fmt: skip
    decoder = _launch(
        tree_decode.decode_trees, common,
        partial(tree_decoder_tables, codec, head_dim, order), shape,
        _TREE_DECODER, TILE_TOKENS, most,
    )  # fmt: skip
    return encoder, decoder
