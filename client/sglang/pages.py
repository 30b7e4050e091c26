"""Pages of SGLang's host pools as keys and values of blocks.

A page is a block: `page_size` tokens of all layers of this rank. Four layouts of a pool's K buffer
(and likewise V), S slots in N pages of P tokens:

| layout | buffer | one flat page of the pool, K then V |
|---|---|---|
| layer_first | [L, S, H, D] | [2, L, P, H, D] |
| page_first | [S, L, H, D] | [2, P, L, H, D] |
| page_first_direct | [N, L, P, H, D] | [2, L, P, H, D] |
| page_head | [N, H, P, L, D] | [2, H, P, L, D] |

Multi-head latent attention keeps one vector a token in place of K and V: the compressed latent,
then the channels that RoPE turns. Its pools have one buffer, in the first three layouts with H = 1,
and a flat page has no leading 2. Stored are the turned channels as keys and the latent as values,
split into as few heads as the widest head allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polarcache.client._engine_store import BlockTensors
from polarcache.proto.errors import LayoutMismatchError, UnsupportedError
from polarcache.proto.layout import DTYPE_BYTES

__all__ = ["PagePool"]

_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
_LATENT_LAYOUTS = _LAYOUTS[:3]
_WIDEST_HEAD = 256
_OF_HEADS = ("head_num", "head_dim", "v_head_dim", "layer_num", "k_buffer", "v_buffer")
_OF_LATENTS = ("kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "layer_num", "kv_buffer")


@dataclass(frozen=True, slots=True)
class PagePool:
    """A host pool of keys and values.

    Attributes:
        layout: SGLang's name of its layout.
        is_latent: Whether a token has one latent vector.
        keys: The K buffer; of latent vectors the channels that RoPE turns.
        values: The V buffer; of latent vectors the rest.
        num_layers: L.
        page_tokens: P.
        num_heads: H, key/value heads of this rank.
        head_dim: Channels of a key.
        v_head_dim: Channels of a value.
        dtype: Name of the element type.
    """

    layout: str
    is_latent: bool
    keys: torch.Tensor
    values: torch.Tensor
    num_layers: int
    page_tokens: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str

    @staticmethod
    def of(pool: Any) -> PagePool:
        """Reads a pool of SGLang.

        Args:
            pool: A host pool, such as `MHATokenToKVPoolHost`.

        Raises:
            UnsupportedError: It holds something else than keys and values in a float type.
            LayoutMismatchError: Its buffers are not laid out as its layout says.
        """
        kind = type(pool).__name__
        is_latent = getattr(pool, "kv_lora_rank", None) is not None
        # Pools of other kinds share names with these: only those that have all of them fit.
        needed = _OF_LATENTS if is_latent else _OF_HEADS
        missing = [name for name in needed if getattr(pool, name, None) is None]
        if missing or getattr(pool, "stores_page_envelope", False):
            raise UnsupportedError(
                f"{kind} does not hold keys and values of attention heads (no "
                f"{', '.join(missing) or 'separate buffers'}); PolarCache stores multi-head, "
                "grouped-query and multi-head latent attention alone"
            )
        layouts = _LATENT_LAYOUTS if is_latent else _LAYOUTS
        if pool.layout not in layouts:
            raise UnsupportedError(
                f"--hicache-mem-layout must be one of {', '.join(layouts)}, got {pool.layout}"
            )
        dtype = str(pool.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise UnsupportedError(
                f"--kv-cache-dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype}: "
                "PolarCache quantizes by itself"
            )
        return (_of_latents if is_latent else _of_heads)(pool, dtype)

    def pages(self, host_indices: torch.Tensor, num_pages: int) -> list[BlockTensors]:
        """Views of pages.

        Args:
            host_indices: int [num_pages * P], the slots of their tokens; a page's are adjacent.
            num_pages: How many pages.

        Returns:
            For each page K [L, P, H, D] and V [L, P, H, Dv].

        Raises:
            LayoutMismatchError: There are too few or too many indices.
        """
        if host_indices.numel() != num_pages * self.page_tokens:
            raise LayoutMismatchError(
                f"{num_pages} pages of {self.page_tokens} tokens need as many host indices, got "
                f"{host_indices.numel()}"
            )
        return [
            (self._page(self.keys, first), self._page(self.values, first))
            for first in host_indices[:: self.page_tokens].tolist()
        ]

    def flat_pages(self, pages: Sequence[torch.Tensor]) -> list[BlockTensors]:
        """Views of flat pages, as `get_data_page` and `get_dummy_flat_data_page` make them.

        Args:
            pages: Tensors of 2 * L * P * H * D elements, or of L * P latent vectors, contiguous.

        Returns:
            For each K [L, P, H, D] and V [L, P, H, Dv].

        Raises:
            LayoutMismatchError: One is of another size or dtype.
        """
        shape = self._flat_shape()
        views = []
        for page in pages:
            if page.numel() != math.prod(shape) or str(page.dtype) != f"torch.{self.dtype}":
                raise LayoutMismatchError(
                    f"a flat page must be {self.dtype} [{math.prod(shape)}], got {page.dtype} "
                    f"{list(page.shape)}"
                )
            buffer = page.view(shape)
            keys, values = (
                _split(buffer, self.v_head_dim, self.num_heads) if self.is_latent else buffer
            )
            views.append((self._page(keys, 0), self._page(values, 0)))
        return views

    def empty_flat_page(self) -> torch.Tensor:
        """An uninitialized flat page."""
        return torch.empty(math.prod(self._flat_shape()), dtype=getattr(torch, self.dtype))

    def _page(self, buffer: torch.Tensor, first_slot: int) -> torch.Tensor:
        """The page that starts at a slot, as [L, P, H, D]."""
        slots = slice(first_slot, first_slot + self.page_tokens)
        page_index = first_slot // self.page_tokens
        if self.layout == "layer_first":
            return buffer[:, slots]
        if self.layout == "page_first":
            return buffer[slots].transpose(0, 1)
        if self.layout == "page_first_direct":
            return buffer[page_index]
        return buffer[page_index].permute(2, 1, 0, 3)

    def _flat_shape(self) -> tuple[int, ...]:
        """A flat page before it was flattened."""
        if self.is_latent:
            width = self.num_heads * (self.head_dim + self.v_head_dim)
            return _page_shape(self.layout, self.num_layers, self.page_tokens, 1, width)
        shape = (self.num_layers, self.page_tokens, self.num_heads, self.head_dim)
        return (2, *_page_shape(self.layout, *shape))


def _of_heads(pool: Any, dtype: str) -> PagePool:
    for name, width in (("k_buffer", pool.head_dim), ("v_buffer", pool.v_head_dim)):
        _check(pool, name, pool.head_num, width)
    return PagePool(
        layout=pool.layout,
        is_latent=False,
        keys=pool.k_buffer,
        values=pool.v_buffer,
        num_layers=pool.layer_num,
        page_tokens=pool.page_size,
        num_heads=pool.head_num,
        head_dim=pool.head_dim,
        v_head_dim=pool.v_head_dim,
        dtype=dtype,
    )


def _of_latents(pool: Any, dtype: str) -> PagePool:
    latent, turned = pool.kv_lora_rank, pool.qk_rope_head_dim
    if pool.kv_cache_dim != latent + turned:
        raise UnsupportedError(
            f"{type(pool).__name__} has vectors of {pool.kv_cache_dim} elements, expected "
            f"{latent + turned}: {latent} of the latent and {turned} that RoPE turns"
        )
    _check(pool, "kv_buffer", 1, pool.kv_cache_dim)
    heads = -(-max(latent, turned) // _WIDEST_HEAD)
    if latent % (16 * heads) or turned % (16 * heads):
        raise UnsupportedError(
            f"latent vectors of {latent} and {turned} channels do not split into {heads} heads of "
            f"multiples of 16 channels up to {_WIDEST_HEAD}"
        )
    keys, values = _split(pool.kv_buffer, latent // heads, heads)
    return PagePool(
        layout=pool.layout,
        is_latent=True,
        keys=keys,
        values=values,
        num_layers=pool.layer_num,
        page_tokens=pool.page_size,
        num_heads=heads,
        head_dim=turned // heads,
        v_head_dim=latent // heads,
        dtype=dtype,
    )


def _split(vectors: torch.Tensor, v_head_dim: int, heads: int) -> BlockTensors:
    """Views K [..., H, D] and V [..., H, Dv] of latent vectors [..., 1, H * (Dv + D)]."""
    latent = heads * v_head_dim
    keys, values = vectors[..., 0, latent:], vectors[..., 0, :latent]
    return keys.unflatten(-1, (heads, -1)), values.unflatten(-1, (heads, -1))


def _page_shape(layout: str, layers: int, tokens: int, heads: int, width: int) -> tuple[int, ...]:
    """A buffer of one page."""
    return {
        "layer_first": (layers, tokens, heads, width),
        "page_first": (tokens, layers, heads, width),
        "page_first_direct": (1, layers, tokens, heads, width),
        "page_head": (1, heads, tokens, layers, width),
    }[layout]


def _check(pool: Any, name: str, heads: int, width: int) -> None:
    # A layout that changed under its old name would corrupt every page in silence.
    buffer = getattr(pool, name)
    expected = list(_page_shape(pool.layout, pool.layer_num, pool.page_size, heads, width))
    slot_axis = 1 if pool.layout == "layer_first" else 0
    got = list(buffer.shape)
    matches = len(got) == len(expected) and buffer.device.type == "cpu"
    if matches:
        expected[slot_axis] = got[slot_axis]
        matches = got == expected
    if not matches:
        raise LayoutMismatchError(
            f"{name} of {type(pool).__name__} must be on the CPU in the {pool.layout} layout "
            f"{expected} (axis {slot_axis} of any length), got {got} on {buffer.device}"
        )
