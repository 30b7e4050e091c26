"""Frames of the Attend stream: protobuf messages whose tensors are never parsed.

As in `polarcache.proto.frames`, a frame is an ordinary serialized `AttendRequest` or
`AttendResponse`, which any language's stub reads and writes. Here the few fields of a request or
an answer are written by hand before the tensors (fields 14 and 15), and the tensors of long
messages are sliced out of the received bytes as buffers.
"""

from __future__ import annotations

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
_FIXED_BYTES = {1: 8, 5: 4}
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
    head = bytearray()
    for number, value in ((2, request_id), (3, layer), (4, num_tokens), (6, timeout_ms)):
        _append_varint(head, number << 3, value)
    if position >= 0:
        _append_varint(head, 5 << 3, position)
    _append_varint(head, _QUERIES_TAG, len(queries))
    return b"".join((head, queries))


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
    head = bytearray()
    for number, value in ((1, request_id), (4, queue_ns), (5, kernel_ns), (6, batch_requests)):
        _append_varint(head, number << 3, value)
    _append_varint(head, _OUT_TAG, len(out))
    middle = bytearray()
    _append_varint(middle, _LSE_TAG, len(lse))
    return b"".join((head, out, middle, lse))


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


def _append_varint(out: bytearray, tag: int, value: int) -> None:
    """Appends a one-byte tag and a value of at least 0."""
    out.append(tag)
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


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
