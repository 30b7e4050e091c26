from math import prod

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polarcache.kernels import BlockShape, PackedLayout, Profile, ShapeError

PROFILES = [
    "exact",
    "k=pair:r4t4:g32,v=int4",
    "k=pair:r3t3:g32,v=int2:g16",
    "k=pair:r2t5:minmax:g64,v=exact",
    "k=recursive,v=recursive:kmeans",
    "k=exact,v=int4:g16",
]
shapes = st.builds(
    lambda tokens, heads, dim, v_dim, pairing, rotary: BlockShape(
        8 * tokens, heads, 16 * dim, 16 * v_dim, pairing, min(2 * rotary, 16 * dim)
    ),
    st.integers(1, 128),
    st.integers(1, 9),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from(["half", "interleaved"]),
    st.integers(0, 128),
)


def shape_of(tokens: int = 128, dim: int = 128, v_dim: int = 128) -> BlockShape:
    return BlockShape(tokens, 8, dim, v_dim, "half", dim)


@given(st.sampled_from(PROFILES), shapes, st.sampled_from([2, 4]))
def test_fields_and_pads_cover_the_slice_exactly_once(
    text: str, shape: BlockShape, element_bytes: int
) -> None:
    try:
        layout = PackedLayout.of(Profile.parse(text), shape, element_bytes)
    except ShapeError:
        assume(False)
    covered = bytearray(layout.slice_bytes)
    for field in layout.fields:
        assert field.offset % 16 == 0
        assert field.num_bytes * 8 == prod(field.shape) * field.bits
        for index in range(field.offset, field.offset + field.num_bytes):
            covered[index] += 1
    for pad in layout.pads():
        assert 0 < pad.stop - pad.start < 16
        for index in range(pad.start, pad.stop):
            covered[index] += 1
    assert set(covered) == {1}
    assert layout.slice_bytes % 16 == 0


@given(shapes)
def test_pair_channels_cover_the_head_exactly_once(shape: BlockShape) -> None:
    channels = list(range(shape.head_dim))
    seen: list[int] = []
    pairs: list[int] = []
    for pair_slice, first, second in shape.pair_channels():
        assert len(channels[first]) == len(channels[second])
        seen += channels[first] + channels[second]
        pairs += list(range(shape.pairs))[pair_slice]
        turned = [channel < shape.rotary_dim for channel in channels[first]]
        assert turned == [channel < shape.rotary_dim for channel in channels[second]]
    assert sorted(seen) == channels
    assert pairs == list(range(shape.pairs))


@pytest.mark.parametrize(
    ("text", "dim", "key_bits", "value_bits"),
    [
        ("k=pair:r4t4,v=int4", 128, 4.25, 4.25),
        ("k=pair:r3t3,v=int2", 128, 3.25, 3.0),
        ("k=pair:r3t5:g64,v=exact", 128, 4.5, 16.0),
        ("k=pair:r2t4:minmax,v=int4:g32", 128, 3.25, 5.0),
        ("k=recursive,v=recursive", 128, 3.875, 3.875),
        ("k=recursive:kmeans,v=int4", 64, 3.875 + 28 * 16 / (128 * 8 * 64), 4.5),
        ("k=exact,v=int4", 80, 16.0, 4.4),
    ],
)
def test_layout_bits_are_exact(text: str, dim: int, key_bits: float, value_bits: float) -> None:
    layout = PackedLayout.of(Profile.parse(text), shape_of(dim=dim, v_dim=dim), 2)
    assert (layout.key_bits, layout.value_bits) == (key_bits, value_bits)
    assert layout.bits == pytest.approx((key_bits + value_bits) / 2, abs=1e-12)


def test_layout_of_the_default_profile_is_frozen() -> None:
    layout = PackedLayout.of(Profile.parse("k=pair,v=int4"), shape_of(), 2)
    assert [(f.name, f.dtype, f.shape, f.bits, f.offset, f.num_bytes) for f in layout.fields] == [
        ("key_codes", "code", (128, 8, 64), 8, 0, 65536),
        ("key_parameters", "float16", (1, 4, 8, 64), 16, 65536, 4096),
        ("value_codes", "code", (128, 8, 128), 4, 69632, 65536),
        ("value_scales", "float16", (128, 8, 1), 16, 135168, 2048),
        ("value_zeros", "float16", (128, 8, 1), 16, 137216, 2048),
    ]
    assert layout.slice_bytes == 139264


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 8, 128, 128, "half", 128),
        (12, 8, 128, 128, "half", 128),
        (1032, 8, 128, 128, "half", 128),
        (128, 0, 128, 128, "half", 128),
        (128, 8, 72, 128, "half", 72),
        (128, 8, 128, 272, "half", 128),
        (128, 8, 128, 128, "none", 128),
        (128, 8, 128, 128, "half", 63),
        (128, 8, 128, 128, "half", 130),
        (128, 8, 128, 128, "half", -2),
    ],
)
def test_block_shape_outside_its_range_is_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="expected"):
        BlockShape(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "shape", "element_bytes"),
    [
        ("k=pair,v=int4", shape_of(tokens=64), 2),
        ("k=pair:g256,v=int4", shape_of(tokens=128), 2),
        ("k=exact,v=int2", shape_of(v_dim=80), 2),
        ("k=exact,v=int4:g24", shape_of(), 2),
        ("exact", shape_of(), 1),
    ],
)
def test_layout_that_does_not_divide_is_refused(
    text: str, shape: BlockShape, element_bytes: int
) -> None:
    with pytest.raises(ShapeError, match="expected"):
        PackedLayout.of(Profile.parse(text), shape, element_bytes)
