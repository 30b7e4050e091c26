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

from polarcache.cache_service.attend_queries import Launch, WaitingQuery
from polarcache.cache_service.attention import Attention, OpenPrefix
from polarcache.cache_service.rpc import as_typed
from polarcache.proto.attend_doorbells import (
    ANSWER,
    ANSWER_FIELDS,
    ASK,
    LENGTH,
    REFUSAL,
    REFUSAL_ID,
)
from polarcache.proto.attend_frames import split_request
from polarcache.proto.errors import (
    DeadlineError,
    InvalidRequestError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.local import ERROR, FRAME, error_body, send_body

__all__ = ["LocalAttendStream"]

_log = logging.getLogger(__name__)
_RECEIVE_BYTES = 1 << 9
_ASK_BYTES = LENGTH.size + ASK.size
_ASK = struct.Struct("<I" + ASK.format.lstrip("<"))
_ANSWER = struct.Struct("<Ic" + ANSWER_FIELDS.format.lstrip("<"))
_ANSWER_BYTES = len(ANSWER) + ANSWER_FIELDS.size


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
            self._opened.join(self)
        except Exception as error:
            typed = as_typed(error, "local attend")
            send_body(self._connection, ERROR, error_body(typed))
            if self._opened is not None:
                self._opened.close()
            raise ConnectionAbortedError(str(error)) from error
        try:
            send_body(self._connection, FRAME, self._opened.ready())
            self._connection.setblocking(False)
            self._heard_s = time.monotonic()
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
        except OSError as error:
            _log.debug("local worker left: %s", error)
            chunk = b""
        if not chunk:
            self._end(None)
            return
        self._heard_s = time.monotonic()
        received = self._received + chunk if self._received else chunk
        start = 0
        try:
            while len(received) - start >= _ASK_BYTES:
                self._take(*_ASK.unpack_from(received, start))
                start += _ASK_BYTES
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
        self, request: WaitingQuery, launch: Launch, out: memoryview, lse: memoryview
    ) -> None:
        """Writes an answer to the worker's memory and rings."""
        start = self._places.pop(request.request_id)
        end = start + len(out)
        self._memory[start:end] = out
        self._memory[end : end + len(lse)] = lse
        self._ring(
            _ANSWER.pack(
                _ANSWER_BYTES,
                ANSWER,
                request.request_id,
                request.queue_ns(launch),
                launch.kernel_ns,
                launch.num_requests,
            )
        )

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        """Tells the worker that a request has no answer."""
        self._refuse(request.request_id, error)

    def _refuse(self, request_id: int, error: PolarCacheError) -> None:
        self._places.pop(request_id, None)
        self._ring(_body(REFUSAL, REFUSAL_ID.pack(request_id) + error_body(error)))

    def _take(
        self,
        body_bytes: int,
        request_id: int,
        layer: int,
        num_tokens: int,
        position: int,
        timeout_ms: int,
        offset: int,
        length: int,
    ) -> None:
        opened = self._opened
        if opened is None or body_bytes != ASK.size or request_id in self._places:
            raise InvalidRequestError(
                f"request {request_id} is of {body_bytes} bytes, or its id is in use; "
                f"{ASK.size} bytes and an id of its own were expected"
            )
        prefix = opened.prefix
        num_query_bytes = num_tokens * prefix.query_token_bytes
        num_answer_bytes = num_tokens * prefix.answer_token_bytes
        try:
            if length < num_query_bytes or length < num_answer_bytes:
                raise InvalidRequestError(
                    f"a place of {length} bytes: queries of {num_query_bytes} and an answer of "
                    f"{num_answer_bytes} must fit"
                )
            if offset + length > len(self._memory):
                raise InvalidRequestError(
                    f"bytes {offset} to {offset + length} are outside of the shared memory of "
                    f"{len(self._memory)} bytes"
                )
            self._places[request_id] = offset
            opened.submit(
                request_id,
                layer,
                num_tokens,
                position if position >= 0 else None,
                timeout_ms,
                self._memory[offset : offset + num_query_bytes],
            )
        except PolarCacheError as error:
            self._refuse(request_id, error)

    def _ring(self, body: bytes) -> None:
        if not self._send(body):
            self._end(None)

    def _send(self, body: bytes) -> bool:
        """Sends without waiting; False when the worker does not read, or is gone."""
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
            self._send(_body(ERROR, error_body(error)))
        # From here on the connection's thread may close it.
        self._over.set()


def _body(kind: bytes, rest: bytes) -> bytes:
    return b"".join((LENGTH.pack(len(kind) + len(rest)), kind, rest))
