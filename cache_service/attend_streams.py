"""The Attend stream and the AttendLayer call over gRPC."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

import grpc

from polarcache.cache_service.attend_batcher import WaitingQuery
from polarcache.cache_service.attention import Attention, OpenPrefix
from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.workers import Workers
from polarcache.proto.attend_frames import join_response, refusal, split_request
from polarcache.proto.errors import (
    DeadlineError,
    InvalidRequestError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["AttendStreams"]

Context: TypeAlias = grpc.aio.ServicerContext
# A worker that sends more requests than this without reading answers is made to wait.
_MAX_UNANSWERED = 64


class AttendStreams:
    """Handlers of both calls.

    Args:
        config: Settings.
        attention: Opens prefixes.
        workers: Threads for what takes time.
    """

    def __init__(self, config: ServiceConfig, attention: Attention, workers: Workers) -> None:
        self._idle_s = config.stream_idle_ms / 1000
        self._attention = attention
        self._workers = workers
        self._outbox = _Outbox()
        self._readers: set[asyncio.Task[None]] = set()
        self._draining = False

    async def attend(self, context: Context) -> None:
        """Serves a stream until the worker ends it."""
        request, _ = split_request(await self._read(context))
        opened = await self._open(request.begin, given=request.HasField("begin"))
        stream = _Stream(self._outbox)
        reader = asyncio.create_task(self._take_requests(context, opened, stream))
        reader.add_done_callback(lambda _: stream.answers.put_nowait(None))
        self._readers.add(reader)
        try:
            await context.write(opened.ready())
            while not (_is_over(reader) and not stream.num_unanswered):
                frame = await stream.answers.get()
                if frame is not None:
                    await context.write(frame)
                    stream.on_written()
        finally:
            self._readers.discard(reader)
            reader.cancel()
            opened.close()

    async def attend_layer(self, request: pb.AttendLayerRequest) -> pb.AttendLayerResponse:
        """Serves one layer."""
        opened = await self._open(request.begin, given=request.HasField("begin"))
        call = _Call()
        try:
            query = pb.AttendRequest(layer=request.layer, num_tokens=request.num_tokens)
            if request.HasField("position"):
                query.position = request.position
            opened.submit(call, query, request.queries)
            return await call.response
        finally:
            opened.close()

    def drain(self) -> None:
        """Ends all streams and opens no more."""
        self._draining = True
        for reader in self._readers:
            reader.cancel()

    async def _open(self, begin: pb.AttendBegin, *, given: bool) -> OpenPrefix:
        if not given:
            raise InvalidRequestError("the first message of a stream must be `begin`")
        if self._draining:
            raise ServiceUnavailableError("the service is shutting down")
        return await self._workers.io_owned(OpenPrefix.close, self._attention.open, begin)

    async def _take_requests(self, context: Context, opened: OpenPrefix, stream: _Stream) -> None:
        """Reads requests until the worker sends no more."""
        while (frame := await self._read(context)) is not grpc.aio.EOF:
            request, queries = split_request(frame)
            await stream.make_room()
            try:
                if request.HasField("region"):
                    raise InvalidRequestError("shared memory goes with the local socket alone")
                opened.submit(stream, request, queries)
            except PolarCacheError as error:
                stream.answers.put_nowait(refusal(request.request_id, error))

    async def _read(self, context: Context) -> bytes:
        try:
            async with asyncio.timeout(self._idle_s):
                frame: bytes = await context.read()
                return frame
        except TimeoutError as error:
            raise DeadlineError(f"the worker sent nothing for {self._idle_s:g} s") from error


def _is_over(reader: asyncio.Task[None]) -> bool:
    """Whether the worker sends no more.

    Raises:
        PolarCacheError: It sent what ends the stream, or the service is shutting down.
    """
    if not reader.done():
        return False
    if reader.cancelled():
        raise ServiceUnavailableError("the service is shutting down")
    reader.result()
    return True


class _Stream:
    """Answers of one stream on their way from the batcher's thread to the event loop."""

    def __init__(self, outbox: _Outbox) -> None:
        self.answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.num_unanswered = 0
        self._outbox = outbox
        self._room: asyncio.Future[None] | None = None

    async def make_room(self) -> None:
        """Counts a request, once few enough have no answer."""
        if self.num_unanswered >= _MAX_UNANSWERED:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        self.num_unanswered += 1

    def on_written(self) -> None:
        """Counts an answer."""
        self.num_unanswered -= 1
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def answer(
        self, request: WaitingQuery, head: pb.AttendResponse, out: memoryview, lse: memoryview
    ) -> None:
        """In the batcher's thread: passes an answer on."""
        self._outbox.put(self.answers, join_response(head, out, lse))

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        """In the batcher's thread: passes a refusal on."""
        self._outbox.put(self.answers, refusal(request.request_id, error))


class _Outbox:
    """Frames of many streams for one event loop, which is woken once for all of them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: deque[tuple[asyncio.Queue[bytes | None], bytes]] = deque()
        self._is_scheduled = False

    def put(self, answers: asyncio.Queue[bytes | None], frame: bytes) -> None:
        """In the batcher's thread: adds a frame."""
        self._frames.append((answers, frame))
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        # First, so that a frame which comes after the last look is scheduled anew.
        self._is_scheduled = False
        while self._frames:
            answers, frame = self._frames.popleft()
            answers.put_nowait(frame)


class _Call:
    """The answer of one AttendLayer call."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.response: asyncio.Future[pb.AttendLayerResponse] = self._loop.create_future()

    def answer(
        self, request: WaitingQuery, head: pb.AttendResponse, out: memoryview, lse: memoryview
    ) -> None:
        """In the batcher's thread: passes the answer on."""
        response = pb.AttendLayerResponse(out=bytes(out), lse=bytes(lse))
        self._loop.call_soon_threadsafe(self._settle, response)

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        """In the batcher's thread: passes the refusal on."""
        self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, result: pb.AttendLayerResponse | PolarCacheError) -> None:
        if self.response.done():
            return
        if isinstance(result, PolarCacheError):
            self.response.set_exception(result)
        else:
            self.response.set_result(result)
