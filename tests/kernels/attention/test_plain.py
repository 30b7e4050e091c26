import pytest
import torch

from polarcache.kernels import BlockShape, Profile, ShapeError
from polarcache.kernels.attention.merge import merge_states
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.kernels.codec import Codec
from tests.kernels.attention.reference import Stored, attend, store

PROFILES = (
    "exact",
    "k=pair:r4t4:minmax,v=int4",
    "k=pair:r3t3,v=int2",
    "k=pair:r4t4:arc2,v=exact",
    "k=pair:tiers8,v=int4",
    "k=polar,v=polar",
    "recursive",
)


def codec_of(profile: str, heads: int = 2, dim: int = 64, v_dim: int = 64) -> Codec:
    text = "k=recursive,v=recursive" if profile == "recursive" else profile
    shape = BlockShape(128, heads, dim, v_dim, "half", dim)
    return Codec(Profile.parse(text), shape, torch.float16)


def run(
    codec: Codec, query: torch.Tensor, stored: Stored, options: AttentionOptions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = PrefixAttention(codec, query.shape[1], options)
    out = torch.full((*query.shape[:2], codec.shape.v_head_dim), torch.nan)
    lse = torch.full(query.shape[:2], torch.nan)
    attention(query, stored.batch, out, lse)
    return out, lse


def check(
    out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, stored: Stored,
    options: AttentionOptions | None = None, error: float = 2e-3,
) -> None:  # fmt: skip
    expected, expected_lse = attend(query, stored, options or AttentionOptions())
    seen = torch.isfinite(expected_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    assert (out.double() - expected).norm() <= error * expected.norm()
    assert (lse.double() - expected_lse)[seen].abs().max() <= 1e-3
    assert (out[~seen] == 0).all()
    assert (lse[~seen] == -torch.inf).all()


@pytest.mark.parametrize("profile", PROFILES)
def test_attends_to_sequences_of_different_lengths_as_float64_does(profile: str) -> None:
    codec = codec_of(profile)
    stored = store(codec, [300, 1, 0, 128, 700], [2, 1, 1, 3, 1])
    query = torch.randn(8, 6, 64).half()
    check(*run(codec, query, stored), query, stored)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(scale=0.5),
        AttentionOptions(soft_cap=3.0),
        AttentionOptions(window=100),
        AttentionOptions(window=100, sink_tokens=4),
        AttentionOptions(scale=0.3, soft_cap=5.0, window=150, sink_tokens=130),
    ],
)
def test_options_do_what_float64_does(options: AttentionOptions) -> None:
    codec = codec_of("k=pair:r4t4,v=int4")
    # The third sequence lies wholly before its queries' window.
    stored = store(codec, [300, 200, 64], [2, 1, 2], [300, 301, 260, 900, 70])
    query = torch.randn(5, 4, 64).half()
    check(*run(codec, query, stored, options), query, stored, options)


@pytest.mark.parametrize(
    ("dim", "v_dim", "heads", "query_heads"), [(96, 64, 1, 7), (128, 32, 3, 3)]
)
def test_shapes(dim: int, v_dim: int, heads: int, query_heads: int) -> None:
    codec = codec_of("k=pair:r4t4,v=int4", heads, dim, v_dim)
    stored = store(codec, [200], [1])
    query = torch.randn(1, query_heads, dim).bfloat16()
    check(*run(codec, query, stored), query, stored)


def test_peaked_and_equal_scores() -> None:
    codec = codec_of("k=pair:r4t4,v=int4")
    stored = store(codec, [500, 500], [1, 1])
    query = 20 * torch.randn(2, 4, 64).half()
    query[1] = 0
    out, lse = run(codec, query, stored)
    check(out, lse, query, stored, error=5e-3)
    assert torch.allclose(lse[1], torch.tensor(500.0).log())


def test_states_of_parts_merge_to_the_state_of_the_whole() -> None:
    codec = codec_of("k=pair:r4t4,v=int4")
    whole = store(codec, [384], [2])
    query = torch.randn(2, 4, 64).half()
    parts = []
    for first, count in ((0, 1), (1, 2), (3, 0)):
        batch = whole.batch
        table = batch.page_table[:, first : first + max(count, 1)].contiguous()
        if count == 0:
            table = batch.page_table[:, :1].contiguous()
        length = torch.tensor([count * 128], dtype=torch.int32)
        part = Stored(type(batch)(batch.memory, table, batch.slice_offset, length,
                                  batch.query_starts, 2), [], [])  # fmt: skip
        parts.append(run(codec, query, part))
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_states(*merged, *part)
    check(*merged, query, whole)


def test_empty_states_merge_to_an_empty_state() -> None:
    out = torch.full((3, 8), torch.nan)
    lse = torch.full((3,), -torch.inf)
    merged, merged_lse = merge_states(out, lse, out, lse)
    assert (merged == 0).all()
    assert (merged_lse == -torch.inf).all()


def test_bad_calls_name_what_was_expected() -> None:
    codec = codec_of("k=pair:r4t4,v=int4")
    stored = store(codec, [128], [1])
    query = torch.zeros(1, 4, 64)
    out, lse = torch.empty(1, 4, 64), torch.empty(1, 4)
    with pytest.raises(ShapeError, match="multiple of 2 KV heads"):
        PrefixAttention(codec, 3)
    with pytest.raises(ShapeError, match="expected a window"):
        AttentionOptions(sink_tokens=4)
    with pytest.raises(ShapeError, match="positions missing"):
        PrefixAttention(codec, 4, AttentionOptions(window=3))(query, stored.batch, out, lse)
    with pytest.raises(ShapeError, match="query"):
        PrefixAttention(codec, 4)(query[:, :2], stored.batch, out, lse)
    with pytest.raises(ShapeError, match="float32"):
        PrefixAttention(codec, 4)(query, stored.batch, out.half(), lse)
