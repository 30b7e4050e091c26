import dataclasses
import math

import pytest
import torch

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.kernels.codec import Codec
from tests.kernels.attention.reference import Stored, attend, store

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROFILES = [
    "exact",
    "k=pair:r4t4:minmax,v=int4",
    "k=pair:r4t4,v=int2",
    "k=pair:r3t3:g32,v=int4:g16",
    "k=pair:r2t3:minmax:g64,v=exact",
    "k=pair:r4t4:arc2,v=int4",
    "k=pair:r3t4:arc2:g64,v=int2:g16",
    "k=exact,v=int4",
    "k=polar,v=polar",
    "k=polar:b6,v=int4",
    "k=pair:r4t4,v=polar:b5",
    "k=pair:tiers6,v=recursive:kmeans",
    "k=recursive,v=recursive:log8",
    "k=recursive:deep,v=recursive:deep",
]
FAST = ["k=pair:r4t4:minmax,v=int4", "k=pair:r4t4:arc2,v=int4", "k=pair:r3t3,v=int4"]
SHAPES = [
    pytest.param(BlockShape(128, 2, 64, 64, "half", 64), id="T128-H2-D64"),
    pytest.param(BlockShape(128, 1, 80, 96, "interleaved", 80), id="T128-H1-D80-Dv96-interleaved"),
    pytest.param(BlockShape(256, 3, 96, 64, "half", 48), id="T256-H3-D96-Dv64-rotary48"),
    pytest.param(BlockShape(128, 4, 128, 128, "half", 128), id="T128-H4-D128"),
    pytest.param(BlockShape(64, 2, 128, 80, "interleaved", 64), id="T64-H2-D128-Dv80"),
    pytest.param(BlockShape(128, 1, 256, 128, "half", 0), id="T128-H1-D256-Dv128-no-rope"),
    pytest.param(BlockShape(128, 1, 64, 256, "half", 64), id="T128-H1-D64-Dv256"),
]
OPTIONS = [
    AttentionOptions(scale=0.05),
    AttentionOptions(soft_cap=3.0),
    AttentionOptions(window=100),
    AttentionOptions(window=100, sink_tokens=4),
    AttentionOptions(scale=0.03, soft_cap=5.0, window=150, sink_tokens=130),
]


def codec_of(text: str, shape: BlockShape, dtype: torch.dtype = torch.float16) -> Codec:
    return Codec(Profile.parse(text), shape, dtype)


