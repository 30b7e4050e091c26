"""Pages of SGLang's host pools as keys and values of blocks.

A page is a block: `page_size` tokens of all layers of this rank. Four layouts of a pool's K buffer
(and likewise V), S slots in N pages of P tokens:

| layout | buffer | one flat page of the pool, K then V |
|---|---|---|
| layer_first | [L, S, H, D] | [2, L, P, H, D] |
| page_first | [S, L, H, D] | [2, P, L, H, D] |
| page_first_direct | [N, L, P, H, D] | [2, L, P, H, D] |
| page_head | [N, H, P, L, D] | [2, H, P, L, D] |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polarcache.client._engine_store import BlockTensors
from polarcache.proto.errors import LayoutMismatchError, UnsupportedError
from polarcache.proto.layout import DTYPE_BYTES

__all__ = ["PagePool"]

_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")


@dataclass(frozen=True, slots=True)
class PagePool:
    """A host pool of keys and values.

    Attributes:
        layout: SGLang's name of its layout.
        keys: The K buffer.
        values: The V buffer.
        num_layers: L.
        page_tokens: P.
        num_heads: H, key/value heads of this rank.
        head_dim: Channels of a key.
        v_head_dim: Channels of a value.
        dtype: Name of the element type.
    """

    layout: str
    keys: torch.Tensor
    values: torch.Tensor
    num_layers: int
    page_tokens: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str

    @classmethod
    def of(cls, pool: Any) -> PagePool:
        """Reads a pool of SGLang.

        Args:
            pool: A host pool, such as `MHATokenToKVPoolHost`.

        Raises:
            UnsupportedError: It holds something else than keys and values in a float type.
            LayoutMismatchError: Its buffers are not laid out as its layout says.
        """
        kind = type(pool).__name__
        # Pools of other kinds share names with this one: only those that have all of them fit.
        needed = ("head_num", "head_dim", "v_head_dim", "layer_num", "k_buffer", "v_buffer")
        missing = [name for name in needed if getattr(pool, name, None) is None]
        if missing or getattr(pool, "stores_page_envelope", False):
            raise UnsupportedError(
                f"{kind} does not hold keys and values of attention heads (no "
                f"{', '.join(missing) or 'separate buffers'}); PolarCache stores multi-head and "
                "grouped-query attention alone"
            )
        if pool.layout not in _LAYOUTS:
            raise UnsupportedError(
                f"--hicache-mem-layout must be one of {', '.join(_LAYOUTS)}, got {pool.layout}"
            )
        dtype = str(pool.dtype).removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise UnsupportedError(
                f"--kv-cache-dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype}: "
                "PolarCache quantizes by itself"
            )
        made = cls(
            layout=pool.layout,
            keys=pool.k_buffer,
            values=pool.v_buffer,
            num_layers=pool.layer_num,
            page_tokens=pool.page_size,
            num_heads=pool.head_num,
            head_dim=pool.head_dim,
            v_head_dim=pool.v_head_dim,
            dtype=dtype,
        )
        made._check(kind, "k_buffer", made.keys, made.head_dim)
        made._check(kind, "v_buffer", made.values, made.v_head_dim)
        return made

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
            pages: Tensors of 2 * L * P * H * D elements, contiguous.

        Returns:
            For each K [L, P, H, D] and V [L, P, H, D].

        Raises:
            LayoutMismatchError: One is of another size or dtype.
        """
        shape = self._page_shape(self.head_dim)
        wanted = 2 * self.num_layers * self.page_tokens * self.num_heads * self.head_dim
        views = []
        for page in pages:
            if page.numel() != wanted or str(page.dtype) != f"torch.{self.dtype}":
                raise LayoutMismatchError(
                    f"a flat page must be {self.dtype} [{wanted}], got {page.dtype} "
                    f"{list(page.shape)}"
                )
            keys, values = page.view(2, *shape)
            views.append((self._page(keys, 0), self._page(values, 0)))
        return views

    def empty_flat_page(self) -> torch.Tensor:
        """An uninitialized flat page."""
        shape = self._page_shape(self.head_dim)
        return torch.empty(2, *shape, dtype=getattr(torch, self.dtype)).flatten()

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

    def _page_shape(self, head_dim: int) -> tuple[int, ...]:
        """A buffer of one page."""
        tokens, layers, heads = self.page_tokens, self.num_layers, self.num_heads
        return {
            "layer_first": (layers, tokens, heads, head_dim),
            "page_first": (tokens, layers, heads, head_dim),
            "page_first_direct": (1, layers, tokens, heads, head_dim),
            "page_head": (1, heads, tokens, layers, head_dim),
        }[self.layout]

    def _check(self, kind: str, name: str, buffer: torch.Tensor, head_dim: int) -> None:
        # A layout that changed under its old name would corrupt every page in silence.
        expected = list(self._page_shape(head_dim))
        slot_axis = 1 if self.layout == "layer_first" else 0
        got = list(buffer.shape)
        matches = len(got) == len(expected) and buffer.device.type == "cpu"
        if matches:
            expected[slot_axis] = got[slot_axis]
            matches = got == expected
        if not matches:
            raise LayoutMismatchError(
                f"{name} of {kind} must be on the CPU in the {self.layout} layout {expected} "
                f"(axis {slot_axis} of any length), got {got} on {buffer.device}"
            )
