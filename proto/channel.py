"""gRPC options for streams of large messages, the same at both ends."""

from __future__ import annotations

__all__ = ["STREAM_OPTIONS"]

STREAM_OPTIONS: list[tuple[str, int]] = [
    # Bytes of one HTTP/2 frame: by default a message of 4 MiB comes in 256 pieces, each of which
    # gRPC appends in Python.
    ("grpc.http2.max_frame_size", 1 << 20),
    # Bytes of a stream that may be under way while its reader is busy: three messages. gRPC
    # would estimate them from round trips, and on a fast link stop the sender in every message.
    ("grpc.http2.lookahead_bytes", 6 << 20),
    ("grpc.http2.bdp_probe", 0),
]
