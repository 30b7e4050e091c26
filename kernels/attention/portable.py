"""Attention over packed pages by Triton kernels, on any GPU since compute capability 8.0.

Covers every codec, shape, option and query dtype. Pages of 8 tokens and other odd sizes are covered
too, at the cost of tiles that are partly empty.
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
from polarcache.kernels.attention.packed import (
    key_constants,
    mix_matrix,
    side_rotation,
    side_table,
    value_constants,
)
from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import ShapeError
from polarcache.kernels.layout import TILE_TOKENS
from polarcache.kernels.polar.rotation import rotation
from polarcache.kernels.profile import Exact, Polar, Recursive

__all__ = ["PortableAttention", "Tuning"]

_ONE = 0x3F800000  # the bits of 1.0
_MIN_ROWS = 16  # the tensor cores' rows
_MAX_WARPS = 8
_SPLIT_TOKENS = 128  # the fewest that are worth a split
_MAX_SPLITS = 256
_MERGED_SPLITS = 32  # at a time
_ELEMENTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a launch is cut.

    Attributes:
        tile_numbers: numbers of one side in a tile of tokens.
        num_warps: warps of a program for heads of up to 128 channels.
        num_stages: Triton's depth of software pipelining.
        programs: programs that share a multiprocessor.
    """

    tile_numbers: int
    num_warps: int
    num_stages: int
    programs: int


# By work and query rows of a program. Decoding keeps one warp busy, which then waits for no other;
# mixing a page's queries takes four to hold the matrix (Triton 3.6 cannot compile it for 64 rows on
# Hopper); exact sides only move bytes, in wide tiles.
_TUNINGS = {
    ("decode", 16): Tuning(2048, 1, 1, 12),
    ("decode", 32): Tuning(4096, 2, 1, 6),
    ("decode", 64): Tuning(8192, 8, 1, 2),
    ("mix", 16): Tuning(8192, 4, 1, 2),
    ("mix", 32): Tuning(8192, 4, 1, 2),
    ("move", 16): Tuning(8192, 4, 3, 2),
    ("move", 32): Tuning(8192, 4, 2, 2),
    ("move", 64): Tuning(8192, 4, 2, 2),
}


