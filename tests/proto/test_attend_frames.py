"""Frames of the Attend stream are what generated stubs read and write."""

import os

import pytest

from polarcache.proto.attend_frames import (
    error_named,
    join_request,
    join_response,
    refusal,
    split_request,
    split_response,
)
from polarcache.proto.errors import CapacityError, InternalError, InvalidRequestError
from polarcache.proto.v1 import polarcache_pb2 as pb

# Below and above the size from which tensors are not copied.
SIZES = (0, 1, 300, 70_000, 1 << 20)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("position", [-1, 0, 2**31 - 1])
def test_a_request_is_what_the_stub_writes(size: int, position: int) -> None:
    queries = os.urandom(size)
    frame = join_request(2**40, 31, 512, position, 4_500, queries)
    expected = pb.AttendRequest(
        request_id=2**40,
        layer=31,
        num_tokens=512,
        timeout_ms=4_500,
        position=position if position >= 0 else None,
        queries=queries,
    )
    assert pb.AttendRequest.FromString(frame) == expected
    for one in (frame, expected.SerializeToString()):
        request, got = split_request(one)
        assert got == queries
        request.queries = queries
        assert request == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_response_is_what_the_stub_writes(size: int) -> None:
    out, lse = os.urandom(size), os.urandom(size // 64)
    frame = join_response(300, 2, 123_456_789, 17, out, lse)
    expected = pb.AttendResponse(
        request_id=300, queue_ns=2, kernel_ns=123_456_789, batch_requests=17, out=out, lse=lse
    )
    assert pb.AttendResponse.FromString(frame) == expected
    for one in (frame, expected.SerializeToString()):
        response, got_out, got_lse = split_response(one)
        assert (got_out, got_lse) == (out, lse)
        assert (response.request_id, response.kernel_ns) == (300, 123_456_789)


def test_unknown_fields_between_the_tensors_are_skipped() -> None:
    frame = join_response(5, 1, 2, 3, bytes(1 << 17), bytes(1 << 10))
    # Fields 20 (varint), 21 (8 bytes), 22 (4 bytes) and 23 (length 2).
    unknown = b"\xa0\x01\x80\x01" + b"\xa9\x01" + bytes(8) + b"\xb5\x01" + bytes(4)
    unknown += b"\xba\x01\x02ab"
    response, out, lse = split_response(unknown + frame + unknown)
    assert (response.request_id, len(out), len(lse)) == (5, 1 << 17, 1 << 10)


@pytest.mark.parametrize("padding", [b"", bytes(1 << 17)], ids=["short", "long"])
@pytest.mark.parametrize("tail", [b"\x7a\xff", b"\x7b", b"\x88\x01" + b"\xff" * 11, b"\xa9\x01\0"])
def test_damage_is_refused(padding: bytes, tail: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="malformed AttendRequest"):
        split_request(join_request(1, 0, 1, -1, 0, padding) + tail)


def test_a_refusal_carries_its_error() -> None:
    response, out, lse = split_response(refusal(9, CapacityError("too many")))
    assert (response.request_id, len(out), len(lse)) == (9, 0, 0)
    error = error_named(response.error.reason, response.error.message)
    assert type(error) is CapacityError
    assert str(error) == "too many"
    assert type(error_named("SystemExit", "no")) is InternalError
