"""Where attention over a prefix comes from: the service, or a prefix computed again."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from polarcache.client._attend import AttendStream
from polarcache.client._sync import Client
from polarcache.client._types import LayerTensors, Match
from polarcache.client.transformers._attention import Scoring, attend_plainly
from polarcache.client.transformers._prefix_cache import release
from polarcache.proto.errors import CapacityError, PolarCacheError

__all__ = ["PrefixSource", "RecomputedPrefix", "RemotePrefix", "compute_prefix"]

# Tokens that a prefix is computed with at a time.
_CHUNK_TOKENS = 512
# Waits while the service's queue is full; computing the prefix again would take longer.
_BUSY_WAITS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class PrefixSource(Protocol):
    """Attends to a prefix, layer by layer."""

    def attend(
        self, layer: int, query: Tensor, scoring: Scoring, position: int
    ) -> tuple[Tensor, Tensor, int]:
        """As `LayerPrefix.attend`, and the bytes that travelled."""
        ...

    def close(self) -> None:
        """Gives back what it holds. Again is harmless."""
        ...


class RemotePrefix(PrefixSource):
    """A leased prefix in the service. Layers that score alike share a stream.

    Args:
        client: Client of the service.
        match: The prefix; its lease is released by `close`.
        model: The model whose layers will ask.

    Raises:
        BlockNotFoundError: A block is gone.
        PolarCacheError: The service cannot attend to the prefix.
    """

    def __init__(self, client: Client, match: Match, model: PreTrainedModel) -> None:
        self._client = client
        self._match = match
        self._query_heads = model.config.get_text_config(decoder=True).num_attention_heads
        self._dtype = model.dtype
        self._streams: dict[Scoring, AttendStream] = {}
        self._is_closed = False
        self._error: BaseException | None = None
        try:
            for scoring in _expected_scorings(model):
                self._stream(scoring)
        except BaseException as error:
            self._error = error
            self.close()
            raise

    def attend(
        self, layer: int, query: Tensor, scoring: Scoring, position: int
    ) -> tuple[Tensor, Tensor, int]:
        """Asks the service; raises a `PolarCacheError` when it does not answer in time."""
        try:
            return self._attend(layer, query, scoring, position)
        except PolarCacheError as error:
            self._error = error
            raise

    def close(self) -> None:
        """Ends the streams and the lease."""
        if self._is_closed:
            return
        self._is_closed = True
        for stream in self._streams.values():
            stream.close()
        release(self._client, self._match, self._error)

    def _attend(
        self, layer: int, query: Tensor, scoring: Scoring, position: int
    ) -> tuple[Tensor, Tensor, int]:
        stream = self._stream(scoring)
        batch, heads, num_queries, head_dim = query.shape
        rows = query.transpose(1, 2).to(self._dtype)
        if scoring.window:
            # Tokens of one request lie behind each other, so each sequence is its own.
            pairs = [_asked(stream, layer, row, position) for row in rows]
        else:
            pairs = [_asked(stream, layer, rows.reshape(-1, heads, head_dim), None)]
        out = torch.cat([pair[0] for pair in pairs])
        lse = torch.cat([pair[1] for pair in pairs])
        num_bytes = rows.nbytes + out.nbytes + lse.nbytes
        out = out.view(batch, num_queries, heads, -1).transpose(1, 2)
        return out, lse.view(batch, num_queries, heads).transpose(1, 2), num_bytes

    def _stream(self, scoring: Scoring) -> AttendStream:
        stream = self._streams.get(scoring)
        if stream is None:
            stream = self._streams[scoring] = self._client.attend(
                self._match,
                query_heads=self._query_heads,
                query_dtype=str(self._dtype).removeprefix("torch."),
                scale=scoring.scale,
                soft_cap=scoring.soft_cap,
                window=scoring.window,
            )
        return stream


def _asked(
    stream: AttendStream, layer: int, queries: Tensor, position: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of queries [T, Hq, D]; a full queue in the service is asked again."""
    for wait_s in _BUSY_WAITS_S:
        try:
            return stream.attend(layer, queries, position)
        except CapacityError:
            time.sleep(wait_s)
    return stream.attend(layer, queries, position)


class RecomputedPrefix(PrefixSource):
    """A prefix whose keys and values the model computed again.

    Args:
        model: The model.
        token_ids: The prefix, int64 [T].
    """

    def __init__(self, model: PreTrainedModel, token_ids: Tensor) -> None:
        self._layers = compute_prefix(model, token_ids)

    def attend(
        self, layer: int, query: Tensor, scoring: Scoring, position: int
    ) -> tuple[Tensor, Tensor, int]:
        """Attends here; nothing travels."""
        keys, values = self._layers[layer]
        mask = None
        if scoring.window:
            positions = torch.arange(position, position + query.shape[2], device=query.device)
            tokens = torch.arange(keys.shape[2], device=query.device)
            mask = tokens > positions.unsqueeze(1) - scoring.window
        return *attend_plainly(query, keys, values, mask, scoring), 0

    def close(self) -> None:
        """Holds nothing of the service."""


@torch.no_grad()
def compute_prefix(model: PreTrainedModel, token_ids: Tensor) -> list[LayerTensors]:
    """Keys and values of tokens from position 0 on.

    Args:
        model: The model.
        token_ids: int64 [T].

    Returns:
        For each layer K [1, Hkv, T, D] and V [1, Hkv, T, Dv] on the model's device.
    """
    cache: Any = DynamicCache()
    for chunk in token_ids[None].to(model.device).split(_CHUNK_TOKENS, 1):
        model.base_model(input_ids=chunk, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _expected_scorings(model: PreTrainedModel) -> list[Scoring]:
    """How the layers of the tested models score, so that a prefix that is gone is noticed early."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windows = {config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds}
    return [Scoring(head_dim**-0.5, window=window) for window in sorted(windows)]
