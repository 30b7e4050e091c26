"""The engine's cache of one rank: copies of its blocks, ordered after what the engine computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from polarcache.client._types import LayerTensors
from polarcache.client.vllm.layouts import CacheLayout

__all__ = ["EngineCache", "Fence"]

# An event on the engine's stream; None where the engine computes on the CPU, step by step.
Fence = torch.cuda.Event | None


class EngineCache:
    """Reads and writes engine blocks from background threads.

    On a GPU every copy runs on a stream of the calling thread, which first waits for a fence: an
    event that the engine's stream passes once it has computed, or no more reads, the blocks.

    Args:
        layers: For each layer the engine's tensor [B, H, N, C].
        cache_layout: How they are laid out.
    """

    def __init__(self, layers: Sequence[torch.Tensor], cache_layout: CacheLayout) -> None:
        self._layers = list(layers)
        self._cache_layout = cache_layout
        self._device = layers[0].device
        self._of_thread = threading.local()

    def fence(self) -> Fence:
        """Marks what the engine's stream was given so far; call it in the engine's thread."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, block_ids: Sequence[int], fence: Fence) -> list[LayerTensors]:
        """Copies blocks to the CPU.

        Args:
            block_ids: Engine blocks, in order. They must not change until this returns.
            fence: After it they are computed.

        Returns:
            For each layer K [T, H, D] and V [T, H, Dv].
        """
        ids = self._ids(block_ids)
        with self._on_stream(fence):
            layers = [self._cache_layout.gather(layer, ids) for layer in self._layers]
            copies = [(self._to_cpu(keys), self._to_cpu(values)) for keys, values in layers]
        self._synchronize()
        return copies

    def write(
        self,
        layer: int,
        block_ids: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        fence: Fence,
    ) -> Fence:
        """Copies one layer of blocks from the CPU.

        Args:
            layer: Index of the layer.
            block_ids: Engine blocks, in order.
            keys: K [T, H, D] on the CPU.
            values: V [T, H, Dv] on the CPU.
            fence: After it the engine no more touches the blocks.

        Returns:
            A fence after which the engine may read the layer.
        """
        with self._on_stream(fence):
            self._cache_layout.scatter(
                self._layers[layer],
                self._ids(block_ids),
                keys.to(self._device),
                values.to(self._device),
            )
            return self.fence()

    def finish_writes(self) -> None:
        """Waits until this thread's writes are done."""
        self._synchronize()

    def wait_in_engine(self, fence: Fence) -> None:
        """Makes the engine's stream wait for a fence; call it in the engine's thread."""
        if fence is not None:
            torch.cuda.current_stream(self._device).wait_event(fence)

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._device)

    def _to_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor
        # Pinned, from torch's cache of host memory: the copy needs no bounce buffer.
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    def _on_stream(self, fence: Fence) -> Any:
        if self._device.type != "cuda":
            return nullcontext()
        stream = self._stream()
        if fence is not None:
            stream.wait_event(fence)
        return torch.cuda.stream(stream)

    def _stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._of_thread, "stream", None)
        if stream is None:
            stream = self._of_thread.stream = torch.cuda.Stream(self._device)
        return stream

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            self._stream().synchronize()
