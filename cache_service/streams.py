"""The Store and Retrieve streams over gRPC: some frames always in the works.

While frames are written to their pages, or built from them, in threads, the next one is read or
the last one written, so the wire and the codec overlap. A silent worker's stream is ended.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, wait
from typing import Any, TypeAlias

import grpc

from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.transfers import RetrieveTransfer, StoreTransfer, Transfers
from polarcache.cache_service.workers import Workers
from polarcache.proto.errors import DeadlineError, InvalidRequestError
from polarcache.proto.frames import split_frame
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["BlockStreams"]

Context: TypeAlias = grpc.aio.ServicerContext
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

    async def store(self, context: Context) -> None:
        """Takes blocks from a worker."""
        first = await self._read(context)
        transfer = await self._workers.io_owned(
            StoreTransfer.close, self._transfers.begin_store, first
        )
        try:
            await context.write(transfer.ready)
            await self._take_frames(context, transfer)
            await context.write(await self._workers.io(transfer.commit))
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
            for frame in transfer.plan(self._config.frame_bytes):
                building.append(self._workers.submit_cpu(transfer.message, frame))
                if len(building) > 1:
                    await context.write(await asyncio.wrap_future(building[0]))
                    del building[0]
            for future in building:
                await context.write(await asyncio.wrap_future(future))
            complete = True
        finally:
            # In a thread, and nothing is awaited here, where a second cancellation could strike.
            self._workers.io_later(lambda: _end(transfer, building, complete=complete))

    async def _take_frames(self, context: Context, transfer: StoreTransfer) -> None:
        """Reads messages until `commit`, while those before are written to their pages."""
        taking: set[asyncio.Future[None]] = set()
        reading: asyncio.Task[bytes] | None = None
        try:
            while True:
                reading = asyncio.create_task(self._read(context))
                # A refused message ends the call at once, not with the next message.
                while not reading.done() or len(taking) >= _MAX_TAKING:
                    waited: set[asyncio.Future[Any]] = {*taking}
                    if not reading.done():
                        waited.add(reading)
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    for done in [future for future in taking if future.done()]:
                        taking.remove(done)
                        await done
                request, payload = split_frame(pb.StoreRequest, await reading)
                if request.commit:
                    await asyncio.gather(*taking)
                    return
                if request.HasField("region"):
                    raise InvalidRequestError("shared memory goes with the local socket alone")
                taking.add(self._workers.cpu(transfer.take, request.spans, payload))
        finally:
            if reading is not None:
                reading.cancel()

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


def _end(transfer: RetrieveTransfer, building: list[Future[bytes]], *, complete: bool) -> None:
    """Ends a retrieve once no thread reads its pages any more."""
    for future in building:
        future.cancel()
    wait(building)
    transfer.close(complete=complete)
