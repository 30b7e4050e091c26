"""Cases for Triton's interpreter; test_interpreted.py runs them with TRITON_INTERPRET set."""

import math

import pytest
import torch

from polarcache.kernels import BlockShape, Profile, ShapeError
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.attention.portable import PortableAttention
from polarcache.kernels.codec import Codec
from polarcache.kernels.profile import Exact, Pair
from tests.kernels.attention.reference import Stored, attend, store

NUM_SMS = 8
HALF = BlockShape(32, 1, 64, 64, "half", 64)
PROFILES = [
    ("exact", BlockShape(16, 2, 64, 32, "half", 64)),
    ("k=pair:r4t4:minmax:g32,v=int4", HALF),
    ("k=pair:r4t4:g32,v=int4:g16", BlockShape(32, 2, 80, 128, "interleaved", 64)),
    ("k=pair:r3t3:g32,v=int2", BlockShape(64, 2, 64, 64, "half", 32)),
    ("k=pair:r2t3:g32,v=int4:g20", BlockShape(32, 1, 96, 80, "half", 0)),
    ("k=pair:r3t4:arc2:g32,v=int4", BlockShape(32, 2, 64, 96, "half", 64)),
    ("k=exact,v=int4", BlockShape(24, 1, 48, 32, "half", 48)),
    ("k=polar,v=polar", HALF),
    ("k=recursive,v=recursive", BlockShape(32, 1, 64, 128, "half", 64)),
    ("k=recursive:kmeans:seed3,v=recursive:log8", BlockShape(32, 1, 80, 96, "half", 64)),
    ("k=recursive:deep,v=recursive:deep", BlockShape(32, 2, 64, 64, "half", 64)),
    ("k=recursive:log8,v=recursive:kmeans", BlockShape(24, 1, 64, 64, "half", 64)),
    ("k=pair:tiers8:g32,v=int4", HALF),
    ("k=pair:tiers5:g32,v=polar:b6", BlockShape(64, 2, 80, 64, "half", 32)),
    ("k=polar:b5,v=polar:b7", BlockShape(64, 1, 80, 96, "half", 32)),
    ("k=polar:b4,v=int4", BlockShape(32, 1, 128, 64, "interleaved", 128)),
    ("k=exact,v=polar:r4t4", BlockShape(32, 1, 64, 128, "half", 64)),
]
OPTIONS = [
    AttentionOptions(scale=0.5),
    AttentionOptions(soft_cap=3.0),
    AttentionOptions(window=40),
    AttentionOptions(window=40, sink_tokens=5),
    AttentionOptions(scale=0.3, soft_cap=5.0, window=70, sink_tokens=50),
]


def codec_of(text: str, shape: BlockShape, dtype: torch.dtype = torch.float16) -> Codec:
    return Codec(Profile.parse(text), shape, dtype)


def check(
    codec: Codec,
    query: torch.Tensor,
    stored: Stored,
    options: AttentionOptions | None = None,
    error: float = 2e-3,
    num_sms: int = NUM_SMS,
) -> None:
    options = options or AttentionOptions()
    portable = PortableAttention.of(codec, query.shape[1], options, num_sms, fast=False)
    out = torch.full((*query.shape[:2], codec.shape.v_head_dim), math.nan)
    lse = torch.full(query.shape[:2], math.nan)
    size = portable.workspace_bytes(
        len(query), stored.batch.num_sequences, stored.batch.page_table.shape[1]
    )
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)
    portable.attend(query, stored.batch, out, lse, workspace)
    expected, expected_lse = attend(query, stored, options)
    seen = torch.isfinite(expected_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    assert (out.double() - expected).norm() <= error * expected.norm()
    # Few tokens do not average the rounding of keys to fp16, which pair codecs do without.
    wide = isinstance(codec.profile.key, Pair | Exact) or not getattr(codec.profile.key, "tiers", 1)
    largest = (1e-3 if wide else 2e-3) * max(1.0, options.scale * codec.shape.head_dim**0.5)
    assert (lse.double() - expected_lse)[seen].abs().max() <= largest
    assert (out[~seen] == 0).all()
    assert (lse[~seen] == -torch.inf).all()


@pytest.mark.parametrize(("text", "shape"), PROFILES, ids=[text for text, _ in PROFILES])
def test_attends_as_float64_does(text: str, shape: BlockShape) -> None:
    codec = codec_of(text, shape)
    stored = store(codec, [70, 1, 0, 33], [2, 1, 1, 3])
    query = torch.randn(7, 3 * shape.kv_heads, shape.head_dim).half()
    check(codec, query, stored)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_do_what_float64_does(options: AttentionOptions) -> None:
    codec = codec_of("k=pair:g32,v=int4", HALF)
    # The third sequence lies wholly before its queries' window.
    stored = store(codec, [140, 90, 64], [2, 1, 2], [140, 141, 110, 900, 70])
    check(codec, torch.randn(5, 4, 64).half(), stored, options)


def test_rows_of_a_shared_prefix_fill_several_tiles() -> None:
    codec = codec_of("k=pair:g32,v=int4", HALF)
    stored = store(codec, [100, 40], [3, 50])
    check(codec, torch.randn(53, 6, 64).half(), stored)


@pytest.mark.parametrize("num_sms", [0, 64])
def test_any_number_of_splits_gives_the_same(num_sms: int) -> None:
    codec = codec_of("k=pair:g32,v=int4", HALF)
    stored = store(codec, [300, 33], [1, 1])
    check(codec, torch.randn(2, 8, 64).half(), stored, num_sms=num_sms)


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("text", ["exact", "k=pair:g32,v=int4"])
def test_fp32_queries_of_any_size(text: str, size: float) -> None:
    codec = codec_of(text, HALF, torch.float32)
    stored = store(codec, [90], [2])
    query = size * torch.randn(2, 4, 64)
    check(codec, query, stored, AttentionOptions(scale=0.1 / size), error=1e-3)


def test_peaked_and_equal_scores() -> None:
    codec = codec_of("k=pair:g32,v=int4", HALF)
    stored = store(codec, [160, 160], [1, 1])
    query = torch.randn(2, 4, 64).half()
    query[1] = 0
    check(codec, query, stored)
    query = (20 * query.float()).half()
    options = AttentionOptions()
    portable = PortableAttention.of(codec, 4, options, 1, fast=False)
    out, lse = torch.full((2, 4, 64), math.nan), torch.full((2, 4), math.nan)
    workspace = torch.empty(portable.workspace_bytes(2, 2, 10), dtype=torch.uint8)
    portable.attend(query, stored.batch, out, lse, workspace)
    expected, _ = attend(query, stored, options)
    assert (out.double() - expected).norm() <= 5e-3 * expected.norm()
    assert torch.allclose(lse[1], torch.tensor(160.0).log())


def test_a_call_without_its_workspace_names_its_bytes() -> None:
    codec = codec_of("k=pair:g32,v=int4", HALF)
    stored = store(codec, [500], [1])
    portable = PortableAttention.of(codec, 4, AttentionOptions(), NUM_SMS, fast=False)
    with pytest.raises(ShapeError, match="workspace missing"):
        portable.attend(torch.zeros(1, 4, 64), stored.batch, torch.empty(1, 4, 64),
                        torch.empty(1, 4), None)  # fmt: skip
