"""Runs store and retrieve calls over asyncio streams."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from polarcache.client._retrieve_call import RetrieveCall
from polarcache.client._store_call import StoreCall
from polarcache.client._types import StoreResult
from polarcache.proto.errors import InternalError
from polarcache.proto.status import error_from_rpc

__all__ = ["run_retrieve", "run_store"]


async def run_store(
    method: grpc.aio.StreamStreamMultiCallable, call: StoreCall, timeout_s: float
) -> StoreResult:
    """Sends a store's frames and returns its result.

    Raises:
        PolarCacheError: The call failed.
    """
    stream = method(timeout=timeout_s)
    try:
        await stream.write(call.begin())
        call.on_answer(await _answer(stream))
        while (frame := call.next_frame()) is not None:
            await stream.write(frame)
            while call.slots and not call.free_slots:
                call.on_answer(await _answer(stream))
        await stream.write(call.commit())
        while call.result is None:
            call.on_answer(await _answer(stream))
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    except grpc.aio.UsageError as error:
        # A write after the service ended the stream: the status says why.
        raise await _status_error(stream) from error
    finally:
        stream.cancel()
    return call.finished()


async def run_retrieve(
    method: grpc.aio.StreamStreamMultiCallable, call: RetrieveCall, timeout_s: float
) -> AsyncIterator[None]:
    """Receives a retrieve's frames; yields after the header and after each frame.

    The caller says after the header where blocks go (`RetrieveCall.write_to`).

    Raises:
        PolarCacheError: The call failed.
    """
    stream = method(timeout=timeout_s)
    try:
        await stream.write(call.begin())
        call.on_header(await _answer(stream))
        yield
        while (frame := await stream.read()) is not grpc.aio.EOF:
            reply = call.on_answer(frame)
            if reply is not None:
                await stream.write(reply)
            yield
        call.finish()
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    except grpc.aio.UsageError as error:
        raise await _status_error(stream) from error
    finally:
        stream.cancel()


async def _answer(stream: grpc.aio.StreamStreamCall) -> bytes:
    frame = await stream.read()
    if frame is grpc.aio.EOF:
        raise await _status_error(stream)
    answer: bytes = frame
    return answer


async def _status_error(stream: grpc.aio.StreamStreamCall) -> Exception:
    code = await stream.code()
    if code is grpc.StatusCode.OK:
        return InternalError("the service ended the stream early")
    error = grpc.aio.AioRpcError(
        code,
        await stream.initial_metadata(),
        await stream.trailing_metadata(),
        details=await stream.details(),
    )
    return error_from_rpc(error)
