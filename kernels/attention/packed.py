"""What the portable kernels must know of a packed slice: kinds, bits and offsets of its sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polarcache.kernels.codec import Codec
from polarcache.kernels.layout import LANES, TILE_TOKENS, Field
from polarcache.kernels.profile import ArcPair, Exact, Integer, Pair

__all__ = ["key_constants", "value_constants"]


def key_constants(codec: Codec) -> tuple[str, tuple[Any, ...]] | None:
    """Returns the kind of keys and what `load_keys` needs for it; None without a kernel.

    Args:
        codec: the codec of the pages.

    Returns:
        (`exact`, (offset,)) or (`pair` or `arc2`, (radius bits, angle bits, tokens of a group,
        tiles of a unit or 0 in plain rows, offsets of codes and of each kind of parameters)).
    """
    key, fields = codec.profile.key, _fields(codec)
    names: tuple[str, ...]
    if isinstance(key, Exact):
        return "exact", (fields["key_elements"].offset,)
    if isinstance(key, Pair):
        kind, names = "pair", ("key_codes", "key_parameters")
    elif isinstance(key, ArcPair) and not key.tiers:
        kind, names = "arc2", ("key_codes", "key_arcs", "key_radii")
    else:
        return None
    tiles = _unit_tiles(fields["key_codes"], TILE_TOKENS * codec.shape.pairs)
    offsets = (fields[name].offset for name in names)
    return kind, (key.radius_bits, key.angle_bits, key.group_tokens, tiles, *offsets)


def value_constants(codec: Codec) -> tuple[str, tuple[Any, ...]] | None:
    """Returns the kind of values and what `load_values` needs; None without a kernel.

    Args:
        codec: the codec of the pages.

    Returns:
        (`exact`, (offset,)) or (`integer`, (bits, channels of a group, tiles of a unit or 0 in
        plain rows, whether parameters lie by tiles, offsets of codes and parameters)).
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
    return None


def _fields(codec: Codec) -> Mapping[str, Field]:
    return {field.name: field for field in codec.layout.fields}


def _unit_tiles(codes: Field, tile_codes: int) -> int:
    """Returns the tiles of a unit of codes, 0 in plain rows."""
    order = codes.order
    return order.stream_codes * order.streams * LANES // tile_codes
