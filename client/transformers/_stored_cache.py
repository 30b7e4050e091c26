"""The cache whose prefix is retrieved and then attended to in the worker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from polarcache.client._types import LayerTensors, Match
from polarcache.client.codec import empty_unrounded
from polarcache.client.transformers._prefix import compute_prefix
from polarcache.client.transformers._prefix_cache import PrefixCache, release

__all__ = ["StoredPrefixCache"]


class StoredPrefixCache(PrefixCache):
    """Begins with the retrieved prefix; from then on an ordinary cache for any attention."""

    def _load(self, lease_ms: int) -> None:
        match = self._lookup(lease_ms)
        if match is None:
            return
        try:
            filled = [_StoredLayer.filled(k, v) for k, v in self._retrieve(match)]
        except BaseException as error:
            release(self._client, match, error)
            raise
        release(self._client, match)
        num_tokens = filled[0].get_seq_length()
        if num_tokens:
            self._write_exact(filled, num_tokens)
            self.layers = filled
            self._begin_with(match, num_tokens)
        num_blocks = num_tokens // self._namespace.spec.layout.block_tokens
        self.moved_bytes = num_blocks * (
            self._namespace.packed_block_bytes
            if self._pack == "worker"
            else self._namespace.raw_block_bytes
        )

    def _write_exact(self, layers: list[_StoredLayer], num_tokens: int) -> None:
        """Replaces the first tokens, whose keys and values depend on themselves alone."""
        num_exact = min(self._exact_first_tokens, num_tokens)
        if not num_exact:
            return
        computed = compute_prefix(self._model, self._prompt[0, :num_exact])
        for layer, (keys, values) in zip(layers, computed, strict=True):
            layer.begin_with(keys, values)

    def _retrieve(self, match: Match) -> Iterable[LayerTensors]:
        if self._pack == "worker":
            # Not rounded to the namespace's dtype: the numbers that the service attends to.
            out = empty_unrounded(match.namespace, match.num_blocks)
            return self._client.retrieve(match, pack="worker", out=out).layers
        return self._client.retrieve_layers(match)

    @staticmethod
    def _new_layer() -> DynamicLayer:
        return _StoredLayer()

    def _first_local_token(self) -> int:
        return self.prefix_tokens


class _StoredLayer(DynamicLayer):
    """Keys and values of all tokens; the prefix is as it came until the model's first tokens."""

    @classmethod
    def filled(cls, keys: Tensor, values: Tensor) -> _StoredLayer:
        """A layer that holds K [T, Hkv, D] and V [T, Hkv, Dv]."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        return layer

    def begin_with(self, keys: Tensor, values: Tensor) -> None:
        """Replaces the first tokens by K [1, Hkv, T, D] and V [1, Hkv, T, Dv]."""
        assert self.keys is not None
        assert self.values is not None
        num_tokens = keys.shape[2]
        self.keys = torch.cat((keys.to(self.keys), self.keys[:, :, num_tokens:]), 2)
        self.values = torch.cat((values.to(self.values), self.values[:, :, num_tokens:]), 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends; brings the prefix to the states' device, dtype and number of rows."""
        if self.keys is not None and self.values is not None:
            self.keys = _like(self.keys, key_states)
            self.values = _like(self.values, value_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values


def _like(stored: Tensor, new: Tensor) -> Tensor:
    stored = stored.to(new.device, new.dtype)
    rows = new.shape[0]
    return stored.expand(rows, -1, -1, -1) if stored.shape[0] == 1 < rows else stored
