"""How requests of an Attend stream travel: over gRPC, or with tensors in shared memory."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import struct
import time
from typing import NamedTuple, Protocol

import grpc

from polarcache.client._local import LocalConnection
from polarcache.client._watchdog import Watchdog
from polarcache.proto.attend_doorbells import (
    ANSWER,
    ANSWER_FIELDS,
    ASK,
    LENGTH,
    REFUSAL_ID,
)
from polarcache.proto.attend_frames import error_named, join_request, split_response
from polarcache.proto.errors import (
    DeadlineError,
    InternalError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.frames import Buffer
from polarcache.proto.local import ATTEND, ERROR, error_of, send_body
from polarcache.proto.status import error_from_rpc
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["Answer", "Ask", "AttendLink", "GrpcAttendLink", "LocalAttendLink", "Refused"]

# Of a request's deadline.
_QUEUE_SHARE = 0.9
_RECEIVE_BYTES = 1 << 9
# An answer is looked for so long before the thread sleeps, if the one before came as soon and
# there are cores to spare: waking it takes as long as a short request.
_SPIN_S = 150e-6
_SPARE_CORES = 4
_ASK = struct.Struct("<I" + ASK.format.lstrip("<"))
_ANSWER = struct.Struct("<Ic" + ANSWER_FIELDS.format.lstrip("<"))


class Answer(NamedTuple):
    """The answer to a request; its views are valid until the next one.

    Attributes:
        request_id: From the request.
        queue_ns: Time it waited for its launch, nanoseconds.
        kernel_ns: Time of the kernel of its launch, nanoseconds.
        batch_requests: Requests that the launch computed.
        out: Bytes of out.
        lse: Bytes of lse.
    """

    request_id: int
    queue_ns: int
    kernel_ns: int
    batch_requests: int
    out: memoryview
    lse: memoryview


class Ask(NamedTuple):
    """A request.

    Attributes:
        request_id: Chosen by the caller.
        layer: Layer.
        num_tokens: Query tokens.
        position: Position of the first query token; -1 where it is unset.
        queries: Bytes of the queries.
        out_bytes: Bytes of the answer's out.
        lse_bytes: Bytes of the answer's lse.
    """

    request_id: int
    layer: int
    num_tokens: int
    position: int
    queries: Buffer
    out_bytes: int
    lse_bytes: int


class Refused(Exception):
    """A request has no answer, but the stream goes on.

    Attributes:
        error: Why.
    """

    def __init__(self, error: PolarCacheError) -> None:
        super().__init__(str(error))
        self.error = error


class AttendLink(Protocol):
    """One stream. After any error but `Refused` it is of no more use."""

    def open(self, begin: pb.AttendBegin, timeout_s: float) -> pb.AttendReady:
        """Opens the stream.

        Raises:
            PolarCacheError: The service refused, or did not answer.
        """

    def send(self, ask: Ask, timeout_s: float) -> None:
        """Sends a request, or has `receive` send it first.

        Args:
            ask: The request.
            timeout_s: Longest wait for its answer, seconds.

        Raises:
            PolarCacheError: The stream broke.
        """

    def receive(self) -> Answer:
        """Waits for the answer to the request that was sent.

        Raises:
            Refused: The service refused the request.
            PolarCacheError: The stream broke, or the service did not answer.
        """

    def max_tokens(self, token_bytes: int) -> int:
        """Most query tokens of a request whose queries and answer take so many bytes a token."""

    def close(self) -> None:
        """Ends the stream."""


class GrpcAttendLink:
    """A gRPC stream.

    Args:
        method: The Attend method, without serializers.
        watchdog: Cancels the stream when an answer is late.
    """

    def __init__(self, method: grpc.StreamStreamMultiCallable, watchdog: Watchdog) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers = method(iter(self._requests.get, None))
        self._watchdog = watchdog
        self._guard = watchdog.watch(self._answers.cancel)

    def open(self, begin: pb.AttendBegin, timeout_s: float) -> pb.AttendReady:
        """See `AttendLink`."""
        self._requests.put(pb.AttendRequest(begin=begin).SerializeToString())
        response, _, _ = split_response(self._next(timeout_s))
        return _ready(response)

    def send(self, ask: Ask, timeout_s: float) -> None:
        """See `AttendLink`."""
        # The thread of gRPC that sends needs the interpreter: it gets the request in `receive`,
        # when this one waits.
        self._timeout_s = timeout_s
        self._frame = join_request(
            ask.request_id,
            ask.layer,
            ask.num_tokens,
            ask.position,
            _queue_ms(timeout_s),
            ask.queries,
        )

    def receive(self) -> Answer:
        """See `AttendLink`."""
        self._requests.put(self._frame)
        response, out, lse = split_response(self._next(self._timeout_s))
        if response.HasField("error"):
            raise Refused(error_named(response.error.reason, response.error.message))
        return Answer(
            response.request_id,
            response.queue_ns,
            response.kernel_ns,
            response.batch_requests,
            out,
            lse,
        )

    def max_tokens(self, token_bytes: int) -> int:
        """See `AttendLink`."""
        return 1 << 20

    def close(self) -> None:
        """See `AttendLink`."""
        self._watchdog.forget(self._guard)
        self._requests.put(None)
        self._answers.cancel()

    def _next(self, timeout_s: float) -> bytes:
        guard = self._guard
        guard.arm(timeout_s)
        try:
            frame: bytes = next(self._answers)
            return frame
        except grpc.RpcError as error:
            if guard.is_late:
                raise DeadlineError(f"the service did not answer in {timeout_s:g} s") from error
            raise error_from_rpc(error) from error
        except StopIteration as error:
            raise ServiceUnavailableError("the service ended the stream") from error
        finally:
            guard.disarm()


class LocalAttendLink(LocalConnection):
    """A connection to a service on the same host, with memory of its own.

    Args:
        path: The service's socket.
        boot_id: The service's boot id.
        num_bytes: Memory to share.

    Raises:
        OSError: The service is not there, is another one, or refuses.
    """

    def __init__(self, path: str, boot_id: str, num_bytes: int) -> None:
        super().__init__(path, boot_id, num_bytes)
        self._timeout_s = self._waited_s = 0.0
        self._spin_s = _SPIN_S if len(os.sched_getaffinity(0)) >= _SPARE_CORES else 0.0
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)

    def open(self, begin: pb.AttendBegin, timeout_s: float) -> pb.AttendReady:
        """See `AttendLink`."""
        try:
            self._socket.settimeout(timeout_s)
            send_body(self._socket, ATTEND, pb.AttendRequest(begin=begin).SerializeToString())
            response, _, _ = split_response(self._answer())
            self._socket.setblocking(False)
        except OSError as error:
            raise self._failure(error) from error
        return _ready(response)

    def send(self, ask: Ask, timeout_s: float) -> None:
        """See `AttendLink`."""
        memory, connection = self.memory, self._socket
        request_id, layer, num_tokens, position, queries, out_bytes, lse_bytes = ask
        memory[: len(queries)] = queries
        self._answer_bytes = out_bytes, out_bytes + lse_bytes
        try:
            if timeout_s != self._timeout_s:
                self._timeout_s = timeout_s
                self._queue_ms = _queue_ms(timeout_s)
            connection.send(
                _ASK.pack(
                    ASK.size,
                    request_id,
                    layer,
                    num_tokens,
                    position,
                    self._queue_ms,
                    0,
                    len(memory),
                )
            )
        except OSError as error:
            raise self._failure(error) from error

    def receive(self) -> Answer:
        """See `AttendLink`."""
        try:
            received = self._received()
            if len(received) != _ANSWER.size:
                received = self._rest(received)
        except OSError as error:
            raise self._failure(error) from error
        if received[LENGTH.size : LENGTH.size + 1] != ANSWER:
            raise _told(received[LENGTH.size :])
        _, _, request_id, queue_ns, kernel_ns, batch_requests = _ANSWER.unpack(received)
        out_end, lse_end = self._answer_bytes
        memory = self.memory
        out, lse = memory[:out_end], memory[out_end:lse_end]
        return Answer(request_id, queue_ns, kernel_ns, batch_requests, out, lse)

    def max_tokens(self, token_bytes: int) -> int:
        """See `AttendLink`."""
        return len(self.memory) // token_bytes

    def close(self) -> None:
        """See `AttendLink`; wakes a thread that waits for an answer."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        super().close()

    def _received(self) -> bytes:
        """What comes next; looks for it without sleeping if the last came soon."""
        receive, now = self._socket.recv, time.monotonic
        start_s = now()
        if self._waited_s < self._spin_s:
            while now() - start_s < self._spin_s:
                try:
                    received = receive(_RECEIVE_BYTES)
                except BlockingIOError:
                    continue
                self._waited_s = now() - start_s
                return received
        if not self._readable.poll(self._timeout_s * 1e3):
            raise TimeoutError(f"no answer in {self._timeout_s:g} s")
        self._waited_s = now() - start_s
        return receive(_RECEIVE_BYTES)

    def _rest(self, received: bytes) -> bytes:
        """One whole message with its length, the first bytes of which have come."""
        while len(received) < LENGTH.size or len(received) < _end(received):
            chunk = self._received()
            if not chunk:
                raise ConnectionResetError("the service closed the connection")
            received += chunk
        # Nothing but an error follows an answer unasked, and the next call finds that.
        return received[: _end(received)]


def _end(received: bytes) -> int:
    (length,) = LENGTH.unpack_from(received)
    return LENGTH.size + int(length)


def _told(body: bytes) -> Exception:
    """The error that a body tells."""
    if body[:1] == ERROR:
        return error_of(body[1:])
    return Refused(error_of(body[1 + REFUSAL_ID.size :]))


def _queue_ms(timeout_s: float) -> int:
    """How long a request may wait in the service's queue: the rest is for the answer's way."""
    return max(1, int(timeout_s * 1000 * _QUEUE_SHARE))


def _ready(response: pb.AttendResponse) -> pb.AttendReady:
    if not response.HasField("ready"):
        raise InternalError("the service's first answer was not `ready`")
    return response.ready
