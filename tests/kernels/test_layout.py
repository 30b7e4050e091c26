from math import prod

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from polarcache.kernels import BlockShape, PackedLayout, Profile, ShapeError
from polarcache.kernels.bits import pack_field, unpack_field
from polarcache.kernels.layout import Field, key_pair_order, value_order, value_pair_order

PROFILES = [
    "exact",
    "k=pair:r4t4:g32,v=int4",
    "k=pair:r3t3:g32,v=int2:g16",
    "k=pair:r2t5:minmax:g64,v=exact",
    "k=recursive,v=recursive:kmeans",
    "k=exact,v=int4:g16",
    "k=pair:tiers7:g32,v=polar",
    "k=pair:r2t4:arc2:g32,v=exact",
    "k=polar:b6,v=polar:b4",
    "k=recursive:deep,v=recursive:deep",
    "k=recursive:log8,v=recursive:log8:kmeans",
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
        ("k=pair:r4t4:arc2,v=polar", 128, 4.1875, 4.125),
        ("k=pair:tiers8,v=polar:b6", 128, 4.21875, 3.125),
        ("k=pair:tiers6,v=polar:b4", 64, 3.21875, 2.25),
        ("k=polar,v=polar", 128, 4 + 20 / 128 + 32 / 128**2, 4.125),
        ("k=polar:b6,v=polar", 64, 3 + 8 / 64 + 12 / 128 + 32 / (64 * 128), 4.25),
        ("k=recursive:deep,v=recursive:deep", 128, 245 / 64 + 8 / 128 + 16 / 128**2, 245 / 64),
        ("k=recursive:deep,v=recursive:deep", 96, 125 / 32 + 8 / 128 + 16 / (96 * 128), 125 / 32),
        ("k=recursive:log8,v=recursive:log8", 80, 3.375, 3.375),
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
        ("value_parameters", "float16", (2, 128, 8, 1), 16, 135168, 4096),
    ]
    assert layout.slice_bytes == 139264


def chunk_byte(word: int, num_words: int, lane: int) -> int:
    """First byte of a lane's word in its unit: chunks of four words, then of two and one."""
    start = 0
    for size in [4] * (num_words // 4) + [size for size in (2, 1) if num_words % 4 & size]:
        if word < start + size:
            return 128 * start + 4 * (size * lane + word - start)
        start += size
    raise AssertionError("no such word")


def bit_positions(
    field: Field, place: tuple[int, int, int], *, channel_rows: bool = False
) -> list[int]:
    """Bits of one code, lowest first, from the rules of kernels/polar/README.md, section 4."""
    order, shape, bits = field.order, field.shape, field.bits
    token, head, column = place
    tokens, _, columns = shape
    tile, row = divmod(token, 16)
    if order.streams == 4 and channel_rows:  # pairs: rows of the fragment are channels
        steps = columns // 8
        lane = 4 * (column % 8) + row % 8 // 2
        stream, code = row % 2 + 2 * (row // 8), column // 8
    elif order.streams == 4:  # pairs: rows of the fragment are tokens
        steps = columns // 8
        lane = 4 * (row % 8) + column % 4
        stream, code = row // 8 + 2 * (column % 8 // 4), column // 8
    else:  # channels: rows of the fragment are channels
        steps = 4 * (columns // 16)
        lane = 4 * (column % 8) + row % 8 // 2
        stream, code = row % 2, 4 * (column // 16) + 2 * (row // 8) + column % 16 // 8
    tiles = order.stream_codes // steps
    unit_bits = 16 * tiles * columns * bits
    num_words = unit_bits // 1024
    base = head * tokens * columns * bits + tile // tiles * unit_bits
    part = 32 // order.streams
    positions = []
    for bit in range(bits):
        in_stream = bits * (tile % tiles * steps + code) + bit
        in_word = part * stream + in_stream % part
        if order.streams == 4:
            in_word = (in_word + 2) % 32
        word = in_stream // part
        positions.append(base + 8 * chunk_byte(word, num_words, lane) + in_word)
    return positions


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("k=pair:r2t1,v=int4", 3),
        ("k=pair:r3t3,v=int4", 6),
        ("k=pair:r4t4,v=int2:g16", 8),
        ("k=pair:r3t4:arc2,v=polar:b6", 7),
        ("k=polar:b8,v=polar:b4", 8),
    ],
)
def test_codes_lie_in_tensor_core_order(text: str, bits: int, dim: int) -> None:
    shape = BlockShape(128, 3, dim, dim, "half", dim)
    layout = PackedLayout.of(Profile.parse(text), shape, 2)
    random = np.random.default_rng(dim)
    assert layout.fields[[f.name for f in layout.fields].index("key_codes")].bits == bits
    for name in ("key_codes", "value_codes"):
        field = next(field for field in layout.fields if field.name == name)
        assert field.order.streams > 1
        codes = random.integers(0, 1 << field.bits, (1, *field.shape), dtype=np.uint8)
        packed = torch.full((1, layout.slice_bytes), 0xA5, dtype=torch.uint8)
        pack_field(field, torch.from_numpy(codes), packed)
        assert torch.equal(unpack_field(field, packed), torch.from_numpy(codes))
        stored = np.unpackbits(
            packed[0, field.offset : field.offset + field.num_bytes].numpy(), bitorder="little"
        )
        seen = set()
        for _ in range(2000):
            place = tuple(int(random.integers(size)) for size in field.shape)
            positions = bit_positions(field, place, channel_rows=name == "value_codes")
            seen |= set(positions)
            value = sum(int(stored[position]) << i for i, position in enumerate(positions))
            assert value == codes[0][place]
        assert len(seen) > field.bits * 1000


def test_parameters_lie_in_lane_order() -> None:
    layout = PackedLayout.of(Profile.parse("k=pair,v=int4:g32"), shape_of(), 2)
    for name in ("key_parameters", "value_parameters"):
        field = next(field for field in layout.fields if field.name == name)
        numbers = torch.randn((1, *field.shape)).half()
        packed = torch.zeros((1, layout.slice_bytes), dtype=torch.uint8)
        pack_field(field, numbers, packed)
        stored = packed[0, field.offset : field.offset + field.num_bytes].view(torch.float16)
        assert torch.equal(unpack_field(field, packed), numbers)
        if name == "key_parameters":
            by_head = stored.view(8, 1, 4, 8, 16 // 2)  # head, group, kind, pair % 8, pair // 8
            assert by_head[5, 0, 2, 3, 6] == numbers[0, 0, 2, 5, 6 * 8 + 3]
        else:
            by_head = stored.view(8, 8, 4, 4, 2, 2, 2)  # head, tile, group, column, kind, +8, +1
            assert by_head[5, 6, 3, 2, 1, 1, 0] == numbers[0, 1, 6 * 16 + 8 + 4, 5, 3]


def test_orders_that_do_not_fit_a_tile_are_head_major_rows() -> None:
    for tokens, dim in ((8, 128), (24, 128), (64, 80), (32, 96)):
        shape = BlockShape(tokens, 2, dim, dim, "half", dim)
        order = key_pair_order(shape.tokens, shape.kv_heads, shape.pairs)
        assert order.streams == 1
        assert order.axes == (1, 0, 2)
    assert value_order(24, 2, 128).streams == value_pair_order(24, 2, 64).streams == 1


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
