"""Runs store and retrieve calls over gRPC streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc

from polarcache.client._retrieve_call import RetrieveCall
from polarcache.client._store_call import StoreCall
from polarcache.client._types import StoreResult
from polarcache.proto.errors import DeadlineError
from polarcache.proto.status import error_from_rpc

__all__ = ["run_retrieve", "run_store"]


def run_store(
    method: grpc.StreamStreamMultiCallable, call: StoreCall, timeout_s: float
) -> StoreResult:
    """Sends a store's frames and returns its result.

    gRPC pulls the frames in a thread of its own, so building one overlaps with sending the last.

    Raises:
        PolarCacheError: The call failed.
    """
    changed = threading.Condition()
    ended = False

    def frames() -> Iterator[bytes]:
        yield call.begin()
        while True:
            with changed:
                changed.wait_for(lambda: ended or call.is_ready, timeout_s)
                if ended or not call.is_ready:
                    return
            frame = call.next_frame()
            if frame is None:
                yield call.commit()
                return
            yield frame

    stream = method(frames(), timeout=timeout_s)
    try:
        for answer in stream:
            with changed:
                call.on_answer(answer)
                changed.notify()
            if call.result is not None:
                break
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    finally:
        stream.cancel()
        with changed:
            ended = True
            changed.notify()
    return call.finished()


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
