"""The fast form of attention over packed pages: which calls it covers, and its launch.

One rule chooses it: an NVIDIA GPU of compute capability 9.x, pair keys of 6 or 8 bits in groups of
128 tokens, int4 values with one range a row, heads of 64 or 128 channels, no window. Source:
cuda/decode.cu, and cuda/wide.cu where many query columns see one KV head; reasons: README.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polarcache.kernels.attention.batch import EVEN, PrefixBatch
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import ShapeError
from polarcache.kernels.profile import ArcPair, Integer, Pair

if TYPE_CHECKING:
    from polarcache.kernels.attention.cuda.module import BoundKernel

__all__ = ["FastDecode", "PreparedDecode"]

_GROUP_TOKENS = 128
_LOG2_E = math.log2(math.e)
# Most blocks of a part, which wide.cu has room for (teams.cuh).
_MOST_SPLITS = 256
_QUERY_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


# Where the fields' places are in the kernel's arguments.
_FIRST_FIELD = 8
_launches = itertools.count()


def _next_mark() -> int:
    """Returns the bits of a NaN that no recent launch had and that no arithmetic makes."""
    return 0xFFC00001 + next(_launches) % 0x3FFFFE


@dataclass(frozen=True, slots=True)
class _Block:
    """How a thread block takes the query columns of a KV head.

    Attributes:
        tiles: tiles of 8 columns of the tensor cores.
        spread: 2 where columns stand at even places only, which halves the softmax; else 1.
        warps: warps of the block.
        slots: ring slots of a warp, or of a team of them.
        source: file of the kernel.
        least_groups: groups of 128 tokens that take a block as long as one, since its warps or
            teams work on one each.
        cost: a block's fixed cost in groups (decode.cu on an H200: 6 us of 0.55 us a group).
    """

    tiles: int
    spread: int
    warps: int
    slots: int
    source: str = "decode.cu"
    least_groups: int = 8
    cost: int = 10

    @property
    def columns(self) -> int:
        """Query columns."""
        return 8 * self.tiles // self.spread


_BLOCKS = (_Block(1, 2, 16, 2), _Block(1, 1, 16, 2), _Block(2, 1, 8, 4))
# For more columns than those have, where heads have 128 channels.
_WIDE = _Block(8, 1, 16, 3, source="wide.cu", least_groups=2, cost=6)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Thread blocks of a launch, and of each part; the latter 0 where lengths decide."""

    blocks: int
    splits: int


class PreparedDecode:
    """A launch of the fast form over tensors that stay where they are; not thread-safe.

    Args:
        bound: the kernel with its arguments.
        offsets: first byte of each field in a slice, as the kernel takes them.
    """

    __slots__ = ("_bound", "_fields", "_mark")

    def __init__(self, bound: BoundKernel, offsets: Sequence[int]) -> None:
        self._bound = bound
        fields = bound.values[_FIRST_FIELD : _FIRST_FIELD + len(offsets)]
        self._fields = list(zip(fields, offsets, strict=True))
        self._mark = bound.values[-1]

    def __call__(self, slice_offset: int, stream: int) -> None:
        """Launches on a stream of the device that is current in this thread.

        Args:
            slice_offset: first byte of the layer's slice in every page, a multiple of 16.
            stream: the driver's handle.

        Raises:
            RuntimeError: the driver refuses the launch.
        """
        for field, offset in self._fields:
            field.value = slice_offset + offset
        self._mark.value = _next_mark()
        self._bound(stream)


