"""Requests that wait for attention, and the streams that sent them."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Protocol

from polarcache.cache_service.attend_plan import LayerQuery
from polarcache.cache_service.attend_prefix import AttendKind, HeldPrefix
from polarcache.proto.errors import PolarCacheError
from polarcache.proto.frames import Buffer

__all__ = ["AttendStream", "Launch", "Turn", "WaitingQuery", "Watched"]

_EXACT_S = 50e-6
# Weight of the newest gap between an answer and the stream's next request.
_GAP_WEIGHT = 0.25
_GAP_DECAY = 31 / 32


class Launch:
    """What the requests of one launch share.

    Attributes:
        start_s: When it was begun, on the monotonic clock.
        kernel_ns: Time of its kernel.
        num_requests: Requests that it computed.
    """

    __slots__ = ("kernel_ns", "num_requests", "start_s")

    def __init__(self, start_s: float, kernel_ns: int, num_requests: int) -> None:
        self.start_s = start_s
        self.kernel_ns = kernel_ns
        self.num_requests = num_requests


class WaitingQuery(LayerQuery):
    """A request that waits for its launch.

    Args:
        prefix: As for `LayerQuery`.
        layer: As for `LayerQuery`.
        num_tokens: As for `LayerQuery`.
        queries: As for `LayerQuery`.
        position: As for `LayerQuery`.
        request_id: The worker's name for it.
        deadline_s: When it is refused instead, on the monotonic clock.
    """

    __slots__ = ("arrived_s", "deadline_s", "request_id", "turn")

    turn: Turn

    def __init__(
        self,
        prefix: HeldPrefix,
        layer: int,
        num_tokens: int,
        queries: Buffer,
        position: int,
        request_id: int,
        timeout_ms: int,
    ) -> None:
        LayerQuery.__init__(self, prefix, layer, num_tokens, queries, position)
        self.request_id = request_id
        self.arrived_s = time.monotonic()
        self.deadline_s = self.arrived_s + timeout_ms / 1e3 if timeout_ms else math.inf

    def queue_ns(self, launch: Launch) -> int:
        """How long it waited for its launch."""
        return int((launch.start_s - self.arrived_s) * 1e9)


class AttendStream(Protocol):
    """Whose requests they are. Called in the batcher's thread."""

    def answer(
        self, request: WaitingQuery, launch: Launch, out: memoryview, lse: memoryview
    ) -> None:
        """Takes an answer, whose views are valid during the call."""

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        """Takes the news that a request has no answer."""


class Watched(Protocol):
    """A socket that the batcher reads. Called in the batcher's thread."""

    def fileno(self) -> int:
        """Its descriptor."""

    def on_readable(self) -> None:
        """Reads what is there."""

    def on_tick(self, now_s: float) -> None:
        """Looks at the clock, about twice a second."""

    def on_close(self) -> None:
        """The batcher closes."""


class Turn:
    """A stream as the batcher sees it.

    Args:
        stream: The stream.
        kind: What its requests have in common.

    Attributes:
        waiting: Its requests that wait.
        answered_s: When its last one was answered or refused; 0 before.
        gap_s: How long it takes from an answer to its next request.
        took_s: How long the launch of its last request took; 0 before.
    """

    __slots__ = ("answered_s", "gap_s", "kind", "stream", "took_s", "waiting")

    def __init__(self, stream: AttendStream, kind: AttendKind) -> None:
        self.stream = stream
        self.kind = kind
        self.waiting: deque[WaitingQuery] = deque()
        self.answered_s = 0.0
        self.gap_s = 0.0
        self.took_s = 0.0

    def learn(self, least_s: float, most_s: float) -> None:
        """Takes the time from an answer to the next request into account.

        Args:
            least_s: At least so long, seconds: a request that came during a launch was not seen.
            most_s: At most so long, seconds.
        """
        if most_s - least_s < _EXACT_S:
            self.gap_s += _GAP_WEIGHT * (most_s - self.gap_s)
        else:
            # It may have come sooner than was known: try that now and then.
            self.gap_s = min(max(self.gap_s * _GAP_DECAY, least_s), most_s)
