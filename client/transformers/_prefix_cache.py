"""What both caches have in common: the prompt, its stored prefix, failures, storing new blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from polarcache.client._sync import Client
from polarcache.client._types import LayerTensors, Match, Namespace, PackWhere, StoreResult
from polarcache.client.transformers._namespace import check_layout
from polarcache.proto.errors import (
    DeadlineError,
    InvalidRequestError,
    LayoutMismatchError,
    PolarCacheError,
    ServiceUnavailableError,
    UnsupportedError,
)
from polarcache.proto.keys import chain_keys

__all__ = ["OnFailure", "PrefixCache", "release"]

OnFailure = Literal["recompute", "raise"]
_log = logging.getLogger(__name__)
_WRONG_CALLS = (InvalidRequestError, LayoutMismatchError, UnsupportedError)


class PrefixCache(Cache):
    """A transformers cache that begins with the longest stored prefix of a prompt.

    Make one with `from_store`, give it to `model.generate(token_ids, past_key_values=cache)` with
    the whole prompt, and close it, best by `with`. It serves one batch.

    Attributes:
        prefix_tokens: Tokens of the prompt that came from the store, in every row.
        tiers: Tiers that held them when they were looked up.
        moved_bytes: Bytes of keys, values, queries and attention that travelled so far.
        failure: Why the cache went on without the service; None while it did not have to.
    """

    # Of one class a cache, which the base class cannot know.
    layers: list[Any]

    def __init__(
        self,
        client: Client,
        namespace: Namespace,
        model: PreTrainedModel,
        token_ids: Tensor | Sequence[int],
        *,
        on_failure: OnFailure = "recompute",
        store_prompt: bool = False,
        pack: PackWhere = "service",
        exact_first_tokens: int = 0,
    ) -> None:
        """An empty cache. Arguments as for `from_store`, which looks the prefix up too."""
        check_layout(namespace.spec.layout, model)
        self._check_exact(exact_first_tokens)
        super().__init__(
            layers=[self._new_layer() for _ in range(namespace.spec.layout.num_layers)]
        )
        self._client = client
        self._namespace = namespace
        self._model = model
        self._prompt = _rows(token_ids)
        self._on_failure = on_failure
        self._store_prompt = store_prompt
        self._pack: PackWhere = pack
        self._exact_first_tokens = exact_first_tokens
        self.prefix_tokens = 0
        self.tiers: tuple[str, ...] = ()
        self.moved_bytes = 0
        self.failure: PolarCacheError | None = None

    @classmethod
    def from_store(
        cls,
        client: Client,
        namespace: Namespace,
        model: PreTrainedModel,
        token_ids: Tensor | Sequence[int],
        *,
        on_failure: OnFailure = "recompute",
        store_prompt: bool = False,
        pack: PackWhere = "service",
        exact_first_tokens: int = 0,
        lease_ms: int = 0,
    ) -> Self:
        """A cache that begins with the longest stored prefix.

        The last token of the prompt is never part of it: the model needs one to go on from.

        Args:
            client: Client of the service.
            namespace: Namespace of the model's blocks, such as `namespace_spec` describes.
            model: The model that will use the cache.
            token_ids: The prompt, [T] or [B, T]; of several rows the prefix that all of them
                share. No padding on the left.
            on_failure: What happens when the service fails: "recompute" goes on without it, to
                the same answer; "raise" raises the error.
            store_prompt: Whether leaving the `with` block stores the prompt's new full blocks.
            pack: Where the codec runs for blocks that travel.
            exact_first_tokens: `StoredPrefixCache` only: as many tokens at the beginning, which
                attention looks at most (attention sinks), are computed again and replace what a
                lossy profile made of them; 4 are usual.
            lease_ms: Wanted life of the lease, milliseconds; 0 for the service's default.

        Raises:
            LayoutMismatchError: The namespace is not of the model's shape.
            InvalidRequestError: The token ids are not of the above shape, or `exact_first_tokens`
                is negative.
            UnsupportedError: The model or the service cannot do this.
            PolarCacheError: Other failures, with `on_failure="raise"`.
        """
        cache = cls(
            client, namespace, model, token_ids,
            on_failure=on_failure, store_prompt=store_prompt, pack=pack,
            exact_first_tokens=exact_first_tokens,
        )  # fmt: skip
        try:
            cache._load(lease_ms)
        except PolarCacheError as error:
            cache._go_on_without(error)
        return cache

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._store_prompt and exc is None and self.failure is None:
                self.store_new_blocks()
        except PolarCacheError as error:
            self._go_on_without(error)
        finally:
            self.close()

    def close(self) -> None:
        """Gives back what the service holds for this cache. The cache can be used no more."""

    def store_new_blocks(self, token_ids: Tensor | Sequence[int] | None = None) -> StoreResult:
        """Stores the full blocks after the stored prefix whose keys and values are here.

        Args:
            token_ids: The rows' token ids, beginning with the prompt, such as `generate` returns
                without beams: also stores what was generated. None for the prompt alone.

        Raises:
            InvalidRequestError: The token ids do not begin with the prompt.
            PolarCacheError: The service did not take them.
        """
        rows = self._prompt if token_ids is None else _rows(token_ids)
        if not torch.equal(rows[:, : self._prompt.shape[1]], self._prompt):
            raise InvalidRequestError("token_ids must begin with the prompt of the cache")
        block_tokens = self._namespace.spec.layout.block_tokens
        known = self.prefix_tokens // block_tokens
        num_blocks = min(rows.shape[1], self.get_seq_length()) // block_tokens
        total = StoreResult(0, 0, 0)
        if num_blocks <= known:
            return total
        for i, row in enumerate(rows.tolist()):
            keys = chain_keys(row, block_tokens)[known:num_blocks]
            layers = self._new_layers(i * self._rows_here() // len(rows), len(keys) * block_tokens)
            total += self._client.store(self._namespace, keys, layers, pack=self._pack)
        return total

    # -- inside -----------------------------------------------------------------------------

    def _load(self, lease_ms: int) -> None:
        """Looks the prefix up and makes the cache begin with it."""
        raise NotImplementedError

    def _check_exact(self, num_tokens: int) -> None:
        """Refuses numbers of exact first tokens that the cache cannot have."""
        if num_tokens < 0:
            raise InvalidRequestError(f"exact_first_tokens {num_tokens}: expected at least 0")

    @staticmethod
    def _new_layer() -> DynamicLayer:
        raise NotImplementedError

    def _first_local_token(self) -> int:
        """Where in the layers' keys the tokens after the prefix begin."""
        raise NotImplementedError

    def _lookup(self, lease_ms: int) -> Match | None:
        """The longest stored prefix of what all rows share, but for the last token."""
        shared = int((self._prompt == self._prompt[:1]).all(0).long().cumprod(0).sum())
        tokens = self._prompt[0, : min(shared, self._prompt.shape[1] - 1)].tolist()
        keys = chain_keys(tokens, self._namespace.spec.layout.block_tokens)
        match = self._client.lookup(self._namespace, keys, lease_ms=lease_ms) if keys else None
        return match if match is not None and match.num_blocks else None

    def _begin_with(self, match: Match, num_tokens: int) -> None:
        """Takes note of the prefix that the layers now begin with."""
        self.prefix_tokens = num_tokens
        num_blocks = num_tokens // self._namespace.spec.layout.block_tokens
        self.tiers = tuple(sorted(set(match.tiers[:num_blocks])))

    def _go_on_without(self, error: PolarCacheError) -> None:
        """Takes note of a failure, or raises it."""
        if self._on_failure == "raise" or isinstance(error, _WRONG_CALLS):
            raise error
        self.failure = error
        _log.warning("going on without the cache service: %s: %s", type(error).__name__, error)

    def _rows_here(self) -> int:
        """Rows of the local keys: the prompt's, each as often as `generate` repeated it."""
        return int(self.layers[0].keys.shape[0])

    def _new_layers(self, row: int, num_tokens: int) -> list[LayerTensors]:
        """Keys and values of tokens after the prefix, [T, H, D] a layer, as blocks travel."""
        dtype = getattr(torch, self._namespace.spec.layout.dtype)
        tokens = slice(self._first_local_token(), self._first_local_token() + num_tokens)

        def wanted(states: Tensor) -> Tensor:
            return states[row, :, tokens].transpose(0, 1).to("cpu", dtype).contiguous()

        return [(wanted(layer.keys), wanted(layer.values)) for layer in self.layers]


def release(client: Client, match: Match, error: BaseException | None = None) -> None:
    """Gives a lease back, which may fail, for it ends by itself.

    Args:
        client: Client of the service.
        match: What was leased.
        error: What the lease's last use raised: a service that is gone is not waited for again.
    """
    if isinstance(error, (ServiceUnavailableError, DeadlineError)):
        return
    try:
        client.release(match)
    except PolarCacheError as refusal:
        _log.debug("lease not released: %s", refusal)


def _rows(token_ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids int64 [B, T] on the CPU, from [T] or [B, T]."""
    ids = torch.as_tensor(token_ids).detach().cpu().long()
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or not ids.numel():
        raise InvalidRequestError(f"token_ids {tuple(ids.shape)}: expected [T] or [B, T]")
    return ids
