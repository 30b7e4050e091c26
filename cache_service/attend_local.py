"""The Attend stream of a worker on the same host: doorbells on the socket, tensors in its memory.

The stream is opened in the connection's thread, which then only waits for its end: the batcher
reads the socket, so that a request wakes one thread.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time

from polarcache.cache_service.attend_batcher import WaitingQuery
from polarcache.cache_service.attention import Attention, OpenPrefix
from polarcache.cache_service.rpc import as_typed
from polarcache.proto.attend_frames import refusal, split_request
from polarcache.proto.errors import (
    DeadlineError,
    InvalidRequestError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.local import ERROR, FRAME, error_body, send_body
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["LocalAttendStream"]

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 14
_MAX_FRAME_BYTES = 1 << 12


class LocalAttendStream:
    """One stream; `run` serves it in the connection's thread.

    Args:
        connection: The worker's connection.
        memory: The memory it shares.
        attention: Opens the prefix.
        idle_s: A worker that is silent for so long is cut off.
    """

    def __init__(
        self, connection: socket.socket, memory: memoryview, attention: Attention, idle_s: float
    ) -> None:
        self._connection = connection
        self._memory = memory
        self._attention = attention
        self._idle_s = idle_s
        self._received = b""
        self._heard_s = time.monotonic()
        self._over = threading.Event()
        self._opened: OpenPrefix | None = None
        # Where the answer of each request that waits goes.
        self._places: dict[int, int] = {}

    def run(self, frame: bytes) -> None:
        """Serves the stream until the worker closes the connection.

        Raises:
            OSError: The connection is of no more use.
        """
        try:
            request, _ = split_request(frame)
            if not request.HasField("begin"):
                raise InvalidRequestError("the first message of a stream must be `begin`")
            self._opened = self._attention.open(request.begin)
        except Exception as error:
            typed = as_typed(error, "local attend")
            send_body(self._connection, ERROR, error_body(typed))
            raise ConnectionAbortedError(str(error)) from error
        try:
            send_body(self._connection, FRAME, self._opened.ready())
            self._connection.setblocking(False)
            self._attention.batcher.watch(self)
            self._over.wait()
        except ServiceUnavailableError as error:
            send_body(self._connection, ERROR, error_body(error))
        finally:
            self._opened.close()
        raise ConnectionResetError("the stream is over")

    # -- in the batcher's thread ------------------------------------------------------------

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._connection.fileno()

    def on_readable(self) -> None:
        """Takes the requests that have come."""
        try:
            chunk = self._connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._end(None)
            return
        self._heard_s = time.monotonic()
        received = self._received + chunk
        start = 0
        try:
            while len(received) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(received, start)
                if length > _MAX_FRAME_BYTES:
                    raise InvalidRequestError(
                        f"a request of {length} bytes; at most {_MAX_FRAME_BYTES} were expected"
                    )
                end = start + _LENGTH.size + length
                if end > len(received):
                    break
                self._take(received[start + _LENGTH.size : end])
                start = end
        except PolarCacheError as error:
            self._end(error)
            return
        self._received = received[start:]

    def on_tick(self, now_s: float) -> None:
        """Cuts off a worker that is silent."""
        if now_s - self._heard_s > self._idle_s:
            self._end(DeadlineError(f"the worker sent nothing for {self._idle_s:g} s"))

    def on_close(self) -> None:
        """Tells the worker that the service goes."""
        self._end(ServiceUnavailableError("the service is shutting down"))

    def answer(
        self, request: WaitingQuery, head: pb.AttendResponse, out: memoryview, lse: memoryview
    ) -> None:
        """Writes an answer to the worker's memory and rings."""
        start = self._places.pop(request.request_id)
        end = start + len(out)
        self._memory[start:end] = out
        self._memory[end : end + len(lse)] = lse
        self._ring(head.SerializeToString())

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        """Tells the worker that a request has no answer."""
        self._places.pop(request.request_id, None)
        self._ring(refusal(request.request_id, error))

    def _take(self, frame: bytes) -> None:
        request, queries = split_request(frame)
        opened = self._opened
        if opened is None or queries or request.request_id in self._places:
            raise InvalidRequestError(
                f"request {request.request_id} has its queries in the message, or its id is in use"
            )
        try:
            start, length = request.region.offset, request.region.length
            num_query_bytes = request.num_tokens * opened.prefix.query_token_bytes
            num_answer_bytes = request.num_tokens * opened.prefix.answer_token_bytes
            if length < max(num_query_bytes, num_answer_bytes):
                raise InvalidRequestError(
                    f"a place of {length} bytes: queries of {num_query_bytes} and an answer of "
                    f"{num_answer_bytes} must fit"
                )
            if start + length > len(self._memory):
                raise InvalidRequestError(
                    f"bytes {start} to {start + length} are outside of the shared memory of "
                    f"{len(self._memory)} bytes"
                )
            queries = self._memory[start : start + num_query_bytes]
            self._places[request.request_id] = start
            opened.submit(self, request, queries)
        except PolarCacheError as error:
            self._places.pop(request.request_id, None)
            self._ring(refusal(request.request_id, error))

    def _ring(self, frame: bytes) -> None:
        if not self._send(FRAME, frame):
            self._end(None)

    def _send(self, kind: bytes, frame: bytes) -> bool:
        """Sends without waiting; False when the worker does not read, or is gone."""
        body = b"".join((_LENGTH.pack(len(kind) + len(frame)), kind, frame))
        try:
            return self._connection.send(body) == len(body)
        except OSError as error:
            _log.debug("local worker left: %s", error)
            return False

    def _end(self, error: PolarCacheError | None) -> None:
        if self._over.is_set():
            return
        self._attention.batcher.unwatch(self._connection.fileno())
        if error is not None:
            self._send(ERROR, error_body(error))
        # From here on the connection's thread may close it.
        self._over.set()
