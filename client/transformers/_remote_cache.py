"""The cache whose prefix stays in the service, which attends to it for the worker."""

from __future__ import annotations

from typing import Any

from torch import LongTensor, Tensor
from transformers.cache_utils import DynamicLayer

from polarcache.client.transformers._attention import ATTENTION, LayerPrefix, Scoring, mark
from polarcache.client.transformers._prefix import PrefixSource, RecomputedPrefix, RemotePrefix
from polarcache.client.transformers._prefix_cache import PrefixCache
from polarcache.proto.errors import InvalidRequestError, PolarCacheError, UnsupportedError

__all__ = ["RemotePrefixCache"]


class RemotePrefixCache(PrefixCache):
    """Holds the tokens after the prefix; each layer's attention to the prefix is asked for.

    The model must run with `attn_implementation="polarcache"`, which merges the two.
    """

    _source: PrefixSource | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends to a layer; the keys returned lead the attention function to the prefix.

        Raises:
            UnsupportedError: The model's attention does not look for the prefix.
        """
        # Layer -1 is the last one, of the tokens before.
        self._check_was_asked(layer_idx - 1)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if self.prefix_tokens:
            layer.unasked = True
            keys = mark(keys, _Asker(self, layer_idx))
        return keys, values

    def close(self) -> None:
        """Ends the streams and the lease."""
        if self._source is not None:
            self._source.close()

    def attend_prefix(
        self, layer: int, query: Tensor, scoring: Scoring, position: int
    ) -> tuple[Tensor, Tensor]:
        """Attention of a layer's queries over the prefix, as `LayerPrefix.attend`.

        Raises:
            PolarCacheError: The prefix is lost, with `on_failure="raise"`.
        """
        if self._source is None:
            raise InvalidRequestError("this cache has no stored prefix")
        self.layers[layer].unasked = False
        try:
            return self._attended(layer, query, scoring, position)
        except PolarCacheError as error:
            self._go_on_without(error)
        self._source.close()
        prefix = self._prompt[0, : self.prefix_tokens]
        self._source = RecomputedPrefix(self._model, prefix)
        return self._attended(layer, query, scoring, position)

    # -- inside -----------------------------------------------------------------------------

    def _attended(
        self, layer: int, query: Tensor, scoring: Scoring, position: int
    ) -> tuple[Tensor, Tensor]:
        assert self._source is not None
        out, lse, num_bytes = self._source.attend(layer, query, scoring, position)
        self.moved_bytes += num_bytes
        return out, lse

    def _load(self, lease_ms: int) -> None:
        if self._model.config._attn_implementation != ATTENTION:
            raise UnsupportedError(
                f"the model's attention is {self._model.config._attn_implementation!r}: call "
                f"model.set_attn_implementation({ATTENTION!r}) first"
            )
        match = self._lookup(lease_ms)
        if match is not None:
            self._source = RemotePrefix(self._client, match, self._model)
            self._begin_with(match, match.num_tokens)
            for layer in self.layers:
                layer.prefix_tokens = match.num_tokens

    def _check_was_asked(self, layer: int) -> None:
        if self.layers[layer].unasked:
            raise UnsupportedError(
                f"the attention of layer {layer % len(self.layers)} left the stored prefix out: "
                f"the model must run with attn_implementation={ATTENTION!r} and hand on the "
                "cache's keys as they are"
            )

    def _check_exact(self, num_tokens: int) -> None:
        super()._check_exact(num_tokens)
        if num_tokens:
            raise UnsupportedError(
                "exact_first_tokens: expected 0, the service attends to the prefix as it is stored"
            )

    @staticmethod
    def _new_layer() -> DynamicLayer:
        return _LocalLayer()

    def _first_local_token(self) -> int:
        return 0


class _Asker(LayerPrefix):
    """The prefix of one layer."""

    def __init__(self, cache: RemotePrefixCache, layer: int) -> None:
        self._cache = cache
        self._layer = layer

    @property
    def num_tokens(self) -> int:
        return self._cache.prefix_tokens

    def attend(self, query: Tensor, scoring: Scoring, position: int) -> tuple[Tensor, Tensor]:
        return self._cache.attend_prefix(self._layer, query, scoring, position)


class _LocalLayer(DynamicLayer):
    """Keys and values of the tokens after the prefix; counts the prefix as its own.

    Attributes:
        prefix_tokens: Tokens before them.
        unasked: Whether the last keys were handed out and the prefix not asked for since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefix_tokens = 0
        self.unasked = False

    @property
    def local_tokens(self) -> int:
        """Tokens held here."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        """Tokens of the whole sequence."""
        return self.prefix_tokens + self.local_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first position of the keys that `update` will return."""
        return self.local_tokens + query_length, self.prefix_tokens

    def reset(self) -> None:
        """Forgets everything, the prefix too."""
        super().reset()
        self.prefix_tokens, self.unasked = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes local tokens, of which -tokens_to_remove are taken from the end.

        Raises:
            InvalidRequestError: There are not so many.
        """
        if -tokens_to_remove > self.local_tokens:
            raise InvalidRequestError(
                f"cannot remove {-tokens_to_remove} tokens: {self.local_tokens} are local, the "
                f"{self.prefix_tokens} before them are in the cache service"
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Reorders rows; all share the prefix."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats rows; all share the prefix."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows; all share the prefix."""
        if self.is_initialized:
            super().batch_select_indices(indices)
