"""The attention implementation "polarcache": local tokens, merged with a prefix kept elsewhere.

A cache whose prefix is not local marks the keys that it hands to the model (`mark`); the model
passes them on to the attention function, which so finds the prefix. Keys without a mark go to
PyTorch's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from polarcache.kernels.attention.merge import merge_states
from polarcache.proto.errors import InvalidRequestError, UnsupportedError

__all__ = ["ATTENTION", "LayerPrefix", "Scoring", "attend_plainly", "mark", "register_attention"]

ATTENTION = "polarcache"
_MARK = "_polarcache_prefix"
# Scores computed at a time: bounds the memory of many queries over many tokens.
_CHUNK_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights, as the model's layer asks for it.

    Attributes:
        scale: Factor on q.k before the softmax.
        soft_cap: Scores become cap * tanh(score / cap); 0 means no cap.
        window: A query at position p sees tokens after p - window alone; 0 means all.
    """

    scale: float
    soft_cap: float = 0.0
    window: int = 0


class LayerPrefix(Protocol):
    """The prefix of one layer, before all local tokens."""

    def attend(self, query: Tensor, scoring: Scoring, position: int) -> tuple[Tensor, Tensor]:
        """Attention over the prefix.

        Args:
            query: [B, Hq, T, D] in the model's dtype, RoPE applied.
            scoring: How scores become weights.
            position: Position of the first query; the others follow it.

        Returns:
            Out fp32 [B, Hq, T, Dv] and lse fp32 [B, Hq, T], natural logarithm, on the query's
            device.
        """
        ...

    @property
    def num_tokens(self) -> int:
        """Its tokens."""
        ...


def register_attention() -> None:
    """Makes `attn_implementation="polarcache"` known. Again is harmless."""
    AttentionInterface.register(ATTENTION, polarcache_attention)
    # Without a mask function of its own name an implementation gets no masks at all.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def mark(keys: Tensor, prefix: LayerPrefix) -> Tensor:
    """The same keys, with which `polarcache_attention` finds the prefix before them."""
    marked = keys.view(keys.shape)
    setattr(marked, _MARK, prefix)
    return marked


def polarcache_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a prefix and the local tokens after it.

    Args:
        module: The layer's attention module.
        query: [B, Hq, T, D].
        key: Local keys [B, Hkv, S, D], marked or not.
        value: Local values [B, Hkv, S, Dv].
        attention_mask: [B, 1, T, S] over the local tokens; True, or 0, where a query sees a
            token. None: one query sees all, and of T = S queries each sees itself and before.
        dropout: 0 with a prefix.
        scaling: Factor on q.k before the softmax; None for 1 / sqrt(D).
        softcap: Scores become cap * tanh(score / cap).
        sliding_window: A query at position p sees tokens after p - sliding_window alone.
        **others: What other implementations take; with a prefix nothing that changes weights.

    Returns:
        Out [B, T, Hq, Dv] in the query's dtype, and None.

    Raises:
        UnsupportedError: The model asks for what attention over a prefix cannot do.
        InvalidRequestError: The mask is not of the local tokens.
        PolarCacheError: The prefix is lost.
    """
    prefix: LayerPrefix | None = getattr(key, _MARK, None)
    if prefix is None:
        if softcap is not None:
            others["softcap"] = softcap
        local: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, sliding_window=sliding_window, **others,
        )  # fmt: skip
        return local
    if dropout or others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise UnsupportedError(
            "attention over a prefix that is not local has no dropout, learned sinks or position "
            "bias: use StoredPrefixCache"
        )
    scoring = Scoring(
        scale=scaling or query.shape[-1] ** -0.5,
        soft_cap=softcap or 0.0,
        window=sliding_window or 0,
    )
    num_queries, num_local = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is None and num_queries > 1:
        mask = torch.ones(num_queries, num_local, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.shape[-1] != num_local:
        raise InvalidRequestError(
            f"attention mask of {mask.shape[-1]} tokens: expected the {num_local} local ones"
        )
    position = prefix.num_tokens + num_local - num_queries
    out, _ = merge_states(
        *prefix.attend(query, scoring, position),
        *attend_plainly(query, key, value, mask, scoring),
    )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention with its lse, in fp32.

    Args:
        query: [B, Hq, T, D], any float dtype.
        key: [B or 1, Hkv, S, D], S at least 1.
        value: [B or 1, Hkv, S, Dv].
        mask: [T, S] or [B, 1, T, S]; boolean, True where a query sees a token, or added to the
            scores; None for all. The scoring's window must be in it.
        scoring: How scores become weights.

    Returns:
        Out fp32 [B, Hq, T, Dv] and lse fp32 [B, Hq, T]; where a query sees nothing 0 and -inf.
    """
    batch, heads, num_queries, _ = query.shape
    step = max(1, _CHUNK_SCORES // (batch * heads * key.shape[2]))
    outs, lses = [], []
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        part = None if mask is None else mask[..., rows, :]
        out, lse = _attend_rows(query[:, :, rows], key, value, part, scoring)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, head_dim = query.shape
    kv_heads = key.shape[1]
    # [B, Hkv, share * T, D]: all query heads of a KV head are one matrix product.
    q = query.float().reshape(batch, kv_heads, -1, head_dim) * scoring.scale
    scores = (q @ key.float().transpose(2, 3)).view(batch, heads, num_queries, -1)
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask.float()
    lse = torch.logsumexp(scores, -1)
    seen = torch.where(torch.isfinite(lse), lse, 0.0)
    weights = torch.exp(scores - seen.unsqueeze(-1)).view(batch, kv_heads, -1, key.shape[2])
    out = weights @ value.float()
    return out.view(batch, heads, num_queries, -1), lse
