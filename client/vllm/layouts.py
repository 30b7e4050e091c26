"""How the engine lays keys and values out in its cache tensors, and how to read and write them.

A cache tensor is one layer, [B, H, N, C]: engine blocks, heads, tokens of a block, channels of key
and value together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from polarcache.proto.errors import UnsupportedError
from polarcache.proto.layout import KvLayout

__all__ = ["CacheLayout", "KeyThenValue", "TransposedKeys", "check_shape"]

# keys [T, H, D], values [T, H, D], key half and value half [B, H, N, D], slots [T]
WriteCache = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class CacheLayout(Protocol):
    """Reads and writes whole engine blocks of one layer."""

    def gather(
        self, cache: torch.Tensor, block_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [T, H, D] and values [T, H, Dv] of blocks, new and contiguous.

        Args:
            cache: [B, H, N, C].
            block_ids: int64 [n] on the cache's device; T = n * N.
        """

    def scatter(
        self,
        cache: torch.Tensor,
        block_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Writes keys [T, H, D] and values [T, H, Dv], on the cache's device, to blocks."""


class KeyThenValue:
    """The layout on GPUs: a token's key, then its value, in the last axis.

    Memory may be in any order: the tensor's strides say it.

    Args:
        head_dim: Channels of a key.
    """

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    def gather(
        self, cache: torch.Tensor, block_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CacheLayout.gather`."""
        blocks = cache.index_select(0, block_ids).transpose(1, 2)
        tokens = blocks.reshape(-1, *blocks.shape[2:])
        keys, values = tokens[..., : self._head_dim], tokens[..., self._head_dim :]
        return keys.contiguous(), values.contiguous()

    def scatter(
        self,
        cache: torch.Tensor,
        block_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See `CacheLayout.scatter`."""
        tokens = torch.cat([keys, values], dim=-1)
        blocks = tokens.unflatten(0, (len(block_ids), -1)).transpose(1, 2)
        cache.index_copy_(0, block_ids, blocks)


class TransposedKeys:
    """The layout of vLLM's CPU attention with vector instructions ("vec").

    The bytes of a head's block are [2N, D]: first the keys, transposed to [D, N], then the values
    [N, D].

    Args:
        write: vLLM's own operation that writes tokens to slots.
    """

    def __init__(self, write: WriteCache) -> None:
        self._write = write

    def gather(
        self, cache: torch.Tensor, block_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CacheLayout.gather`."""
        _, num_heads, block_tokens, channels = cache.shape
        head_dim = channels // 2
        blocks = cache.index_select(0, block_ids).view(-1, num_heads, 2, block_tokens * head_dim)
        keys = blocks[:, :, 0].unflatten(-1, (head_dim, block_tokens)).permute(0, 3, 1, 2)
        values = blocks[:, :, 1].unflatten(-1, (block_tokens, head_dim)).transpose(1, 2)
        shape = (len(block_ids) * block_tokens, num_heads, head_dim)
        return keys.reshape(shape), values.reshape(shape)

    def scatter(
        self,
        cache: torch.Tensor,
        block_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """See `CacheLayout.scatter`."""
        num_blocks, num_heads, block_tokens, channels = cache.shape
        halves = cache.view(num_blocks, num_heads, 2 * block_tokens, channels // 2)
        slots = block_ids[:, None] * block_tokens + torch.arange(block_tokens)
        self._write(
            keys,
            values,
            halves[:, :, :block_tokens],
            halves[:, :, block_tokens:],
            slots.flatten(),
        )

    def check(self, layout: KvLayout, engine_block_tokens: int) -> None:
        """Writes to a small cache with the engine's operation and reads it back.

        Args:
            layout: Shape of a stored block.
            engine_block_tokens: Tokens of an engine block.

        Raises:
            UnsupportedError: Other bytes come back: this engine lays its cache out in another way.
        """
        dtype = getattr(torch, layout.dtype)
        shape = (2 * engine_block_tokens, layout.num_kv_heads, layout.head_dim)
        generator = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        cache = torch.zeros(
            3, layout.num_kv_heads, engine_block_tokens, 2 * layout.head_dim, dtype=dtype
        )
        block_ids = torch.tensor([2, 0])
        self.scatter(cache, block_ids, keys, values)
        got_keys, got_values = self.gather(cache, block_ids)
        if not (torch.equal(got_keys, keys) and torch.equal(got_values, values)):
            raise UnsupportedError(
                "the engine's CPU attention does not keep transposed keys before values, as vLLM "
                "0.32 does: this version is not supported"
            )


def check_shape(name: str, cache: torch.Tensor, layout: KvLayout, engine_block_tokens: int) -> None:
    """Checks that a cache tensor is what we take it for.

    Args:
        name: The layer's name, for the message.
        cache: The engine's tensor.
        layout: Shape of a stored block.
        engine_block_tokens: Tokens of an engine block.

    Raises:
        UnsupportedError: It is something else.
    """
    expected = (layout.num_kv_heads, engine_block_tokens, layout.head_dim + layout.v_head_dim)
    dtype = str(cache.dtype).removeprefix("torch.")
    if tuple(cache.shape[1:]) != expected or dtype != layout.dtype:
        raise UnsupportedError(
            f"the engine's cache of {name} is {dtype} {list(cache.shape)}; expected "
            f"{layout.dtype} [blocks, {', '.join(map(str, expected))}]"
        )