@dataclass(frozen=True, slots=True)
class PortableAttention:
    """The kernels for one codec, number of query heads and options.

    Attributes:
        codec: the codec of the pages.
        query_heads: query heads.
        options: how scores become weights.
        num_sms: multiprocessors of the device.
        constants: constexpr arguments of `attend_kernel` that no call changes.
        tunings: by query rows of a program: 16, 32 and, of most codecs, 64.
    """

    codec: Codec
    query_heads: int
    options: AttentionOptions
    num_sms: int
    constants: Mapping[str, Any]
    tunings: Mapping[int, Tuning]

    @classmethod
    def of(
        cls,
        codec: Codec,
        query_heads: int,
        options: AttentionOptions,
        num_sms: int,
        *,
        fast: bool = True,
    ) -> Self:
        """Returns the kernels for a codec.

        Args:
            codec: the codec of the pages.
            query_heads: a multiple of the codec's KV heads.
            options: how scores become weights.
            num_sms: multiprocessors of the device.
            fast: whether to use the device's own cosine, which Triton's interpreter lacks.
        """
        shape = codec.shape
        key, value = key_constants(codec), value_constants(codec)
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
        }
        work = "decode"
        if key[0] in ("polar", "tiers", "tree"):
            work = "mix"
        elif key[0] == value[0] == "exact":
            work = "move"
        tunings = {rows: tuning for (kind, rows), tuning in _TUNINGS.items() if kind == work}
        return cls(codec, query_heads, options, num_sms, constants, tunings)

    @property
    def share(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.codec.shape.kv_heads

    def workspace_bytes(self, num_queries: int, num_sequences: int, max_pages: int) -> int:
        """Returns the bytes of scratch memory that a call of at most these sizes needs."""
        if not num_queries or not num_sequences:
            return 0
        shape, profile = self.codec.shape, self.codec.profile
        channels = shape.v_head_dim * isinstance(profile.value, Polar | Recursive)
        channels += shape.head_dim * isinstance(profile.key, Recursive)
        rotated = 4 * num_queries * self.query_heads * channels
        if self._most_splits(max_pages) == 1:
            return rotated
        # Splits fill the device at most, whatever the number of programs without them.
        largest = self._tile_rows(num_queries)
        rows = max(
            self.num_sms * tuning.programs * rows
            for rows, tuning in self.tunings.items()
            if rows <= largest
        )
        return rotated + rows * (shape.v_head_dim + 1) * 4

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
        shape, options, share = self.codec.shape, self.options, self.share
        rows = self._tile_rows(batch.max_rows)
        row_tiles = -(-batch.max_rows * share // rows)
        programs = batch.num_sequences * row_tiles
        splits = self._splits(programs, rows, batch.page_table.shape[1])
        key, value, device = self.codec.profile.key, self.codec.profile.value, query.device
        if workspace is None:
            workspace = torch.empty(0, dtype=torch.uint8, device=device)
        floats = workspace[: workspace.shape[0] // 4 * 4].view(torch.float32)
        back = side_rotation(value, shape.v_head_dim, device)
        rotated = out
        if back is not None:
            rotated, floats = floats[: out.numel()].view(out.shape), floats[out.numel() :]
        own_query, count = query, query.numel()
        if isinstance(key, Recursive):
            own_query, floats = floats[:count].view(query.shape), floats[count:]
            _rotate(query, rotation(shape.head_dim, key.seed, device).T, own_query)
        part, part_lse = rotated, lse
        if splits > 1:
            numbers = programs * shape.kv_heads * splits * rows
            part = floats[: numbers * shape.v_head_dim]
            part_lse = floats[part.shape[0] : part.shape[0] + numbers]
        tuning = self.tunings[rows]
        attend_kernel[(programs, shape.kv_heads, splits)](
            own_query, batch.memory, batch.page_table, batch.lengths, batch.query_starts,
            batch.positions if options.window else None, part, part_lse,
            side_table(key, shape.head_dim, device), side_table(value, shape.v_head_dim, device),
            mix_matrix(shape.head_dim, device) if isinstance(key, Polar) else None,
            query if isinstance(key, Recursive) and key.form == "deep" else None,
            batch.page_table.shape[1], batch.slice_offset, row_tiles, splits,
            options.scale or shape.head_dim**-0.5, options.soft_cap,
            options.window, options.sink_tokens, _ONE,
            **self.constants_of(own_query.dtype, rows), SPLIT=splits > 1,
            num_warps=self.warps(rows), num_stages=tuning.num_stages,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(programs, shape.kv_heads, min(rows, batch.max_rows * share))](
                part, part_lse, batch.query_starts, rotated, lse, row_tiles, splits,
                HEADS=shape.kv_heads, DV=shape.v_head_dim, SHARE=share, BM=rows,
                WIDE_V=self.constants["WIDE_V"], SPLITS=triton.next_power_of_2(splits),
                CHUNK=min(_MERGED_SPLITS, triton.next_power_of_2(splits)),
            )  # fmt: skip
        if back is not None:
            _rotate(rotated, back, out)

    def constants_of(self, query_dtype: torch.dtype, rows: int) -> dict[str, Any]:
        """Returns the constexpr arguments of `attend_kernel` but SPLIT.

        Args:
            query_dtype: fp16, bf16 or fp32.
            rows: query rows of a program: 16, 32 or 64.
        """
        shape = self.codec.shape
        # A power of two that divides the page where 16 does, and never spans two groups.
        widest = max(self.constants["WIDE_K"], self.constants["WIDE_V"])
        largest = max(TILE_TOKENS, self.tunings[rows].tile_numbers // widest)
        group = getattr(self.codec.profile.key, "group_tokens", shape.tokens)
        tokens = TILE_TOKENS
        while 2 * tokens <= min(largest, group) and shape.tokens % (2 * tokens) == 0:
            tokens *= 2
        return {**self.constants, "SCORES": self._scores(query_dtype), "BM": rows, "BT": tokens}

    def warps(self, rows: int) -> int:
        """Returns warps of a program of so many query rows; wide heads need more registers."""
        widest = max(self.constants["WIDE_K"], self.constants["WIDE_V"])
        return min(_MAX_WARPS, self.tunings[rows].num_warps * (2 if widest > 128 else 1))

    def _tile_rows(self, num_rows: int) -> int:
        """Returns rows of a program for so many query rows of one sequence."""
        rows = _MIN_ROWS
        while rows < min(num_rows * self.share, max(self.tunings)):
            rows *= 2
        return rows

    def _most_splits(self, max_pages: int) -> int:
        tokens = max_pages * self.codec.shape.tokens
        return min(max(1, tokens // _SPLIT_TOKENS), _MAX_SPLITS)

    def _splits(self, programs: int, rows: int, max_pages: int) -> int:
        """Returns splits of each sequence; more than one only where all programs fit the device."""
        fitting = self.num_sms * self.tunings[rows].programs
        return max(
            1,
            min(fitting // (programs * self.codec.shape.kv_heads), self._most_splits(max_pages)),
        )

    def _scores(self, query_dtype: torch.dtype) -> str:
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


def _rotate(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Writes rows [.., D] times a matrix [D, D] in fp32; `allow_tf32` is off by default."""
    channels = matrix.shape[0]
    torch.mm(rows.float().view(-1, channels), matrix, out=out.view(-1, channels))
