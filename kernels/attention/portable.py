"""Attention over packed pages by Triton kernels, on any GPU since compute capability 8.0.

Covers every shape, option and query dtype with keys `exact`, `pair:r..t..` or `pair:..:arc2` and
values `exact`, `int4` or `int2`. Other codecs have no kernel: `PrefixAttention` decodes them page
by page in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from polarcache.kernels.attention.batch import PrefixBatch
from polarcache.kernels.attention.flash import attend_kernel, merge_kernel
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import ShapeError
from polarcache.kernels.layout import LANES, TILE_TOKENS, Field
from polarcache.kernels.profile import ArcPair, Exact, Integer, Pair

__all__ = ["PortableAttention"]

_MIN_ROWS = 16  # the tensor cores' rows
_MAX_ROWS = 64
# Decoded numbers of one side that a tile of four warps keeps in registers.
_TILE_NUMBERS = 8192
_NUM_WARPS = 4
_NUM_STAGES = 1
# Programs that share a multiprocessor, and the fewest tiles that are worth a split.
_PROGRAMS_PER_SM = 4
_MIN_TILES_PER_SPLIT = 4
_MAX_SPLITS = 128
_ELEMENTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True, slots=True)
class PortableAttention:
    """The kernels' constants for one codec, number of query heads and options.

    Attributes:
        codec: the codec of the pages.
        query_heads: query heads.
        options: how scores become weights.
        num_programs: programs that fill the device; a launch is split into no more.
        constants: constexpr arguments of `attend_kernel` that no call changes.
        tile_tokens: tokens of a tile.
        num_warps: warps of a program; twice as many for the most rows.
        num_stages: Triton's depth of software pipelining.
    """

    codec: Codec
    query_heads: int
    options: AttentionOptions
    num_programs: int
    constants: Mapping[str, Any]
    tile_tokens: int
    num_warps: int = _NUM_WARPS
    num_stages: int = _NUM_STAGES

    @classmethod
    def of(
        cls,
        codec: Codec,
        query_heads: int,
        options: AttentionOptions,
        num_sms: int,
        *,
        fast: bool = True,
    ) -> Self | None:
        """Returns the kernels for a codec, or None where it has none.

        Args:
            codec: the codec of the pages.
            query_heads: a multiple of the codec's KV heads.
            options: how scores become weights.
            num_sms: multiprocessors of the device.
            fast: whether to use the device's own cosine, which Triton's interpreter lacks.
        """
        shape = codec.shape
        fields = {field.name: field for field in codec.layout.fields}
        key, value = _key_constants(codec, fields), _value_constants(codec, fields)
        if key is None or value is None:
            return None
        # A power of two that divides the page where 16 does, and never spans two groups.
        widest = max(shape.head_dim, shape.v_head_dim)
        tokens = TILE_TOKENS
        largest = max(_MIN_ROWS, _TILE_NUMBERS // triton.next_power_of_2(widest))
        group = getattr(codec.profile.key, "group_tokens", shape.tokens)
        while 2 * tokens <= min(largest, group) and shape.tokens % (2 * tokens) == 0:
            tokens *= 2
        constants = {
            "KEY_KIND": key[0],
            "KEY": key[1],
            "VALUE_KIND": value[0],
            "VALUE": value[1],
            "ELEMENT": _ELEMENTS[codec.dtype],
            "T": shape.tokens,
            "HEADS": shape.kv_heads,
            "D": shape.head_dim,
            "DV": shape.v_head_dim,
            "ROTARY": shape.rotary_dim,
            "INTERLEAVED": shape.pairing == "interleaved",
            "SHARE": query_heads // shape.kv_heads,
            "HAS_CAP": bool(options.soft_cap),
            "WIDE_K": triton.next_power_of_2(shape.head_dim),
            "WIDE_V": triton.next_power_of_2(shape.v_head_dim),
            "FAST": fast,
            "BT": tokens,
        }
        programs = num_sms * _PROGRAMS_PER_SM
        return cls(codec, query_heads, options, programs, constants, tokens)

    @property
    def share(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.codec.shape.kv_heads

    def workspace_bytes(self, num_queries: int, num_sequences: int, max_pages: int) -> int:
        """Returns the bytes of scratch memory that a call of at most these sizes needs."""
        if not num_queries or not num_sequences or self._most_splits(max_pages) == 1:
            return 0
        # Splits fill the device at most, whatever the number of programs without them.
        rows = self._tile_rows(num_queries)
        return self.num_programs * rows * (self.codec.shape.v_head_dim + 1) * 4

    def attend(
        self,
        query: Tensor,
        batch: PrefixBatch,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None,
    ) -> None:
        """Launches the kernels, without waiting for them. Arguments as `PrefixAttention` has them.

        Raises:
            ShapeError: the workspace is too small, of another dtype or on another device.
        """
        self._check_workspace(query, batch, workspace)
        shape, options = self.codec.shape, self.options
        share = self.share
        rows = self._tile_rows(batch.max_rows)
        row_tiles = triton.cdiv(batch.max_rows * share, rows)
        programs = batch.num_sequences * row_tiles
        splits = self._splits(programs, batch.page_table.shape[1])
        part, part_lse = out, lse
        if splits > 1 and workspace is not None:
            floats = workspace[: workspace.shape[0] // 4 * 4].view(torch.float32)
            numbers = programs * shape.kv_heads * splits * rows
            part = floats[: numbers * shape.v_head_dim]
            part_lse = floats[part.shape[0] : part.shape[0] + numbers]
        attend_kernel[(programs, shape.kv_heads, splits)](
            query, batch.memory, batch.page_table, batch.lengths, batch.query_starts,
            batch.positions if options.window else None, part, part_lse,
            batch.page_table.shape[1], batch.slice_offset, row_tiles, splits,
            options.scale or shape.head_dim**-0.5, options.soft_cap,
            options.window, options.sink_tokens,
            **self.constants, SCORES=self.scores(query.dtype), BM=rows, SPLIT=splits > 1,
            num_warps=self.num_warps * (2 if rows == _MAX_ROWS else 1), num_stages=self.num_stages,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(programs, shape.kv_heads, min(rows, batch.max_rows * share))](
                part, part_lse, batch.query_starts, out, lse, row_tiles, splits,
                HEADS=shape.kv_heads, DV=shape.v_head_dim, SHARE=share, BM=rows,
                WIDE_V=self.constants["WIDE_V"], SPLITS=triton.next_power_of_2(splits),
                num_warps=_NUM_WARPS,
            )  # fmt: skip

    def _tile_rows(self, num_rows: int) -> int:
        """Returns rows of a program for so many query rows of one sequence."""
        rows = _MIN_ROWS
        while rows < min(num_rows * self.share, _MAX_ROWS):
            rows *= 2
        return rows

    def _most_splits(self, max_pages: int) -> int:
        tiles = max_pages * -(-self.codec.shape.tokens // self.tile_tokens)
        return min(max(1, tiles // _MIN_TILES_PER_SPLIT), _MAX_SPLITS)

    def _splits(self, programs: int, max_pages: int) -> int:
        """Returns splits of each sequence; more than one only where all programs fit the device."""
        fitting = self.num_programs // (programs * self.codec.shape.kv_heads)
        return max(1, min(fitting, self._most_splits(max_pages)))

    def scores(self, query_dtype: torch.dtype) -> str:
        """Returns how scores are multiplied: see `attend_kernel`."""
        if not isinstance(self.codec.profile.key, Exact):
            return "half"
        if torch.float32 in (query_dtype, self.codec.dtype):
            return "tf32x3"
        # fp16 and bf16 are both exact in tf32.
        return "same" if query_dtype == self.codec.dtype else "tf32"

    def _check_workspace(self, query: Tensor, batch: PrefixBatch, workspace: Tensor | None) -> None:
        needed = self.workspace_bytes(
            query.shape[0], batch.num_sequences, batch.page_table.shape[1]
        )
        if not needed:
            return
        if workspace is None:
            raise ShapeError(f"workspace missing: expected {needed} bytes")
        if (
            workspace.dtype != torch.uint8
            or workspace.dim() != 1
            or workspace.shape[0] < needed
            or workspace.device != query.device
            or workspace.data_ptr() % 16
        ):
            raise ShapeError(
                f"workspace {workspace.dtype} {tuple(workspace.shape)} on {workspace.device}: "
                f"expected uint8 of at least {needed} bytes on {query.device}, aligned to 16"
            )


def _key_constants(codec: Codec, fields: Mapping[str, Field]) -> tuple[str, tuple[Any, ...]] | None:
    """Returns the kind of keys and what `load_keys` needs for it; None without a kernel."""
    key = codec.profile.key
    if isinstance(key, Exact):
        return "exact", (fields["key_elements"].offset,)
    names: tuple[str, ...]
    if isinstance(key, Pair):
        kind, names = "pair", ("key_codes", "key_parameters")
    elif isinstance(key, ArcPair) and not key.tiers:
        kind, names = "arc2", ("key_codes", "key_arcs", "key_radii")
    else:
        return None
    tiles = _unit_tiles(fields["key_codes"], TILE_TOKENS * codec.shape.pairs)
    offsets = (fields[name].offset for name in names)
    return kind, (key.radius_bits, key.angle_bits, key.group_tokens, tiles, *offsets)


def _value_constants(
    codec: Codec, fields: Mapping[str, Field]
) -> tuple[str, tuple[Any, ...]] | None:
    """Returns the kind of values and what `load_values` needs; None without a kernel."""
    value, channels = codec.profile.value, codec.shape.v_head_dim
    if isinstance(value, Exact):
        return "exact", (fields["value_elements"].offset,)
    if isinstance(value, Integer):
        codes, parameters = fields["value_codes"], fields["value_parameters"]
        tiles = _unit_tiles(codes, TILE_TOKENS * channels)
        tiled = codec.shape.tokens % TILE_TOKENS == 0
        group = value.channels_per_group(channels)
        return "integer", (value.bits, group, tiles, tiled, codes.offset, parameters.offset)
    return None


def _unit_tiles(codes: Field, tile_codes: int) -> int:
    """Returns the tiles of a unit of codes, 0 in plain rows."""
    order = codes.order
    return order.stream_codes * order.streams * LANES // tile_codes
