"""Messages of an Attend stream on the local socket: fixed structs, tensors in shared memory.

The stream is opened as the others are (`polarcache.proto.local`), with frames of AttendRequest and
AttendResponse. Then every message is, after its 4-byte length,

    worker -> service   `ASK`: the fields of AttendRequest; position -1 means unset; the queries
                        lie in the shared memory at `offset`, in a place of `length` bytes
    service -> worker   `ANSWER` and its fields: `out` and, right after it, `lse` lie where the
                        queries lay
                        `REFUSAL`, the request's id, and an error as `ERROR` has it; the stream
                        goes on
                        `ERROR` and an error; the stream is over

all little-endian. Parsing a protobuf message at both ends would cost as much as the socket itself.
"""

from __future__ import annotations

import struct

__all__ = ["ANSWER", "ANSWER_FIELDS", "ASK", "LENGTH", "REFUSAL", "REFUSAL_ID"]

LENGTH = struct.Struct("<I")
# request_id, layer, num_tokens, position, timeout_ms, offset, length
ASK = struct.Struct("<QIIqIQQ")
ANSWER, REFUSAL = b"A", b"R"
# request_id, queue_ns, kernel_ns, batch_requests
ANSWER_FIELDS = struct.Struct("<QQQI")
REFUSAL_ID = struct.Struct("<Q")
