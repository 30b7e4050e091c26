import pytest
import torch

from polarcache.kernels import BlockShape
from polarcache.kernels.attention.lookup import lookup_scores
from polarcache.kernels.options import Pair
from polarcache.kernels.polar import pair


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (Pair(4, 4, "minmax"), BlockShape(128, 2, 64, 64, "half", 64)),
        (Pair(3, 3, "arc", 32), BlockShape(64, 1, 96, 64, "half", 32)),
        (Pair(2, 5, "arc", 64), BlockShape(128, 2, 80, 64, "interleaved", 80)),
    ],
    ids=str,
)
def test_scores_by_look_up_are_those_of_decoded_keys(codec: Pair, shape: BlockShape) -> None:
    keys = torch.randn(1, shape.tokens, shape.kv_heads, shape.head_dim)
    keys += 2 * torch.randn(shape.head_dim)
    query = torch.randn(3, 3 * shape.kv_heads, shape.head_dim)
    codes, parameters = pair.encode(keys.clone(), codec, shape)
    decoded = torch.empty_like(keys)
    pair.decode(codes, parameters, codec, shape, decoded)
    expected = torch.einsum("rhd,thd->rht", query, decoded[0].repeat_interleave(3, 1))
    scores = lookup_scores(query, codes[0], parameters[0], codec, shape)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)
