"""Merges attention over disjoint sets of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from polarcache.kernels.errors import ShapeError

__all__ = ["merge_states"]


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the attention over the union of two disjoint sets of tokens.

    With lse = log(e^lse_a + e^lse_b), out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse), in
    fp32. A state of no token has lse -inf; its `out` is not read, whatever it holds.

    Args:
        out_a: [..., Dv], any float dtype.
        lse_a: [...] fp32, natural logarithm of the sum of exp of the scaled scores.
        out_b: like out_a.
        lse_b: like lse_a.

    Returns:
        (out fp32 [..., Dv], lse fp32 [...]). Of two empty states: zeros and -inf.

    Raises:
        ShapeError: shapes differ from the above.
    """
    if not (out_a.shape == out_b.shape and lse_a.shape == lse_b.shape == out_a.shape[:-1]):
        raise ShapeError(
            f"out {tuple(out_a.shape)} and {tuple(out_b.shape)}, lse {tuple(lse_a.shape)} and "
            f"{tuple(lse_b.shape)}: expected [..., Dv] twice and [...] twice"
        )
    lse_a, lse_b = lse_a.float(), lse_b.float()
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros(out_a.shape, dtype=torch.float32, device=out_a.device)
    for part, own in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(own - lse).unsqueeze(-1)
        some = torch.isfinite(own).unsqueeze(-1)
        out = torch.where(some, out + part.float() * weight, out)
    return out, lse
