"""The form of a block in Redis: two msgpack objects, a header and the packed bytes.

    header   [MAGIC, RECORD_VERSION, layout_version, namespace_id, block_key, num_bytes, checksum]
    payload  bin32, the packed block

The payload is neither packed nor unpacked by msgpack, only framed, so it is copied once on its
way out and not at all on its way in.
"""

from __future__ import annotations

import msgpack

from polarcache.proto.frames import Buffer, checksum

__all__ = ["RECORD_VERSION", "RecordError", "pack_record", "unpack_record"]

RECORD_VERSION = 1

_MAGIC = "polarcache"
_MAX_HEADER_BYTES = 256
_BIN32 = 0xC6


class RecordError(Exception):
    """A record is not the block that its key names.

    Attributes:
        reason: One word for the counters: "malformed", "version", "identity", "size", "checksum".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"record refused: {reason}")
        self.reason = reason


def pack_record(
    namespace_id: bytes, block_key: bytes, layout_version: int, packed: Buffer
) -> bytes:
    """A record holding one packed block.

    Args:
        namespace_id: Namespace of the block, 16 bytes.
        block_key: Key of the block.
        layout_version: Version of the packed layout.
        packed: The packed block, C-contiguous.
    """
    head = msgpack.packb(
        [
            _MAGIC,
            RECORD_VERSION,
            layout_version,
            namespace_id,
            block_key,
            len(packed),
            checksum(packed),
        ]
    )
    frame = bytes([_BIN32]) + len(packed).to_bytes(4, "big")
    return b"".join((head, frame, packed))


def unpack_record(
    record: bytes, namespace_id: bytes, block_key: bytes, layout_version: int, num_bytes: int
) -> memoryview:
    """The packed block in a record, as a view into it.

    Args:
        record: Bytes from Redis, trusted in nothing.
        namespace_id: Expected namespace.
        block_key: Expected key.
        layout_version: Expected version of the packed layout.
        num_bytes: Expected length of the packed block.

    Raises:
        RecordError: Anything differs from what is expected.
    """
    view = memoryview(record)
    unpacker = msgpack.Unpacker(
        max_buffer_size=_MAX_HEADER_BYTES,
        max_array_len=7,
        max_str_len=16,
        max_bin_len=64,
        max_map_len=0,
        max_ext_len=0,
    )
    unpacker.feed(view[:_MAX_HEADER_BYTES])
    try:
        header = unpacker.unpack()
    except (msgpack.UnpackException, ValueError) as error:
        raise RecordError("malformed") from error
    if not isinstance(header, list) or len(header) != 7 or header[0] != _MAGIC:
        raise RecordError("malformed")
    if header[1:3] != [RECORD_VERSION, layout_version]:
        raise RecordError("version")
    if header[3:5] != [namespace_id, block_key]:
        raise RecordError("identity")
    start = unpacker.tell() + 5
    frame = bytes([_BIN32]) + num_bytes.to_bytes(4, "big")
    if header[5] != num_bytes or view[start - 5 : start] != frame or len(view) - start != num_bytes:
        raise RecordError("size")
    payload = view[start:]
    if checksum(payload) != header[6]:
        raise RecordError("checksum")
    return payload
