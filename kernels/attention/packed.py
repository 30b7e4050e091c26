"""What the portable kernels must know of a packed slice: kinds, bits and offsets of its sides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polarcache.kernels.codec import Codec
from polarcache.kernels.gpu.tables import channels_of_codes
from polarcache.kernels.layout import LANES, TILE_TOKENS, Field
from polarcache.kernels.options import (
    ArcPair,
    Exact,
    Integer,
    KeyCodec,
    Pair,
    Polar,
    Recursive,
    ValueCodec,
)
from polarcache.kernels.polar.codebook import centroids
from polarcache.kernels.polar.pair import FP16_MAX
from polarcache.kernels.polar.rings import rings
from polarcache.kernels.polar.rotation import mixing, rotation

__all__ = ["key_constants", "mix_matrix", "side_rotation", "side_table", "value_constants"]


def key_constants(codec: Codec) -> tuple[str, tuple[Any, ...]]:
    """Returns the kind of keys and what its loader needs.

    Args:
        codec: the codec of the pages.

    Returns:
        (`exact`, (offset,)) or (`pair` or `arc2`, (radius bits, angle bits, tokens of a group,
        tiles of a unit or 0 in plain rows, offsets of codes and of each kind of parameters)).
        `polar` is like them, with 0 for tokens of a group; `tiers` as `load_tiers` takes it,
        `tree` as `load_trees` does.
    """
    key, fields = codec.profile.key, _fields(codec)
    if isinstance(key, Recursive):
        return "tree", _tree_constants(codec, key, "key", codec.shape.head_dim)
    names: tuple[str, ...]
    if isinstance(key, Exact):
        return "exact", (fields["key_elements"].offset,)
    if isinstance(key, ArcPair) and key.tiers:
        numbers = [key.group_tokens]
        numbers += [fields[name].offset for name in ("key_order", "key_arcs", "key_radii")]
        for index, (count, *bits) in enumerate(key.classes(codec.shape.pairs)):
            streams = [fields[f"key_{name}{index}"] for name in ("radius", "angle")]
            numbers += [count, *bits, *(stream.offset for stream in streams)]
        return "tiers", tuple(numbers)
    if isinstance(key, Pair):
        kind, names = "pair", ("key_codes", "key_parameters")
    elif isinstance(key, ArcPair):
        kind, names = "arc2", ("key_codes", "key_arcs", "key_radii")
    else:
        kind = "polar"
        names = ("key_codes", "key_gains", "key_means", "key_scales", "key_balance")
    tiles = _unit_tiles(fields["key_codes"], TILE_TOKENS * codec.shape.pairs)
    offsets = (fields[name].offset for name in names)
    group = 0 if isinstance(key, Polar) else key.group_tokens
    return kind, (key.radius_bits, key.angle_bits, group, tiles, *offsets)


def value_constants(codec: Codec) -> tuple[str, tuple[Any, ...]]:
    """Returns the kind of values and what its loader needs.

    Args:
        codec: the codec of the pages.

    Returns:
        (`exact`, (offset,)), (`integer`, (bits, channels of a group, tiles of a unit or 0 in
        plain rows, whether parameters lie by tiles, offsets of codes and parameters)) or
        (`polar`, (radius bits, angle bits, tiles of a unit or 0, offsets of codes and gains, the
        largest gain that no code decodes above the largest fp16 with)) or `tree` as `load_trees`
        takes it.
    """
    value, channels, fields = codec.profile.value, codec.shape.v_head_dim, _fields(codec)
    if isinstance(value, Exact):
        return "exact", (fields["value_elements"].offset,)
    if isinstance(value, Integer):
        codes, parameters = fields["value_codes"], fields["value_parameters"]
        tiles = _unit_tiles(codes, TILE_TOKENS * channels)
        tiled = codec.shape.tokens % TILE_TOKENS == 0
        group = value.channels_per_group(channels)
        return "integer", (value.bits, group, tiles, tiled, codes.offset, parameters.offset)
    if isinstance(value, Polar):
        codes, gains = fields["value_codes"], fields["value_gains"]
        tiles = _unit_tiles(codes, TILE_TOKENS * channels // 2)
        limit = FP16_MAX / rings(value).radii[-1]
        bits = (value.radius_bits, value.angle_bits)
        return "polar", (*bits, tiles, codes.offset, gains.offset, limit)
    return "tree", _tree_constants(codec, value, "value", channels)


def _tree_constants(codec: Codec, own: Recursive, side: str, channels: int) -> tuple[int, ...]:
    """Returns what `load_trees` needs to know of one side."""
    fields = _fields(codec)
    level_bits = own.level_bits(channels)
    tiled = len(fields[f"{side}_level1"].order.split) > 4
    book = fields[f"{side}_codebook"].offset if own.codebook == "kmeans" else -1
    radii = ("published", "log8", "deep").index(own.form)
    numbers = [len(level_bits), int(tiled), book, radii, fields[f"{side}_radii"].offset]
    for name in ("means", "scales"):
        field = fields.get(f"{side}_{name}")
        numbers.append(-1 if field is None else field.offset)
    for level, bits in enumerate(level_bits, start=1):
        numbers += [bits, fields[f"{side}_level{level}"].offset]
    return tuple(numbers)


def _fields(codec: Codec) -> Mapping[str, Field]:
    return {field.name: field for field in codec.layout.fields}


def side_table(own: KeyCodec | ValueCodec, channels: int, device: torch.device) -> Tensor | None:
    """Returns the table of one side that the kernels read, None where it needs none.

    Args:
        own: codec of the side.
        channels: of a head.
        device: where the table lies.
    """
    if isinstance(own, Polar):
        return polar_table(own, device)
    if isinstance(own, Recursive) and own.codebook == "analytic":
        return tree_table(own.level_bits(channels), device)
    return None


def side_rotation(own: KeyCodec | ValueCodec, channels: int, device: torch.device) -> Tensor | None:
    """Returns the matrix fp32 [D, D] that coded rows are multiplied with last, None without one.

    Args:
        own: codec of the side.
        channels: of a head.
        device: where the matrix lies.
    """
    if isinstance(own, Polar):
        return mixing(channels, device)
    if isinstance(own, Recursive):
        return rotation(channels, own.seed, device)
    return None


@lru_cache(maxsize=64)
def tree_table(level_bits: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns cosines and sines of the analytic codebooks of all levels, fp32 [levels, 2, 16].

    Args:
        level_bits: bits of each level, at most 4.
        device: where the table lies.
    """
    table = torch.zeros((len(level_bits), 2, 16))
    for level, bits in enumerate(level_bits):
        angles = torch.tensor(centroids(level + 1, bits), dtype=torch.float64)
        table[level, 0, : len(angles)], table[level, 1, : len(angles)] = angles.cos(), angles.sin()
    return table.to(device)


@lru_cache(maxsize=64)
def polar_table(codec: Polar, device: torch.device) -> Tensor:
    """Returns what each code of the universal polar codec stands for, at gain 1.

    Args:
        codec: bits.
        device: where the table lies.

    Returns:
        int32 [2**bits]: two fp16 numbers, the first in the low half.
    """
    return channels_of_codes(codec)[0, : 1 << codec.bits].to(device)


@lru_cache(maxsize=64)
def mix_matrix(head_dim: int, device: torch.device) -> Tensor:
    """Returns the mixing of channels times the root of `head_dim`, fp16: whole for powers of two.

    Args:
        head_dim: channels.
        device: where the matrix lies.
    """
    matrix = mixing(head_dim, torch.device("cpu")) * math.sqrt(head_dim)
    return matrix.half().to(device)


def _unit_tiles(codes: Field, tile_codes: int) -> int:
    """Returns the tiles of a unit of codes, 0 in plain rows."""
    order = codes.order
    return order.stream_codes * order.streams * LANES // tile_codes