class FastDecode:
    """Prepares launches of the fast form for one codec, head count and options; thread-safe."""

    def __init__(self, codec: Codec, query_heads: int, options: AttentionOptions) -> None:
        """Collects the kernel's constants.

        Args:
            codec: the codec of the pages; `covers` holds for it.
            query_heads: query heads.
            options: how scores become weights.
        """
        key, shape = codec.profile.key, codec.shape
        assert isinstance(key, Pair | ArcPair)
        self._shape = shape
        self._query_heads = query_heads
        arcs = isinstance(key, ArcPair)
        offsets = {field.name: field.offset for field in codec.layout.fields}
        self._fields = (
            offsets["key_codes"],
            offsets["key_arcs" if arcs else "key_parameters"],
            offsets.get("key_radii", 0),
            offsets["value_codes"],
            offsets["value_parameters"],
        )
        scale = (options.scale or shape.head_dim**-0.5) * _LOG2_E
        cap = options.soft_cap
        # With a cap the kernel takes exp(2 score / cap) for the hyperbolic tangent.
        self._scales = (2 * scale / cap, cap * _LOG2_E) if cap else (scale, 0.0)
        self._defines = (
            ("HEAD_DIM", shape.head_dim),
            ("V_HEAD_DIM", shape.v_head_dim),
            ("RADIUS_BITS", key.radius_bits),
            ("ANGLE_BITS", key.angle_bits),
            ("ARCS", int(arcs)),
            ("ROTARY", shape.rotary_dim),
            ("INTERLEAVED", int(shape.pairing == "interleaved")),
            ("PAGE_GROUPS", shape.tokens // _GROUP_TOKENS),
            ("SOFT_CAP", int(bool(cap))),
            # Slots hold whole words of keys: at 64 channels two tiles share them.
            ("SLOT_TILES", 128 // shape.head_dim),
        )

    @staticmethod
    def covers(codec: Codec, options: AttentionOptions) -> bool:
        """Whether the fast form computes this on a GPU of compute capability 9.x."""
        key, value, shape = codec.profile.key, codec.profile.value, codec.shape
        return (
            isinstance(key, Pair | ArcPair)
            and not getattr(key, "tiers", 0)
            and key.group_tokens == _GROUP_TOKENS
            and key.radius_bits + key.angle_bits in (6, 8)
            and key.angle_bits in (3, 4)
            and isinstance(value, Integer)
            and value.bits == 4
            and value.channels_per_group(shape.v_head_dim) == shape.v_head_dim
            and shape.head_dim in (64, 128)
            and shape.v_head_dim in (64, 128)
            and shape.tokens % _GROUP_TOKENS == 0
            and not options.window
        )

    def workspace_bytes(self, num_sequences: int, max_rows: int, processors: int) -> int:
        """Returns the bytes of partial states that a launch may need."""
        column_tiles, block = self._columns(max_rows)
        parts = self._shape.kv_heads * column_tiles
        # Even plans have at most four waves of blocks or one a part, dealt ones a wave more.
        blocks = num_sequences * parts + max(4 * processors, parts)
        return blocks * self._partial_bytes(block)

    def prepare(
        self, query: Tensor, batch: PrefixBatch, out: Tensor, lse: Tensor, workspace: Tensor | None
    ) -> PreparedDecode:
        """Returns a launch for any slice offset; arguments as for `PrefixAttention`.

        Raises:
            ShapeError: the workspace is missing, too small or on another device.
            ImportError: the CUDA bindings are not installed.
            CompileError: NVRTC refuses the source.
            RuntimeError: the driver refuses the kernel, or NVRTC is not to be found.
        """
        # Imported here: only a GPU needs the CUDA bindings.
        from polarcache.kernels.attention.cuda.module import Kernel

        device = query.device.index or 0
        column_tiles, block = self._columns(batch.max_rows)
        macros = tuple(self._macros(block, query.dtype).items())
        kernel = Kernel.of(device, block.source, macros)
        plan = self._plan(batch, column_tiles, block, device)
        needed = plan.blocks * self._partial_bytes(block) if plan.splits != 1 else 0
        if needed and (
            workspace is None
            or len(workspace) < needed
            or workspace.device != query.device
            or workspace.data_ptr() % 16
        ):
            raise ShapeError(
                f"workspace: expected {needed} bytes on {query.device}, at a multiple of 16"
            )
        arguments: tuple[Any, ...] = (
            query.data_ptr(), batch.memory.data_ptr(), batch.page_table.data_ptr(),
            batch.lengths.data_ptr(), batch.query_starts.data_ptr(), out.data_ptr(),
            lse.data_ptr(), 0 if workspace is None else workspace.data_ptr(), *self._fields,
            batch.num_sequences, batch.page_table.shape[1], self._query_heads,
            self._shape.kv_heads, column_tiles, plan.splits, *self._scales, 0,
        )  # fmt: skip
        return PreparedDecode(kernel.bind(plan.blocks, arguments), self._fields)

    def _macros(self, block: _Block, query: torch.dtype) -> dict[str, int]:
        """Returns the constants of the kernel's source."""
        return dict(self._defines) | {
            "QUERY": _QUERY_KINDS[query],
            "COLUMN_TILES": block.tiles,
            "SPREAD": block.spread,
            "WARPS": block.warps,
            "SLOTS": block.slots,
        }

    def _partial_bytes(self, block: _Block) -> int:
        """Returns the bytes that a block hands over: sums and two numbers a column."""
        numbers = block.columns * (self._shape.v_head_dim + 2)
        # Marked one by one, or once for every block that waits for them.
        return 4 * (numbers + _MOST_SPLITS) if block is _WIDE else 8 * numbers

    def _columns(self, max_rows: int) -> tuple[int, _Block]:
        """Returns how many blocks share a KV head's query columns, and how each takes its own."""
        columns = max_rows * self._query_heads // self._shape.kv_heads
        last = _WIDE if self._shape.head_dim == self._shape.v_head_dim == 128 else _BLOCKS[-1]
        block = next((block for block in _BLOCKS if columns <= block.columns), last)
        return -(-columns // block.columns), block

    def _plan(self, batch: PrefixBatch, column_tiles: int, block: _Block, device: int) -> _Plan:
        """Shares the device out: as many blocks for every part, or by length."""
        properties = torch.cuda.get_device_properties(device)
        processors = min(properties.multi_processor_count, _MOST_SPLITS)
        parts = batch.num_sequences * self._shape.kv_heads * column_tiles
        known = batch.known_lengths
        tokens = batch.page_table.shape[1] * self._shape.tokens
        if known is not None and len(known) == batch.num_sequences:
            tokens = max(known)
            if tokens * len(known) > EVEN * sum(known):
                return _Plan(self._dealt_blocks(batch.num_sequences, column_tiles, processors), 0)
        return self._even_plan(max(1, -(-tokens // _GROUP_TOKENS)), parts, processors, block)

    @staticmethod
    def _even_plan(groups: int, parts: int, processors: int, block: _Block) -> _Plan:
        """Returns the splits of parts of equal length that take the least time, in whole waves.

        Blocks of a part wait for each other, so that they never are more than the multiprocessors.
        """
        best = (math.inf, 1)
        for waves in range(1, 5):
            splits = min(max(1, waves * processors // parts), groups, processors)
            run = -(-parts * splits // processors)
            cost = run * (max(-(-groups // splits), block.least_groups) + block.cost)
            best = min(best, (cost, splits))
        return _Plan(parts * best[1], best[1])

    def _dealt_blocks(self, num_sequences: int, column_tiles: int, processors: int) -> int:
        """Returns blocks for unequal lengths: one a part, and some to split long sequences."""
        parts = self._shape.kv_heads * column_tiles
        spare = processors // parts
        # The longest gets what all others leave, one each: never more than the multiprocessors.
        most = num_sequences - 1 + processors
        return parts * (
            spare if spare >= 2 * num_sequences else min(num_sequences + max(1, spare), most)
        )
