"""Runs store and retrieve calls over gRPC streams."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

import grpc

from polarcache.client._retrieve_call import RetrieveCall
from polarcache.client._store_call import StoreCall
from polarcache.client._types import StoreResult
from polarcache.proto.errors import DeadlineError, ServiceUnavailableError
from polarcache.proto.status import error_from_rpc

__all__ = ["StoreStreams", "run_retrieve"]

_MAX_IDLE = 4


class StoreStream:
    """One stream that carries stores, one after the other.

    gRPC's thread builds the frames and sends them: to hand each over would cost more than to
    build one while the last is sent gains. Another thread receives the answers, so that the
    caller can stop waiting at its deadline.

    Args:
        method: The Store method.
    """

    def __init__(self, method: grpc.StreamStreamMultiCallable) -> None:
        self._lock = threading.Lock()
        self._to_send = threading.Condition(self._lock)
        self._received = threading.Condition(self._lock)
        self._outgoing: Iterable[bytes] | None = None
        self._answers: deque[bytes] = deque()
        self._failure: Exception | None = None
        self._stream = method(self._frames())
        threading.Thread(target=self._receive, name="polarcache-store", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether the service still reads."""
        return self._failure is None

    def store(self, call: StoreCall, timeout_s: float) -> StoreResult:
        """Runs a store.

        Raises:
            PolarCacheError: The call failed; the stream is of no more use.
        """
        end_s = time.monotonic() + timeout_s
        self._send([call.begin()])
        call.on_answer(self._answer(end_s))
        self._send(call.frames_and_commit())
        call.on_answer(self._answer(end_s))
        return call.finished()

    def close(self) -> None:
        """Ends the stream; a call under way fails."""
        self._stream.cancel()

    def _send(self, frames: Iterable[bytes]) -> None:
        """Leaves frames to gRPC's thread."""
        with self._lock:
            self._outgoing = frames
            self._to_send.notify()

    def _answer(self, end_s: float) -> bytes:
        """The next answer, which ends what `_send` left."""
        with self._lock:
            self._received.wait_for(
                lambda: self._answers or self._failure is not None, end_s - time.monotonic()
            )
            # An answer counts even if the service ended the stream after it.
            if not self._answers:
                raise self._failure or DeadlineError("the service did not answer in time")
            return self._answers.popleft()

    def _frames(self) -> Iterator[bytes]:
        """In gRPC's thread: what to send."""
        try:
            while True:
                with self._lock:
                    self._to_send.wait_for(lambda: self._outgoing is not None or not self.is_alive)
                    frames, self._outgoing = self._outgoing, None
                if frames is None or not self.is_alive:
                    return
                yield from frames
        except Exception as error:
            self._fail(error)

    def _receive(self) -> None:
        """In a thread of the stream: takes the answers, and at last why there are no more."""
        failure: Exception = ServiceUnavailableError("the service ended the stream")
        try:
            for answer in self._stream:
                with self._lock:
                    self._answers.append(answer)
                    self._received.notify()
        except grpc.RpcError as error:
            failure = error_from_rpc(error)
        self._fail(failure)

    def _fail(self, failure: Exception) -> None:
        """Ends the waits; the first failure counts."""
        with self._lock:
            self._failure = self._failure or failure
            self._to_send.notify()
            self._received.notify()


class StoreStreams:
    """The streams to one service, each lent to one call at a time. Thread-safe.

    Args:
        method: The Store method.
    """

    def __init__(self, method: grpc.StreamStreamMultiCallable) -> None:
        self._method = method
        self._lock = threading.Lock()
        self._idle: list[StoreStream] = []

    def store(self, call: StoreCall, timeout_s: float) -> StoreResult:
        """Runs a store.

        Raises:
            PolarCacheError: The call failed.
        """
        stream = self._borrow()
        try:
            result = stream.store(call, timeout_s)
        except BaseException:
            stream.close()
            raise
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(stream)
                return result
        stream.close()
        return result

    def close(self) -> None:
        """Ends the streams that carry no call."""
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    def _borrow(self) -> StoreStream:
        with self._lock:
            while self._idle:
                stream = self._idle.pop()
                if stream.is_alive:
                    return stream
        return StoreStream(self._method)


def run_retrieve(
    method: grpc.UnaryStreamMultiCallable, call: RetrieveCall, timeout_s: float
) -> Iterator[None]:
    """Receives a retrieve's frames; yields after the header and after each frame.

    The caller says after the header where blocks go (`RetrieveCall.write_to`).

    Raises:
        PolarCacheError: The call failed.
    """
    stream = method(call.begin(), timeout=timeout_s)
    try:
        call.on_header(next(stream))
        yield
        for frame in stream:
            call.on_answer(frame)
            yield
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    except StopIteration as error:
        raise DeadlineError("the service ended the stream before its header") from error
    finally:
        stream.cancel()
