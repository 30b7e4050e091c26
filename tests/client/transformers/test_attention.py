"""The attention function alone, against float64 over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polarcache.client.transformers import _attention
from polarcache.client.transformers._attention import (
    Scoring,
    attend_plainly,
    mark,
    polarcache_attention,
)
from polarcache.proto.errors import InvalidRequestError, UnsupportedError

PREFIX, LOCAL, HEADS, KV_HEADS, DIM = 23, 9, 6, 2, 16
# Rounding of fp32 sums of 32 terms of order 1.
FP32_TOLERANCE = 1e-5
FP16_TOLERANCE = 2e-3


class TensorPrefix:
    """A prefix that is at hand."""

    num_tokens = PREFIX

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def attend(self, query: Tensor, scoring: Scoring, position: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(position, position + query.shape[2])
        mask = torch.ones(query.shape[2], PREFIX, dtype=torch.bool)
        if scoring.window:
            mask = torch.arange(PREFIX) > positions[:, None] - scoring.window
        return attend_plainly(query, self._keys, self._values, mask, scoring)


def tensors(num_queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, HEADS, num_queries, DIM, generator=generator)
    k = torch.randn(1, KV_HEADS, PREFIX + LOCAL, DIM, generator=generator).repeat(2, 1, 1, 1)
    v = torch.randn(1, KV_HEADS, PREFIX + LOCAL, DIM, generator=generator).repeat(2, 1, 1, 1)
    k[1, :, PREFIX:] += 1  # Rows share the prefix alone.
    return q.to(dtype), k.to(dtype), v.to(dtype)


def expected(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, hidden: Tensor | None = None
) -> Tensor:
    """[B, T, Hq, D] in float64; queries are the last tokens."""
    q, k, v = q.double(), k.double(), v.double()
    share = HEADS // KV_HEADS
    scores = q @ k.repeat_interleave(share, 1).transpose(2, 3) * scoring.scale
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    token = torch.arange(k.shape[2])
    position = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    out_of_sight = token > position
    if scoring.window:
        out_of_sight |= token <= position - scoring.window
    if hidden is not None:
        out_of_sight = out_of_sight | hidden
    weights = scores.masked_fill(out_of_sight, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(share, 1)).transpose(1, 2)


def local_mask(num_queries: int, window: int) -> Tensor:
    """What transformers makes for the local tokens [1, 1, T, S]."""
    position = torch.arange(LOCAL - num_queries, LOCAL)[:, None]
    token = torch.arange(LOCAL)
    return ((token <= position) & (token > position - (window or 1000)))[None, None]


@pytest.mark.parametrize("num_queries", [1, 4, LOCAL], ids=["T1", "T4", "T9"])
@pytest.mark.parametrize("scoring", [Scoring(0.25), Scoring(0.5, 2.0), Scoring(0.25, 0.0, 12)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.float16, FP16_TOLERANCE)]
)
def test_prefix_and_local_tokens_merge_to_attention_over_all(
    monkeypatch: pytest.MonkeyPatch, num_queries: int, scoring: Scoring, dtype: torch.dtype,
    tolerance: float,
) -> None:  # fmt: skip
    # Few enough scores at a time that queries are taken in parts.
    monkeypatch.setattr(_attention, "_CHUNK_SCORES", 2 * HEADS * LOCAL * 2)
    q, k, v = tensors(num_queries, dtype)
    prefix = TensorPrefix(k[:1, :, :PREFIX], v[:1, :, :PREFIX])
    mask = local_mask(num_queries, scoring.window)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    masks: list[Tensor | None] = [mask, additive]
    if num_queries in (1, LOCAL) and not scoring.window:
        masks.append(None)
    for given in masks:
        out, _ = polarcache_attention(
            torch.nn.Module(), q, mark(k[:, :, PREFIX:], prefix), v[:, :, PREFIX:], given,
            scaling=scoring.scale, softcap=scoring.soft_cap or None,
            sliding_window=scoring.window or None,
        )  # fmt: skip
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(), expected(q, k, v, scoring), atol=tolerance, rtol=tolerance
        )


def test_padded_local_tokens_stay_unseen() -> None:
    q, k, v = tensors(1, torch.float32)
    prefix = TensorPrefix(k[:1, :, :PREFIX], v[:1, :, :PREFIX])
    mask = local_mask(1, 0).repeat(2, 1, 1, 1)
    mask[1, ..., 2:5] = False
    hidden = torch.zeros(2, 1, 1, PREFIX + LOCAL, dtype=torch.bool)
    hidden[1, ..., PREFIX + 2 : PREFIX + 5] = True
    out, _ = polarcache_attention(
        torch.nn.Module(), q, mark(k[:, :, PREFIX:], prefix), v[:, :, PREFIX:], mask
    )
    reference = expected(q, k, v, Scoring(DIM**-0.5), hidden)
    torch.testing.assert_close(out.double(), reference, atol=FP32_TOLERANCE, rtol=0)


def test_where_nothing_is_seen_the_state_is_empty() -> None:
    q, k, v = tensors(3, torch.float32)
    out, lse = attend_plainly(q, k, v, torch.zeros(3, k.shape[2], dtype=torch.bool), Scoring(1.0))
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dropout": 0.1}, UnsupportedError),
        ({"s_aux": torch.zeros(HEADS)}, UnsupportedError),
        ({"position_bias": torch.zeros(1)}, UnsupportedError),
        ({"attention_mask": torch.ones(1, 1, 1, PREFIX + LOCAL)}, InvalidRequestError),
    ],
    ids=["dropout", "sinks", "bias", "mask"],
)
def test_what_would_change_the_weights_is_refused(
    change: dict[str, Any], error: type[Exception]
) -> None:
    q, k, v = tensors(1, torch.float32)
    prefix = TensorPrefix(k[:1, :, :PREFIX], v[:1, :, :PREFIX])
    arguments = {"attention_mask": None, **change}
    with pytest.raises(error):
        polarcache_attention(
            torch.nn.Module(), q, mark(k[:, :, PREFIX:], prefix), v[:, :, PREFIX:], **arguments
        )
