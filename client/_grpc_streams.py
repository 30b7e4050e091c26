"""Runs store and retrieve calls over gRPC streams."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

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

    Three threads: the caller builds a frame while gRPC's sends the one before; a third receives
    the answers, so that the caller can stop waiting at its deadline.

    Args:
        method: The Store method.
    """

    def __init__(self, method: grpc.StreamStreamMultiCallable) -> None:
        self._lock = threading.Lock()
        self._to_send = threading.Condition(self._lock)
        self._sent_or_received = threading.Condition(self._lock)
        self._frame: bytes | None = None
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
        self._send(call.begin(), end_s)
        call.on_answer(self._answer(end_s))
        while (frame := call.next_frame()) is not None:
            self._send(frame, end_s)
        self._send(call.commit(), end_s)
        call.on_answer(self._answer(end_s))
        return call.finished()

    def close(self) -> None:
        """Ends the stream; a call under way fails."""
        self._stream.cancel()

    def _send(self, frame: bytes, end_s: float) -> None:
        """Leaves a frame to gRPC's thread once that has taken the one before."""
        with self._lock:
            self._wait(lambda: self._frame is None, end_s)
            self._frame = frame
            self._to_send.notify()

    def _answer(self, end_s: float) -> bytes:
        with self._lock:
            self._wait(lambda: bool(self._answers), end_s)
            return self._answers.popleft()

    def _wait(self, is_there: Callable[[], bool], end_s: float) -> None:
        self._sent_or_received.wait_for(
            lambda: is_there() or self._failure is not None, end_s - time.monotonic()
        )
        # An answer counts even if the service ended the stream after it.
        if not is_there():
            raise self._failure or DeadlineError("the service did not answer in time")

    def _frames(self) -> Iterator[bytes]:
        """In gRPC's thread: what to send."""
        while True:
            with self._lock:
                self._to_send.wait_for(lambda: self._frame is not None or not self.is_alive)
                frame, self._frame = self._frame, None
                self._sent_or_received.notify()
            if frame is None or not self.is_alive:
                return
            yield frame

    def _receive(self) -> None:
        """In a thread of the stream: takes the answers, and at last why there are no more."""
        failure: Exception = ServiceUnavailableError("the service ended the stream")
        try:
            for answer in self._stream:
                with self._lock:
                    self._answers.append(answer)
                    self._sent_or_received.notify()
        except grpc.RpcError as error:
            failure = error_from_rpc(error)
        with self._lock:
            self._failure = failure
            self._to_send.notify()
            self._sent_or_received.notify()


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
