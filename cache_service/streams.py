"""The Store and Retrieve streams over gRPC: some frames always in the works.

While a codec turns frames into pages, or pages into frames, in threads, the next one is read or
the last one written, so the wire and the codec overlap. What is only copied is copied at once: to
hand a frame to a thread and back costs more than its copy. A silent worker's stream is ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future, wait
from typing import TypeAlias, TypeVar

import grpc

from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.transfers import RetrieveTransfer, StoreTransfer, Transfers
from polarcache.cache_service.workers import Workers
from polarcache.proto.errors import DeadlineError, InvalidRequestError
from polarcache.proto.frames import split_frame
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["BlockStreams"]

Context: TypeAlias = grpc.aio.ServicerContext
ResultT = TypeVar("ResultT")
# Messages of one store that are written at a time, each in a thread of its own.
_MAX_TAKING = 2


class BlockStreams:
    """Handlers of the two streams.

    Args:
        config: Settings.
        transfers: Begins transfers.
        workers: Threads for what takes time.
    """

    def __init__(self, config: ServiceConfig, transfers: Transfers, workers: Workers) -> None:
        self._config = config
        self._transfers = transfers
        self._workers = workers
        self._idle: set[asyncio.Task[object]] = set()
        self._is_draining = False

    def drain(self) -> None:
        """Ends the store streams that carry no call, and the others after their call."""
        self._is_draining = True
        for task in self._idle:
            task.cancel()

    async def store(self, context: Context) -> None:
        """Takes blocks from a worker: any number of calls, one after the other."""
        while (first := await self._next_call(context)) is not None:
            await self._store_once(context, first)

    async def _next_call(self, context: Context) -> bytes | None:
        """The first message of the next call; None when the worker, or the service, ends."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("expected to run in a task")
        if self._is_draining:
            return None
        self._idle.add(task)
        try:
            frame = await context.read()
        except asyncio.CancelledError:
            if not self._is_draining or task.uncancel():
                raise
            return None
        finally:
            self._idle.discard(task)
        return None if frame is grpc.aio.EOF else bytes(frame)

    async def _store_once(self, context: Context, first: bytes) -> None:
        transfer = await self._workers.io_owned(
            StoreTransfer.close, self._transfers.begin_store, first
        )
        try:
            await context.write(transfer.ready)
            await self._take_frames(context, transfer)
            if transfer.durable:
                await context.write(await self._workers.io(transfer.commit))
            else:
                await context.write(transfer.commit())
        finally:
            # In a thread: it waits for what is being written.
            self._workers.io_later(transfer.close)

    async def retrieve(self, context: Context) -> None:
        """Sends blocks to a worker."""
        first = await self._read(context)
        transfer = await self._workers.io_owned(
            lambda late: late.close(complete=False), self._transfers.begin_retrieve, first
        )
        building: list[Future[bytes]] = []
        complete = False
        try:
            await context.write(transfer.header)
            for frame in transfer.frames(self._config.frame_bytes):
                if transfer.is_quick:
                    await context.write(transfer.message(frame))
                    continue
                building.append(self._workers.submit_cpu(transfer.message, frame))
                if len(building) > 1:
                    await context.write(await _done(building[0]))
                    del building[0]
            for future in building:
                await context.write(await _done(future))
            complete = True
        finally:
            # In a thread, and nothing is awaited here, where a second cancellation could strike.
            self._workers.io_later(lambda: _end(transfer, building, complete=complete))

    async def _take_frames(self, context: Context, transfer: StoreTransfer) -> None:
        """Reads messages until `commit`, while those before are written to their pages."""
        taking: deque[Future[None]] = deque()
        # A refused message ends the call at once, not with the next message.
        with _Interruption() as interruption:
            while True:
                request, payload = split_frame(pb.StoreRequest, await self._read(context))
                if request.commit:
                    break
                if request.HasField("region"):
                    raise InvalidRequestError("shared memory goes with the local socket alone")
                if transfer.is_quick(request.spans):
                    transfer.take(request.spans, payload)
                    continue
                future = self._workers.submit_cpu(transfer.take, request.spans, payload)
                future.add_done_callback(interruption.if_failed)
                taking.append(future)
                while taking and (taking[0].done() or len(taking) > _MAX_TAKING):
                    await _done(taking.popleft())
        for future in taking:
            await _done(future)

    async def _read(self, context: Context) -> bytes:
        try:
            async with asyncio.timeout(self._config.stream_idle_ms / 1000):
                frame = await context.read()
        except TimeoutError as error:
            raise DeadlineError(
                f"the worker sent nothing for {self._config.stream_idle_ms} ms"
            ) from error
        if frame is grpc.aio.EOF:
            raise InvalidRequestError("the worker ended the stream before its last message")
        message: bytes = frame
        return message


class _Interruption:
    """Ends the current task's wait when work in a thread fails, and raises why."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("expected to run in a task")
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._is_waited_for = True
        self._failure: BaseException | None = None

    def __enter__(self) -> _Interruption:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._is_waited_for = False
        if self._failure is not None:
            # Where the call itself was cancelled too, it stays so.
            is_ours = self._task.uncancel() == 0
            if exc_type is asyncio.CancelledError and is_ours:
                raise self._failure

    def if_failed(self, future: Future[None]) -> None:
        """In the thread that did the work: interrupts the task if it failed."""
        failure = None if future.cancelled() else future.exception()
        if failure is not None:
            self._loop.call_soon_threadsafe(self._interrupt, failure)

    def _interrupt(self, failure: BaseException) -> None:
        if self._is_waited_for and self._failure is None:
            self._failure = failure
            self._task.cancel()


async def _done(future: Future[ResultT]) -> ResultT:
    """A future's result, without a turn of the loop where it is there."""
    return future.result() if future.done() else await asyncio.wrap_future(future)


def _end(transfer: RetrieveTransfer, building: list[Future[bytes]], *, complete: bool) -> None:
    """Ends a retrieve once no thread reads its pages any more."""
    for future in building:
        future.cancel()
    wait(building)
    transfer.close(complete=complete)
