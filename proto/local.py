"""The local socket: a worker and a service on one host, payloads in memory that they share.

Over a unix socket, whose path the service tells over gRPC (`DescribeResponse.local_socket`):

    worker -> service   8 bytes: size of the shared memory, little-endian, with a memfd of that
                        size, sealed against shrinking and growing, as ancillary data
    service -> worker   32 bytes: the boot id in hex; the worker closes if it is another one's

then any number of calls, one at a time, in messages of a 4-byte little-endian length and a body.
The first body of a call is one byte, `STORE`, `RETRIEVE` or `ATTEND`, and the first frame of that
stream; the following ones are the stream's frames, whose payloads lie in the shared memory
(`region`). A worker ends an Attend stream by closing the connection.
A body of the service begins with one byte: `FRAME`, or `ERROR`, upon which follow the name of the
error class, a zero byte and the message, and the service closes the connection.
"""

from __future__ import annotations

import socket
import struct

from polarcache.proto import errors

__all__ = [
    "ATTEND",
    "BOOT_ID_BYTES",
    "ERROR",
    "FRAME",
    "RETRIEVE",
    "SIZE",
    "STORE",
    "error_body",
    "error_of",
    "receive_body",
    "receive_exactly",
    "send_body",
]

STORE, RETRIEVE, ATTEND = b"S", b"R", b"A"
FRAME, ERROR = b"F", b"E"
SIZE = struct.Struct("<Q")
BOOT_ID_BYTES = 32
_LENGTH = struct.Struct("<I")
_MAX_BODY_BYTES = 16 << 20


def send_body(connection: socket.socket, kind: bytes, frame: bytes) -> None:
    """Sends one message."""
    connection.sendall(b"".join((_LENGTH.pack(len(kind) + len(frame)), kind, frame)))


def receive_body(connection: socket.socket) -> bytes:
    """Receives one message's body.

    Raises:
        OSError: The other side closed the connection, or sent no such message.
    """
    (length,) = _LENGTH.unpack(receive_exactly(connection, _LENGTH.size))
    if length > _MAX_BODY_BYTES:
        raise OSError(f"a message of {length} bytes; at most {_MAX_BODY_BYTES} were expected")
    return receive_exactly(connection, length)


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """Receives so many bytes.

    Raises:
        OSError: The other side closed the connection before.
    """
    received = bytearray()
    while len(received) < num_bytes:
        chunk = connection.recv(num_bytes - len(received))
        if not chunk:
            raise ConnectionResetError("the other side closed the connection")
        received += chunk
    return bytes(received)


def error_body(error: errors.PolarCacheError) -> bytes:
    """The body, after its first byte, that carries an error."""
    return type(error).__name__.encode() + b"\0" + str(error).encode()


def error_of(body: bytes) -> errors.PolarCacheError:
    """The error that a body carries, without its first byte."""
    name, _, message = body.partition(b"\0")
    text = name.decode("ascii", "replace")
    error_class = getattr(errors, text) if text in errors.__all__ else errors.InternalError
    error: errors.PolarCacheError = error_class(message.decode("utf-8", "replace"))
    return error
