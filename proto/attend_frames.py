"""Frames of the Attend stream: protobuf messages whose tensors are never parsed.

As in `polarcache.proto.frames`, a frame is an ordinary serialized `AttendRequest` or
`AttendResponse`, which any language's stub reads and writes. Here the few fields of a request or
an answer are written by hand before the tensors (fields 14 and 15), and the tensors of long
messages are sliced out of the received bytes as buffers.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from polarcache.proto import errors
from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.frames import Buffer
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = [
    "error_named",
    "join_request",
    "join_response",
    "refusal",
    "split_request",
    "split_response",
]

MessageT = TypeVar("MessageT", bound=Message)

_OUT_TAG, _LSE_TAG, _QUERIES_TAG = 14 << 3 | 2, 15 << 3 | 2, 15 << 3 | 2
_FIXED64, _FIXED32 = 1, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
# Each value after its one-byte tag.
_REQUEST = struct.Struct("<BQBIBIBI")
_POSITION = struct.Struct("<BI")
_RESPONSE = struct.Struct("<BQBQBQBI")
_NOTHING = memoryview(b"")
# A copy of so little costs less than looking for the tensors in Python.
_SMALL_BYTES = 1 << 16


def join_request(
    request_id: int, layer: int, num_tokens: int, position: int, timeout_ms: int, queries: Buffer
) -> bytes:
    """A serialized AttendRequest.

    Args:
        request_id: As in AttendRequest.
        layer: As in AttendRequest.
        num_tokens: As in AttendRequest.
        position: As in AttendRequest, -1 to leave it unset.
        timeout_ms: As in AttendRequest.
        queries: Bytes of the queries.
    """
    head = _REQUEST.pack(
        2 << 3 | _FIXED64, request_id,
        3 << 3 | _FIXED32, layer,
        4 << 3 | _FIXED32, num_tokens,
        6 << 3 | _FIXED32, timeout_ms,
    )  # fmt: skip
    place = _POSITION.pack(5 << 3 | _FIXED32, position) if position >= 0 else b""
    return b"".join((head, place, _start(_QUERIES_TAG, len(queries)), queries))


def join_response(
    request_id: int,
    queue_ns: int,
    kernel_ns: int,
    batch_requests: int,
    out: Buffer,
    lse: Buffer,
) -> bytes:
    """A serialized AttendResponse.

    Args:
        request_id: As in AttendResponse.
        queue_ns: As in AttendResponse.
        kernel_ns: As in AttendResponse.
        batch_requests: As in AttendResponse.
        out: Bytes of out.
        lse: Bytes of lse.
    """
    head = _RESPONSE.pack(
        1 << 3 | _FIXED64, request_id,
        4 << 3 | _FIXED64, queue_ns,
        5 << 3 | _FIXED64, kernel_ns,
        6 << 3 | _FIXED32, batch_requests,
    )  # fmt: skip
    return b"".join((head, _start(_OUT_TAG, len(out)), out, _start(_LSE_TAG, len(lse)), lse))


def split_request(frame: bytes) -> tuple[pb.AttendRequest, memoryview]:
    """Parses a request without copying its queries, unless they are small.

    Returns:
        The request, and its queries as a view, empty where they are missing.

    Raises:
        InvalidRequestError: The bytes are no request.
    """
    if len(frame) <= _SMALL_BYTES:
        message = _parse(pb.AttendRequest, frame)
        return message, memoryview(message.queries)
    message, tensors = _split(pb.AttendRequest, frame, (_QUERIES_TAG,))
    return message, tensors.get(_QUERIES_TAG, _NOTHING)


def split_response(frame: bytes) -> tuple[pb.AttendResponse, memoryview, memoryview]:
    """Parses a response without copying its tensors, unless they are small.

    Returns:
        The response, and its `out` and `lse` as views, empty where they are missing.

    Raises:
        InvalidRequestError: The bytes are no response.
    """
    if len(frame) <= _SMALL_BYTES:
        message = _parse(pb.AttendResponse, frame)
        return message, memoryview(message.out), memoryview(message.lse)
    message, tensors = _split(pb.AttendResponse, frame, (_OUT_TAG, _LSE_TAG))
    return message, tensors.get(_OUT_TAG, _NOTHING), tensors.get(_LSE_TAG, _NOTHING)


def refusal(request_id: int, error: errors.PolarCacheError) -> bytes:
    """The response that tells a worker why a request has no answer."""
    told = pb.AttendError(reason=type(error).__name__, message=str(error))
    return pb.AttendResponse(request_id=request_id, error=told).SerializeToString()


def error_named(reason: str, message: str) -> errors.PolarCacheError:
    """The error that an AttendError stands for."""
    error_class = getattr(errors, reason) if reason in errors.__all__ else errors.InternalError
    error: errors.PolarCacheError = error_class(message)
    return error


def _parse(message_class: type[MessageT], frame: bytes) -> MessageT:
    try:
        return message_class.FromString(frame)
    except DecodeError as error:
        raise InvalidRequestError(f"malformed {message_class.__name__}: {error}") from error


def _split(
    message_class: type[MessageT], frame: bytes, tags: tuple[int, ...]
) -> tuple[MessageT, dict[int, memoryview]]:
    view = memoryview(frame)
    tensors: dict[int, memoryview] = {}
    rest: list[memoryview] = []
    kept_from = position = 0
    try:
        while position < len(frame):
            start = position
            tag, position = _read_varint(frame, position)
            wire_type = tag & 7
            if wire_type == 0:
                _, position = _read_varint(frame, position)
            elif wire_type == 2:
                length, position = _read_varint(frame, position)
                position += length
                if tag in tags and position <= len(frame):
                    tensors[tag] = view[position - length : position]
                    rest.append(view[kept_from:start])
                    kept_from = position
            else:
                position += _FIXED_BYTES[wire_type]
        rest.append(view[kept_from:])
        return _parse(message_class, b"".join(rest)), tensors
    except (IndexError, KeyError) as error:
        raise InvalidRequestError(f"malformed {message_class.__name__}: {error}") from error


@lru_cache(maxsize=64)
def _start(tag: int, length: int) -> bytes:
    """The tag and length of a field of bytes; a stream's messages have few lengths."""
    out = bytearray((tag,))
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)


def _read_varint(frame: bytes, position: int) -> tuple[int, int]:
    byte = frame[position]
    position += 1
    if byte < 0x80:
        return byte, position
    value, shift = byte & 0x7F, 7
    while shift < 64:
        byte = frame[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise IndexError(f"a varint of more than ten bytes before byte {position}")
