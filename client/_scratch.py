"""The contiguous buffer through which an engine's scattered blocks pass to and from the wire."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from polarcache.client._types import LayerTensors
from polarcache.proto.errors import LayoutMismatchError
from polarcache.proto.layout import KvLayout

__all__ = ["BlockTensors", "Scratch", "ScratchBuffer"]

# One block in the engine's memory: K [L, block_tokens, Hkv, D] and V [L, block_tokens, Hkv, Dv],
# CPU tensors, strided or not.
BlockTensors = tuple[torch.Tensor, torch.Tensor]


class ScratchBuffer:
    """Room for the keys and values of some blocks, layer by layer.

    Args:
        layout: Shape of the blocks.
        num_bytes: Wanted size; at least one block fits.

    Attributes:
        layout: As given.
        num_blocks: Blocks that fit.
    """

    def __init__(self, layout: KvLayout, num_bytes: int) -> None:
        self.layout = layout
        self.num_blocks = max(1, num_bytes // layout.raw_block_bytes)
        dtype = getattr(torch, layout.dtype)
        shape = (layout.num_layers, self.num_blocks * layout.block_tokens, layout.num_kv_heads)
        self._keys = torch.empty(*shape, layout.head_dim, dtype=dtype)
        self._values = torch.empty(*shape, layout.v_head_dim, dtype=dtype)

    def layers(self, num_blocks: int) -> list[LayerTensors]:
        """For each layer K [T, Hkv, D] and V [T, Hkv, Dv] of the first blocks, as views."""
        tokens = num_blocks * self.layout.block_tokens
        return [
            (self._keys[layer, :tokens], self._values[layer, :tokens])
            for layer in range(self.layout.num_layers)
        ]

    def read_from(self, blocks: Sequence[BlockTensors]) -> None:
        """Copies blocks of the engine here.

        Raises:
            LayoutMismatchError: One has another shape or dtype.
        """
        for (keys, values), (my_keys, my_values) in self._pairs(blocks):
            my_keys.copy_(keys)
            my_values.copy_(values)

    def write_to(self, blocks: Sequence[BlockTensors]) -> None:
        """Copies the first blocks from here into the engine.

        Raises:
            LayoutMismatchError: One has another shape or dtype.
        """
        for (keys, values), (my_keys, my_values) in self._pairs(blocks):
            keys.copy_(my_keys)
            values.copy_(my_values)

    def _pairs(self, blocks: Sequence[BlockTensors]) -> Iterator[tuple[BlockTensors, BlockTensors]]:
        tokens = self.layout.block_tokens
        for i, block in enumerate(blocks):
            place = slice(i * tokens, (i + 1) * tokens)
            mine = (self._keys[:, place], self._values[:, place])
            for name, theirs, my in zip(("keys", "values"), block, mine, strict=True):
                if theirs.shape != my.shape or theirs.dtype != my.dtype:
                    raise LayoutMismatchError(
                        f"{name} of a block must be {my.dtype} {list(my.shape)}, got "
                        f"{theirs.dtype} {list(theirs.shape)}"
                    )
            yield block, mine


class Scratch:
    """One buffer for the layout used last, lent to one caller at a time.

    Args:
        num_bytes: About how much memory it takes.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._lock = threading.Lock()
        self._buffer: ScratchBuffer | None = None

    @contextmanager
    def of(self, layout: KvLayout) -> Iterator[ScratchBuffer]:
        """The buffer, with anything in it."""
        with self._lock:
            if self._buffer is None or self._buffer.layout != layout:
                self._buffer = None
                self._buffer = ScratchBuffer(layout, self._num_bytes)
            yield self._buffer
