"""Frames of the Store and Retrieve streams: a protobuf message whose payload is never parsed.

A frame is an ordinary serialized `StoreRequest` or `RetrieveResponse`, so any language's stub can
read and write it. Here the `payload` field (number 15) is written after the message and sliced
out of the received bytes as a buffer, which spares protobuf's copies of every payload byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import xxhash
from google.protobuf.message import DecodeError, Message

from polarcache.proto.errors import InvalidRequestError

__all__ = ["Buffer", "checksum", "join_frame", "split_frame"]

Buffer = bytes | bytearray | memoryview
MessageT = TypeVar("MessageT", bound=Message)

_PADDING_FIELD, _PAYLOAD_FIELD = 14, 15
_PADDING_TAG = bytes([_PADDING_FIELD << 3 | 2])
_PAYLOAD_TAG = bytes([_PAYLOAD_FIELD << 3 | 2])
_ALIGNMENT_BYTES = 16
_FIXED_BYTES = {1: 8, 5: 4}


def checksum(*parts: Buffer) -> int:
    """xxh3-64, seed 0, of the parts' bytes one after the other."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def join_frame(message: Message, payload: Sequence[Buffer] = ()) -> bytes:
    """Serializes a message and the parts of its payload with one copy of the payload.

    The payload starts at a multiple of 16 bytes: unaligned reads are several times slower.

    Args:
        message: A message whose `payload` field is unset.
        payload: C-contiguous byte buffers.
    """
    head = message.SerializeToString()
    if not payload:
        return head
    start = _PAYLOAD_TAG + _varint(sum(len(part) for part in payload))
    # A padding field takes at least two bytes.
    padding = 2 + -(len(head) + len(start) + 2) % _ALIGNMENT_BYTES
    zeros = _PADDING_TAG + bytes([padding - 2]) + bytes(padding - 2)
    return b"".join((head, zeros, start, *payload))


def split_frame(message_class: type[MessageT], frame: bytes) -> tuple[MessageT, memoryview]:
    """Parses a frame without copying its payload.

    Args:
        message_class: Class of the message.
        frame: Serialized message.

    Returns:
        The message without its payload, and the payload as a view into `frame`, empty when the
        field is missing.

    Raises:
        InvalidRequestError: The bytes are no such message.
    """
    view = memoryview(frame)
    rest: list[memoryview] = []
    payload = view[:0]
    position = 0
    while position < len(view):
        start = position
        tag, position = _read_varint(view, position)
        wire_type = tag & 7
        if wire_type == 0:
            _, position = _read_varint(view, position)
        elif wire_type == 2:
            length, position = _read_varint(view, position)
            position += length
        elif wire_type in _FIXED_BYTES:
            position += _FIXED_BYTES[wire_type]
        else:
            raise InvalidRequestError(f"malformed frame: wire type {wire_type} at byte {start}")
        if position > len(view):
            raise InvalidRequestError(f"malformed frame: cut off after {len(view)} bytes")
        if tag == _PAYLOAD_TAG[0]:
            payload = view[position - length : position]
        else:
            rest.append(view[start:position])
    try:
        return message_class.FromString(b"".join(rest)), payload
    except DecodeError as error:
        raise InvalidRequestError(f"malformed {message_class.__name__}: {error}") from error


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 64:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidRequestError(f"malformed frame: bad varint before byte {position}")
