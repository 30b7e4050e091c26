"""Scores of pair-coded keys by look-up, as published: plain torch, for comparison.

Source: arXiv 2502.00527, decoding. With x = r cos a and y = r sin a of a pair, q.k is the sum over
pairs of r (q_x cos a + q_y sin a), and a is one of 2^t angles of its group and pair. The table of
these 2^t numbers is made once for a query, group and pair; a token then costs a look-up and a
multiplication a pair, and no key is ever decoded. Every query row and head needs its own table,
which is why `flash.py` decodes: there all rows of a KV head share the decoded keys.
"""

import torch
from torch import Tensor

from polarcache.kernels.layout import BlockShape
from polarcache.kernels.options import Pair

__all__ = ["lookup_scores"]


def lookup_scores(
    query: Tensor, codes: Tensor, parameters: Tensor, codec: Pair, shape: BlockShape
) -> Tensor:
    """Returns q.k of queries with the keys of one slice, unscaled.

    Args:
        query: [R, Hq, D], any float dtype; head h reads KV head h // (Hq / Hkv).
        codes: uint8 [T, Hkv, P], radius code << angle_bits | angle code.
        parameters: fp16 [G, 4, Hkv, P]: radius min, radius scale, angle zero, angle scale.
        codec: bits and group.
        shape: pairing and rotary_dim.

    Returns:
        fp32 [R, Hq, T].
    """
    share = query.shape[1] // shape.kv_heads
    first = query.new_empty((*query.shape[:2], shape.pairs), dtype=torch.float32)
    second = torch.empty_like(first)
    for pairs, first_channels, second_channels in shape.pair_channels():
        first[..., pairs] = query[..., first_channels].float()
        second[..., pairs] = query[..., second_channels].float()
    scores = first.new_empty((*query.shape[:2], shape.tokens))
    steps = torch.arange(1 << codec.angle_bits, device=query.device) + 0.5
    for group, (radius_zero, radius_scale, angle_zero, angle_scale) in enumerate(
        parameters.float()
    ):
        tokens = slice(group * codec.group_tokens, (group + 1) * codec.group_tokens)
        angle = angle_zero.unsqueeze(-1) + steps * angle_scale.unsqueeze(-1)  # [Hkv, P, 2^t]
        cosine, sine = (
            x.repeat_interleave(share, 0).unsqueeze(0) for x in (angle.cos(), angle.sin())
        )
        table = first.unsqueeze(-1) * cosine + second.unsqueeze(-1) * sine  # [R, Hq, P, 2^t]
        own = codes[tokens].permute(1, 2, 0).repeat_interleave(share, 0)  # [Hq, P, g]
        radius = (own >> codec.angle_bits).float() + 0.5
        radius *= radius_scale.repeat_interleave(share, 0).unsqueeze(-1)
        radius += radius_zero.repeat_interleave(share, 0).unsqueeze(-1)
        index = (own & ((1 << codec.angle_bits) - 1)).long()
        found = table.gather(3, index.unsqueeze(0).expand(query.shape[0], -1, -1, -1))
        scores[..., tokens] = (found * radius).sum(2)
    return scores
