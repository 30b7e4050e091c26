"""Endpoints and channel options."""

from __future__ import annotations

from urllib.parse import urlsplit

import grpc.experimental

from polarcache.proto.channel import STREAM_OPTIONS
from polarcache.proto.errors import InvalidRequestError

__all__ = ["DEFAULT_ENDPOINT", "channel_options", "grpc_target"]

DEFAULT_ENDPOINT = "grpc://127.0.0.1:50061"
_MAX_MESSAGE_BYTES = 1 << 30


def grpc_target(endpoint: str) -> str:
    """The gRPC target of an endpoint.

    Args:
        endpoint: `grpc://host:port`, `grpc+unix:///path`, or `host:port`.

    Raises:
        InvalidRequestError: It is none of these.
    """
    parts = urlsplit(endpoint if "://" in endpoint else f"grpc://{endpoint}")
    if parts.scheme == "grpc" and parts.hostname and parts.port and not parts.path.strip("/"):
        return parts.netloc
    if parts.scheme == "grpc+unix" and parts.path and not parts.netloc:
        return f"unix:{parts.path}"
    raise InvalidRequestError(
        f"endpoint must be grpc://host:port or grpc+unix:///path, got {endpoint!r}"
    )


def channel_options() -> list[tuple[str, int]]:
    """Options of every channel: limits checked by the service, quick reconnects, keepalive."""
    return [
        *STREAM_OPTIONS,
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        # A stream's reader takes its messages from gRPC itself, not from another thread.
        (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
