"""How requests of an Attend stream travel: over gRPC, or with tensors in shared memory."""

from __future__ import annotations

import queue
import struct
from typing import Protocol

import grpc

from polarcache.client._local import LocalConnection
from polarcache.client._watchdog import Watchdog
from polarcache.proto.attend_frames import join_request, split_response
from polarcache.proto.errors import DeadlineError, InternalError, ServiceUnavailableError
from polarcache.proto.frames import Buffer
from polarcache.proto.local import ATTEND, ERROR, error_of, send_body
from polarcache.proto.status import error_from_rpc
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["AttendLink", "GrpcAttendLink", "LocalAttendLink"]

Answer = tuple[pb.AttendResponse, memoryview, memoryview]
_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 14


class AttendLink(Protocol):
    """One stream. After an error it is of no more use, unless the response tells the error."""

    def open(self, begin: pb.AttendBegin, timeout_s: float) -> pb.AttendReady:
        """Opens the stream.

        Raises:
            PolarCacheError: The service refused, or did not answer.
        """

    def call(
        self,
        request: pb.AttendRequest,
        queries: Buffer,
        answer_bytes: tuple[int, int],
        timeout_s: float,
    ) -> Answer:
        """Sends a request and waits for its answer.

        Args:
            request: Without its queries.
            queries: Their bytes.
            answer_bytes: Bytes of out and of lse.
            timeout_s: Longest wait, seconds.

        Returns:
            The response and the bytes of out and lse, valid until the next call.

        Raises:
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
        self._watchdog = watchdog
        self._method = method

    def open(self, begin: pb.AttendBegin, timeout_s: float) -> pb.AttendReady:
        """See `AttendLink`."""
        self._requests.put(pb.AttendRequest(begin=begin).SerializeToString())
        self._answers = self._method(iter(self._requests.get, None))
        self._guard = self._watchdog.watch(self._answers.cancel)
        response, _, _ = self._next(timeout_s)
        return _ready(response)

    def call(
        self,
        request: pb.AttendRequest,
        queries: Buffer,
        answer_bytes: tuple[int, int],
        timeout_s: float,
    ) -> Answer:
        """See `AttendLink`."""
        self._requests.put(join_request(request, queries))
        return self._next(timeout_s)

    def max_tokens(self, token_bytes: int) -> int:
        """See `AttendLink`."""
        return 1 << 20

    def close(self) -> None:
        """See `AttendLink`."""
        self._watchdog.forget(self._guard)
        self._requests.put(None)
        self._answers.cancel()

    def _next(self, timeout_s: float) -> Answer:
        guard = self._guard
        guard.arm(timeout_s)
        try:
            return split_response(next(self._answers))
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
        self._where = pb.RegionRange(offset=0, length=num_bytes)

    def open(self, begin: pb.AttendBegin, timeout_s: float) -> pb.AttendReady:
        """See `AttendLink`."""
        try:
            self._socket.settimeout(timeout_s)
            send_body(self._socket, ATTEND, pb.AttendRequest(begin=begin).SerializeToString())
            response, _, _ = split_response(self._answer())
        except OSError as error:
            raise self._failure(error) from error
        return _ready(response)

    def call(
        self,
        request: pb.AttendRequest,
        queries: Buffer,
        answer_bytes: tuple[int, int],
        timeout_s: float,
    ) -> Answer:
        """See `AttendLink`."""
        memory = self.memory
        memory[: len(queries)] = queries
        request.region.CopyFrom(self._where)
        frame = request.SerializeToString()
        try:
            if timeout_s != self._socket.gettimeout():
                self._socket.settimeout(timeout_s)
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
            body = self._receive()
        except OSError as error:
            raise self._failure(error) from error
        if body[:1] == ERROR:
            raise error_of(body[1:])
        out_bytes, lse_bytes = answer_bytes
        response = pb.AttendResponse.FromString(body[1:])
        return response, memory[:out_bytes], memory[out_bytes : out_bytes + lse_bytes]

    def max_tokens(self, token_bytes: int) -> int:
        """See `AttendLink`."""
        return len(self.memory) // token_bytes

    def _receive(self) -> bytes:
        """One message's body: usually one read."""
        received = self._socket.recv(_RECEIVE_BYTES)
        while len(received) < _LENGTH.size or len(received) < _LENGTH.size + _length(received):
            chunk = self._socket.recv(_RECEIVE_BYTES)
            if not chunk:
                raise ConnectionResetError("the service closed the connection")
            received += chunk
        return received[_LENGTH.size :]


def _length(received: bytes) -> int:
    (length,) = _LENGTH.unpack_from(received)
    return int(length)


def _ready(response: pb.AttendResponse) -> pb.AttendReady:
    if not response.HasField("ready"):
        raise InternalError("the service's first answer was not `ready`")
    return response.ready
