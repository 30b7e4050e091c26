"""The Attend stream and the AttendLayer call over gRPC.

A stream's requests are taken one at a time, as its worker waits for each answer anyway: several
streams at once, not several requests of one, fill a launch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

import grpc

from polarcache.cache_service.attend_queries import Launch, WaitingQuery
from polarcache.cache_service.attention import Attention, OpenPrefix
from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.workers import Workers
from polarcache.proto.attend_frames import join_response, refusal, split_request, split_response
from polarcache.proto.errors import (
    DeadlineError,
    InvalidRequestError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.frames import Buffer
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["AttendStreams"]

Context: TypeAlias = grpc.aio.ServicerContext
Waiting: TypeAlias = "asyncio.Future[bytes | PolarCacheError]"


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
        attention.batcher.on_told = self._outbox.deliver
        self._streams: dict[_Stream, None] = {}
        self._draining = False

    async def attend(self, context: Context) -> None:
        """Serves a stream until the worker ends it."""
        stream = _Stream(self._outbox, self._idle_s)
        self._streams[stream] = None
        try:
            await self._serve(context, stream)
        except asyncio.CancelledError:
            if stream.why_ended is not None:
                raise stream.why_ended from None
            raise
        finally:
            del self._streams[stream]
            stream.close()

    async def attend_layer(self, request: pb.AttendLayerRequest) -> pb.AttendLayerResponse:
        """Serves one layer."""
        opened = await self._open(request.begin, given=request.HasField("begin"))
        query = pb.AttendRequest(
            layer=request.layer,
            num_tokens=request.num_tokens,
            position=request.position if request.HasField("position") else None,
        )
        call = _Call(self._outbox)
        try:
            opened.join(call)
            _submit(opened, query, request.queries)
            _, out, lse = split_response(await call.wait())
            return pb.AttendLayerResponse(out=bytes(out), lse=bytes(lse))
        finally:
            opened.close()

    def drain(self) -> None:
        """Ends all streams and opens no more."""
        self._draining = True
        for stream in self._streams:
            stream.end(ServiceUnavailableError("the service is shutting down"))

    async def _serve(self, context: Context, stream: _Stream) -> None:
        first = await context.read()
        request, _ = split_request(b"" if first is grpc.aio.EOF else first)
        opened = await self._open(request.begin, given=request.HasField("begin"))
        try:
            opened.join(stream)
            await context.write(opened.ready())
            while (frame := await context.read()) is not grpc.aio.EOF:
                stream.hear()
                request, queries = split_request(frame)
                try:
                    if request.HasField("region"):
                        raise InvalidRequestError("shared memory goes with the local socket alone")
                    if _submit(opened, request, queries, here=True):
                        self._outbox.flush()
                    answer = await stream.wait()
                except PolarCacheError as error:
                    answer = refusal(request.request_id, error)
                await context.write(answer)
        finally:
            opened.close()

    async def _open(self, begin: pb.AttendBegin, *, given: bool) -> OpenPrefix:
        if not given:
            raise InvalidRequestError("the first message of a stream must be `begin`")
        if self._draining:
            raise ServiceUnavailableError("the service is shutting down")
        return await self._workers.io_owned(OpenPrefix.close, self._attention.open, begin)


def _submit(
    opened: OpenPrefix, request: pb.AttendRequest, queries: Buffer, *, here: bool = False
) -> bool:
    return opened.submit(
        request.request_id,
        request.layer,
        request.num_tokens,
        request.position if request.HasField("position") else None,
        request.timeout_ms,
        queries,
        here=here,
    )


class _Call:
    """One request's answer, on its way from the batcher's thread to the event loop.

    Args:
        outbox: What carries it.
    """

    def __init__(self, outbox: _Outbox) -> None:
        self._outbox = outbox
        self._answer: Waiting = outbox.loop.create_future()

    async def wait(self) -> bytes:
        """The answer; then another may be waited for.

        Raises:
            PolarCacheError: The request was refused.
        """
        answer = await self._answer
        self._answer = self._outbox.loop.create_future()
        if isinstance(answer, PolarCacheError):
            raise answer
        return answer

    def answer(
        self, request: WaitingQuery, launch: Launch, out: memoryview, lse: memoryview
    ) -> None:
        """In the thread that computed it: passes an answer on."""
        frame = join_response(
            request.request_id,
            request.queue_ns(launch),
            launch.kernel_ns,
            launch.num_requests,
            out,
            lse,
        )
        self._outbox.put(self._answer, frame)

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        """In the thread that computed it: passes a refusal on."""
        self._outbox.put(self._answer, error)


class _Stream(_Call):
    """The answers of one stream, one after the other, and its end.

    Args:
        outbox: What carries them.
        idle_s: A worker that is silent for so long is cut off.

    Attributes:
        why_ended: Why the service ended it, None when it did not.
    """

    def __init__(self, outbox: _Outbox, idle_s: float) -> None:
        super().__init__(outbox)
        self.why_ended: PolarCacheError | None = None
        self._idle_s = idle_s
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self.hear()
        self._look()

    def hear(self) -> None:
        """Notes that the worker is not silent."""
        self._heard_s = self._outbox.loop.time()

    def end(self, error: PolarCacheError) -> None:
        """Ends the stream with an error."""
        self.why_ended = error
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Stops looking at the clock."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        left_s = self._heard_s + self._idle_s - self._outbox.loop.time()
        if left_s > 0:
            self._timer = self._outbox.loop.call_later(left_s, self._look)
        else:
            self.end(DeadlineError(f"the worker sent nothing for {self._idle_s:g} s"))


class _Outbox:
    """Answers of many streams for one event loop, which is woken once for all of them."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._answers: deque[tuple[Waiting, bytes | PolarCacheError]] = deque()

    def put(self, waiting: Waiting, answer: bytes | PolarCacheError) -> None:
        """In any thread: adds an answer."""
        self._answers.append((waiting, answer))

    def deliver(self) -> None:
        """In the batcher's thread: wakes the event loop, if there are answers."""
        if self._answers:
            self.loop.call_soon_threadsafe(self.flush)

    def flush(self) -> None:
        """In the event loop: hands the answers to whom they are for."""
        while self._answers:
            waiting, answer = self._answers.popleft()
            if not waiting.done():
                waiting.set_result(answer)
