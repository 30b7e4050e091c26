"""Where the bytes of a store's slices come from, and where those of a retrieve go to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polarcache.proto.errors import LayoutMismatchError
from polarcache.proto.frames import Buffer
from polarcache.proto.layout import KvLayout
from polarcache.proto.tensors import tensor_bytes

if TYPE_CHECKING:
    from polarcache.client._types import LayerTensors

__all__ = ["PackedSlices", "RawSlices", "empty_layers"]


class RawSlices:
    """Slices over per-layer keys and values of consecutive tokens.

    Args:
        layout: Shape of the blocks.
        num_blocks: Blocks that the tensors hold.
        layers: For each layer K [T, Hkv, D] and V [T, Hkv, Dv], T = num_blocks * block_tokens,
            as torch tensors of the namespace's dtype, or as C-contiguous buffers of that size.
            Tensors that are not contiguous or not on the CPU are copied, or refused if writable.
        writable: Whether the slices will be written.

    Raises:
        LayoutMismatchError: A tensor does not fit the layout.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        layers: Sequence[tuple[Any, Any]],
        *,
        writable: bool = False,
    ) -> None:
        if len(layers) != layout.num_layers:
            raise LayoutMismatchError(
                f"expected keys and values of {layout.num_layers} layers, got {len(layers)}"
            )
        self.slice_bytes = layout.raw_slice_bytes
        self._key_bytes = layout.raw_key_bytes
        self._value_bytes = layout.raw_value_bytes
        tokens = num_blocks * layout.block_tokens
        key_shape = (tokens, layout.num_kv_heads, layout.head_dim)
        value_shape = (tokens, layout.num_kv_heads, layout.v_head_dim)
        self._layers = [
            (
                _byte_view(f"keys of layer {i}", keys, key_shape, layout, writable),
                _byte_view(f"values of layer {i}", values, value_shape, layout, writable),
            )
            for i, (keys, values) in enumerate(layers)
        ]

    def parts(self, block_index: int, layers: range) -> list[memoryview]:
        """Views whose bytes one after the other are the slices of consecutive layers."""
        key_start = block_index * self._key_bytes
        value_start = block_index * self._value_bytes
        views: list[memoryview] = []
        for keys, values in self._layers[layers.start : layers.stop]:
            views.append(keys[key_start : key_start + self._key_bytes])
            views.append(values[value_start : value_start + self._value_bytes])
        return views


class PackedSlices:
    """Slices over packed blocks.

    Args:
        num_layers: Layers of a block.
        slice_bytes: Bytes of a packed slice.
        blocks: One C-contiguous buffer of num_layers * slice_bytes bytes a block.
        writable: Whether the slices will be written.

    Raises:
        LayoutMismatchError: A buffer is of another length, or cannot be written.
    """

    def __init__(
        self,
        num_layers: int,
        slice_bytes: int,
        blocks: Sequence[Buffer],
        *,
        writable: bool = False,
    ) -> None:
        self.slice_bytes = slice_bytes
        self._blocks = [memoryview(block).cast("B") for block in blocks]
        expected = num_layers * slice_bytes
        for i, block in enumerate(self._blocks):
            if len(block) != expected or (writable and block.readonly):
                kind = "writable bytes" if writable else "bytes"
                raise LayoutMismatchError(
                    f"packed block {i} must be {expected} {kind}, got {len(block)}"
                )

    def parts(self, block_index: int, layers: range) -> list[memoryview]:
        """Views whose bytes one after the other are the slices of consecutive layers."""
        start, end = layers.start * self.slice_bytes, layers.stop * self.slice_bytes
        return [self._blocks[block_index][start:end]]


def empty_layers(layout: KvLayout, num_blocks: int) -> list[LayerTensors]:
    """Uninitialized CPU tensors for the keys and values of `num_blocks` blocks."""
    import torch

    dtype = getattr(torch, layout.dtype)
    tokens = num_blocks * layout.block_tokens
    return [
        (
            torch.empty(tokens, layout.num_kv_heads, layout.head_dim, dtype=dtype),
            torch.empty(tokens, layout.num_kv_heads, layout.v_head_dim, dtype=dtype),
        )
        for _ in range(layout.num_layers)
    ]


def _byte_view(
    name: str, tensor: Any, shape: tuple[int, ...], layout: KvLayout, writable: bool
) -> memoryview:
    if hasattr(tensor, "data_ptr"):  # A torch tensor, without importing torch.
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != shape or dtype != layout.dtype:
            raise LayoutMismatchError(
                f"{name} must be {layout.dtype} {list(shape)}, got {dtype} {list(tensor.shape)}"
            )
        if writable and not (tensor.device.type == "cpu" and tensor.is_contiguous()):
            raise LayoutMismatchError(f"{name} must be contiguous and on the CPU to be written")
        return tensor_bytes(tensor.detach().cpu().contiguous())
    view = memoryview(tensor).cast("B")
    expected = shape[0] * shape[1] * shape[2] * layout.element_bytes
    if len(view) != expected or (writable and view.readonly):
        kind = "writable bytes" if writable else "bytes"
        raise LayoutMismatchError(f"{name} must be {expected} {kind}, got {len(view)}")
    return view
