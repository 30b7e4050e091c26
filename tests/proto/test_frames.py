import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.frames import checksum, join_frame, split_frame
from polarcache.proto.v1 import polarcache_pb2 as pb

PAYLOADS = st.binary(max_size=300)


@given(PAYLOADS, st.lists(st.integers(0, 2**32 - 1), max_size=4))
@settings(derandomize=True, deadline=None)
def test_a_joined_frame_is_what_protobuf_reads(payload: bytes, indices: list[int]) -> None:
    message = pb.StoreRequest(spans=[pb.Span(block_index=i, checksum=i * 7) for i in indices])
    half = len(payload) // 2
    frame = join_frame(message, [payload[:half], memoryview(payload)[half:]])

    parsed = pb.StoreRequest.FromString(frame)

    assert parsed.payload == payload
    assert (len(frame) - len(payload)) % 16 == 0
    assert list(parsed.spans) == list(message.spans)


@given(PAYLOADS, st.booleans())
@settings(derandomize=True, deadline=None)
def test_a_frame_of_protobuf_is_split(payload: bytes, with_region: bool) -> None:
    message = pb.StoreRequest(spans=[pb.Span(block_index=3)], payload=payload)
    if with_region:
        message.region.CopyFrom(pb.RegionRange(offset=1 << 60, length=7))

    split, view = split_frame(pb.StoreRequest, message.SerializeToString())

    assert bytes(view) == payload
    message.ClearField("payload")
    assert split == message


@given(st.binary(max_size=60))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_any_bytes_are_parsed_or_refused(frame: bytes) -> None:
    try:
        split_frame(pb.StoreRequest, frame)
    except InvalidRequestError:
        return


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_frame_is_refused(cut: int) -> None:
    frame = join_frame(pb.StoreRequest(spans=[pb.Span(block_index=1)]), [bytes(100)])
    with pytest.raises(InvalidRequestError, match="malformed frame"):
        split_frame(pb.StoreRequest, frame[:-cut])


def test_the_checksum_of_parts_is_that_of_the_whole() -> None:
    assert checksum(b"polar", b"cache") == checksum(b"polarcache")