def run(
    codec: Codec, query: torch.Tensor, stored: Stored, options: AttentionOptions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = PrefixAttention(codec, query.shape[1], options)
    out = torch.full((*query.shape[:2], codec.shape.v_head_dim), math.nan, device="cuda")
    lse = torch.full(query.shape[:2], math.nan, device="cuda")
    batch = stored.batch
    size = attention.workspace_bytes(len(query), batch.num_sequences, batch.page_table.shape[1])
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    on_device = query.cuda()
    # The first call on a device makes tables of some codecs there.
    attention(on_device, batch, out, lse, workspace)
    out.fill_(math.nan), lse.fill_(math.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(on_device, batch, out, lse, workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return out.cpu(), lse.cpu()


def check(
    codec: Codec, query: torch.Tensor, stored: Stored,
    options: AttentionOptions | None = None, error: float = 2e-3, lse_error: float = 1e-3,
) -> None:  # fmt: skip
    out, lse = run(codec, query, stored, options)
    expected, expected_lse = attend(query, stored, options or AttentionOptions())
    seen = torch.isfinite(expected_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    assert (out.double() - expected).norm() <= error * expected.norm()
    assert (lse.double() - expected_lse)[seen].abs().max() <= lse_error
    assert (out[~seen] == 0).all()
    assert (lse[~seen] == -torch.inf).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "text",
    ["exact", "k=pair:r4t4:g64,v=int4", "k=pair:r3t3:arc2:g64,v=int2:g16", "k=polar,v=polar:b6"],
)
def test_shapes(text: str, shape: BlockShape) -> None:
    codec = codec_of(text, shape)
    stored = store(codec, [300, 1, 0, 128, 1000], [2, 1, 1, 3, 1], device="cuda")
    # One token carries the rounding of its keys to fp16, which the pair codecs compute exactly.
    lse_error = 2e-3 if "k=polar" in text else 1e-3
    query = torch.randn(8, 3 * shape.kv_heads, shape.head_dim).half()
    check(codec, query, stored, lse_error=lse_error)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("text", FAST)
def test_few_tokens(text: str, rows: int) -> None:
    codec = codec_of(text, BlockShape(128, 2, 128, 128, "half", 128))
    lengths = [1] * 8 + [2, 3, 16, 17, 127, 128, 0, 129]
    stored = store(codec, lengths, [rows] * len(lengths), device="cuda")
    query = torch.randn(rows * len(lengths), 8, 128).half()
    check(codec, query, stored)
    check(codec, 20 * query, stored, error=5e-3, lse_error=5e-2)


@pytest.mark.parametrize("share", [1, 2, 3, 4, 6, 7, 8, 16])
def test_query_heads_of_a_kv_head(share: int) -> None:
    codec = codec_of("k=pair:r4t4,v=int4", BlockShape(128, 2, 128, 128, "half", 128))
    stored = store(codec, [700, 257], [1, 3], device="cuda")
    check(codec, torch.randn(4, 2 * share, 128).half(), stored)


@pytest.mark.parametrize("text", PROFILES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query", DTYPES, ids=str)
def test_dtypes(text: str, dtype: torch.dtype, query: torch.dtype) -> None:
    codec = codec_of(text, BlockShape(128, 2, 128, 64, "half", 128), dtype)
    stored = store(codec, [500, 100], [2, 1], device="cuda")
    check(codec, torch.randn(3, 8, 128).to(query), stored)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_do_what_float64_does(options: AttentionOptions) -> None:
    codec = codec_of("k=pair:r4t4,v=int4", BlockShape(128, 2, 64, 64, "half", 64))
    # The third sequence lies wholly before its queries' window.
    stored = store(codec, [300, 200, 64], [2, 1, 2], [300, 301, 260, 900, 70], device="cuda")
    check(codec, torch.randn(5, 4, 64).half(), stored, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FAST)
def test_rows_of_a_shared_prefix(text: str, dtype: torch.dtype) -> None:
    codec = codec_of(text, BlockShape(256, 2, 128, 128, "half", 128))
    # Up to 264 query columns of a KV head, none of a third sequence's tokens.
    stored = store(codec, [9000, 40, 0, 700], [16, 66, 5, 9], device="cuda")
    query = torch.randn(96, 8, 128).to(dtype)
    check(codec, query, stored)
    check(codec, 20 * query, stored, error=5e-3, lse_error=1e-1)
    check(codec, query, stored, AttentionOptions(soft_cap=3.0))
    known = dataclasses.replace(stored.batch, known_lengths=[9000, 40, 0, 700])
    check(codec, query, dataclasses.replace(stored, batch=known))


@pytest.mark.parametrize("text", PROFILES)
def test_long_sequences_and_peaked_scores(text: str) -> None:
    codec = codec_of(text, BlockShape(128, 4, 128, 128, "half", 128))
    # Hundreds of heads: the error of a peaked one hangs on two tokens, so that few heads scatter.
    lengths = [9000, 4096, *[1000] * 22]
    stored = store(codec, lengths, [1] * len(lengths), device="cuda")
    query = torch.randn(len(lengths), 16, 128).half()
    check(codec, query, stored)
    check(codec, 20 * query, stored, error=5e-3, lse_error=1e-1)
    _, lse = run(codec, 0 * query, stored)
    assert torch.allclose(lse[0], torch.tensor(9000.0).log())


def test_a_captured_call_reads_lengths_when_it_is_replayed() -> None:
    codec = codec_of("k=pair:r4t4,v=int4", BlockShape(128, 2, 128, 128, "half", 128))
    stored = store(codec, [2000, 1500], [1, 1], device="cuda")
    query = torch.randn(2, 8, 128, device="cuda", dtype=torch.float16)
    attention = PrefixAttention(codec, 8)
    out = torch.full((2, 8, 128), math.nan, device="cuda")
    lse = torch.full((2, 8), math.nan, device="cuda")
    size = attention.workspace_bytes(2, 2, stored.batch.page_table.shape[1])
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    attention(query, stored.batch, out, lse, workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(query, stored.batch, out, lse, workspace)
    stored.batch.lengths.copy_(torch.tensor([130, 0], dtype=torch.int32))
    query.copy_(torch.randn(2, 8, 128))
    stored.keys = [stored.keys[0][:130], stored.keys[1][:0]]
    stored.values = [stored.values[0][:130], stored.values[1][:0]]
    out.fill_(math.nan)
    graph.replay()
    expected, expected_lse = attend(query.cpu(), stored, AttentionOptions())
    assert (out.cpu().double() - expected).norm() <= 2e-3 * expected.norm()
    assert torch.equal(torch.isfinite(lse.cpu()), torch.isfinite(expected_lse))
