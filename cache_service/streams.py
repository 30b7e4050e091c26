"""The Store and Retrieve streams: frames in, frames out, one of them always in the works.

While a frame is encoded or decoded in a thread the next one is read or the last one written, so
the wire and the codec overlap. A stream whose worker is silent too long is ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.index import Entry
from polarcache.cache_service.local import LocalSocket
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import Namespace, NamespaceRegistry
from polarcache.cache_service.store import BlockStore
from polarcache.cache_service.store_session import StoreSession
from polarcache.cache_service.workers import Workers
from polarcache.proto.errors import DeadlineError, InvalidRequestError
from polarcache.proto.frames import Buffer, checksum, join_frame, split_frame
from polarcache.proto.keys import MAX_BLOCK_KEY_BYTES
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["BlockStreams", "check_keys"]

Context: TypeAlias = grpc.aio.ServicerContext
_MAX_REGIONS_PER_CALL = 64


def check_keys(block_keys: Sequence[bytes], most: int) -> list[bytes]:
    """Block keys of a request, checked.

    Raises:
        InvalidRequestError: There are none or too many, or one is empty or too long.
    """
    if not 1 <= len(block_keys) <= most:
        raise InvalidRequestError(f"expected 1 to {most} block keys, got {len(block_keys)}")
    for i, key in enumerate(block_keys):
        if not 1 <= len(key) <= MAX_BLOCK_KEY_BYTES:
            raise InvalidRequestError(
                f"block key {i} is {len(key)} bytes; expected 1 to {MAX_BLOCK_KEY_BYTES}"
            )
    return list(block_keys)


class BlockStreams:
    """Handlers of the two streams.

    Args:
        config: Settings.
        store: The store.
        namespaces: The namespaces.
        local: The local socket, or None.
        counters: Where to count.
        workers: Threads for what takes time.
    """

    def __init__(
        self,
        config: ServiceConfig,
        store: BlockStore,
        namespaces: NamespaceRegistry,
        local: LocalSocket | None,
        counters: Counters,
        workers: Workers,
    ) -> None:
        self._config = config
        self._store = store
        self._namespaces = namespaces
        self._local = local
        self._counters = counters
        self._workers = workers

    async def store(self, context: Context) -> None:
        """Takes blocks from a worker."""
        self._counters.add("store_requests_total")
        try:
            await self._store_blocks(context)
        except BaseException:
            self._counters.add("store_failed_requests_total")
            raise

    async def retrieve(self, context: Context) -> None:
        """Sends blocks to a worker."""
        self._counters.add("retrieve_requests_total")
        try:
            await self._retrieve_blocks(context)
        except BaseException:
            self._counters.add("retrieve_failed_requests_total")
            raise

    # -- store ------------------------------------------------------------------------------

    async def _store_blocks(self, context: Context) -> None:
        request, _ = split_frame(pb.StoreRequest, await self._read(context))
        if not request.HasField("begin"):
            raise InvalidRequestError("the first message of a store must be `begin`")
        begin = request.begin
        namespace = self._namespaces.get(begin.namespace_id)
        keys = check_keys(begin.block_keys, self._config.max_blocks_per_call)
        if len(set(keys)) != len(keys):
            raise InvalidRequestError("block_keys must all be different")
        packed = _is_packed(begin.format)
        wanted = await self._workers.io(self._store.absent, namespace, keys)
        ready = pb.StoreResponse(ready=pb.StoreReady(wanted=wanted))
        await context.write(ready.SerializeToString())
        session = StoreSession(
            self._store, namespace, keys, wanted, packed=packed, counters=self._counters
        )
        try:
            await self._take_frames(context, session)
            num_stored = await self._workers.io(session.publish, durable=begin.durable)
        finally:
            # In a thread: it waits for a span that is being written.
            self._workers.io_later(session.close)
        if begin.durable:
            await self._workers.io(self._store.persist, namespace, keys)
        num_present = len(keys) - num_stored
        self._counters.add("stored_present_blocks_total", num_present)
        result = pb.StoreResult(num_stored=num_stored, num_present=num_present)
        await context.write(pb.StoreResponse(result=result).SerializeToString())

    async def _take_frames(self, context: Context, session: StoreSession) -> None:
        """Reads messages until `commit`, each while the one before is written to its pages."""
        tasks: list[asyncio.Task[Any]] = []
        taking: asyncio.Task[None] | None = None
        try:
            while True:
                reading = asyncio.create_task(self._read(context))
                tasks = [reading] if taking is None else [taking, reading]
                # Not the next message first: a refused one ends the call at once.
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if taking is not None:
                    await taking
                request, payload = split_frame(pb.StoreRequest, await reading)
                if request.commit:
                    return
                taking = asyncio.create_task(self._take(context, session, request, payload))
        finally:
            for task in tasks:
                task.cancel()

    async def _take(
        self, context: Context, session: StoreSession, request: pb.StoreRequest, payload: memoryview
    ) -> None:
        if not request.HasField("region"):
            await self._workers.cpu(session.take, request.spans, payload)
            return
        await self._workers.cpu(session.take, request.spans, self._region_view(request.region))
        await context.write(pb.StoreResponse(released=request.region).SerializeToString())

    # -- retrieve ---------------------------------------------------------------------------

    async def _retrieve_blocks(self, context: Context) -> None:
        request, _ = split_frame(pb.RetrieveRequest, await self._read(context))
        if not request.HasField("begin"):
            raise InvalidRequestError("the first message of a retrieve must be `begin`")
        begin = request.begin
        namespace = self._namespaces.get(begin.namespace_id)
        packed = _is_packed(begin.format)
        slice_bytes = namespace.codec.slice_bytes(packed=packed)
        frame_bytes = self._frame_bytes(begin.regions, slice_bytes)
        pinned = await self._workers.io_owned(
            self._store.unpin,
            self._store.pin_for_read,
            namespace, begin.lease_id, begin.first_block, begin.num_blocks,
        )  # fmt: skip
        try:
            header = pb.RetrieveHeader(
                num_blocks=len(pinned.entries), miss_reason=pinned.miss_reason
            )
            await context.write(pb.RetrieveResponse(header=header).SerializeToString())
            frames = _plan(
                pinned.entries, namespace.spec.layout.num_layers, max(1, frame_bytes // slice_bytes)
            )
            reader = _FrameReader(self._store, namespace, packed=packed, counters=self._counters)
            if begin.regions:
                await self._send_in_regions(context, reader, frames, begin.regions)
            else:
                await self._send_in_messages(context, reader, frames)
        finally:
            # Behind the frames that are being built: they read the pages.
            self._workers.cpu(self._store.unpin, pinned)
        self._counters.add("retrieved_blocks_total", len(pinned.entries))

    async def _send_in_messages(
        self, context: Context, reader: _FrameReader, frames: Iterator[list[_Slice]]
    ) -> None:
        building: asyncio.Future[bytes] | None = None
        for frame in frames:
            upcoming = self._workers.cpu(reader.message, frame)
            if building is not None:
                await context.write(await building)
            building = upcoming
        if building is not None:
            await context.write(await building)

    async def _send_in_regions(
        self,
        context: Context,
        reader: _FrameReader,
        frames: Iterator[list[_Slice]],
        regions: Sequence[pb.RegionRange],
    ) -> None:
        free = list(regions)
        views = {where.SerializeToString(): self._region_view(where) for where in regions}
        filling: asyncio.Future[bytes] | None = None
        for frame in frames:
            if not free:
                if filling is not None:
                    await context.write(await filling)
                    filling = None
                request, _ = split_frame(pb.RetrieveRequest, await self._read(context))
                if request.released.SerializeToString() not in views:
                    raise InvalidRequestError("a place was released that was not offered")
                free.append(request.released)
            where = free.pop()
            view = views[where.SerializeToString()]
            upcoming = self._workers.cpu(reader.into_region, frame, where, view)
            if filling is not None:
                await context.write(await filling)
            filling = upcoming
        if filling is not None:
            await context.write(await filling)

    # -- both -------------------------------------------------------------------------------

    def _frame_bytes(self, regions: Sequence[pb.RegionRange], slice_bytes: int) -> int:
        if not regions:
            return self._config.frame_bytes
        shortest = min(where.length for where in regions)
        if len(regions) > _MAX_REGIONS_PER_CALL or shortest < slice_bytes:
            raise InvalidRequestError(
                f"expected at most {_MAX_REGIONS_PER_CALL} places in shared memory of at least "
                f"one slice, {slice_bytes} bytes; got {len(regions)}, the shortest of {shortest}"
            )
        return shortest

    def _region_view(self, where: pb.RegionRange) -> memoryview:
        if self._local is None:
            raise InvalidRequestError("this service takes no shared memory")
        return self._local.region(where.region_id).view(where)

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


@dataclass(frozen=True, slots=True)
class _Slice:
    block_index: int
    layer: int
    entry: Entry


def _plan(entries: Sequence[Entry], num_layers: int, per_frame: int) -> Iterator[list[_Slice]]:
    """Slices of each frame, layer by layer, all blocks of a layer before the next."""
    frame: list[_Slice] = []
    for layer in range(num_layers):
        for i, entry in enumerate(entries):
            frame.append(_Slice(i, layer, entry))
            if len(frame) == per_frame:
                yield frame
                frame = []
    if frame:
        yield frame


class _FrameReader:
    """Builds retrieve frames from pages."""

    def __init__(
        self, store: BlockStore, namespace: Namespace, *, packed: bool, counters: Counters
    ) -> None:
        self._store = store
        self._codec = namespace.codec
        self._packed = packed
        self._counters = counters

    def message(self, frame: list[_Slice]) -> bytes:
        """A frame that carries its payload."""
        buffers, spans = self._read(frame)
        return join_frame(pb.RetrieveResponse(spans=spans), buffers)

    def into_region(self, frame: list[_Slice], where: pb.RegionRange, view: memoryview) -> bytes:
        """A frame whose payload lies in shared memory."""
        buffers, spans = self._read(frame)
        end = 0
        for buffer in buffers:
            view[end : end + len(buffer)] = buffer
            end += len(buffer)
        return pb.RetrieveResponse(spans=spans, region=where).SerializeToString()

    def _read(self, frame: list[_Slice]) -> tuple[list[Buffer], list[pb.Span]]:
        start_ns = time.monotonic_ns()
        pages = [self._store.memory.view(one.entry.page) for one in frame]
        buffers = self._codec.read(pages, [one.layer for one in frame], packed=self._packed)
        self._counters.add("codec_decode_ns_total", time.monotonic_ns() - start_ns)
        self._counters.add("sent_payload_bytes_total", sum(len(buffer) for buffer in buffers))
        spans = [
            pb.Span(
                block_index=one.block_index,
                first_layer=one.layer,
                num_layers=1,
                checksum=checksum(buffer),
            )
            for one, buffer in zip(frame, buffers, strict=True)
        ]
        return buffers, spans


def _is_packed(block_format: int) -> bool:
    if block_format not in (pb.BLOCK_FORMAT_RAW, pb.BLOCK_FORMAT_PACKED):
        raise InvalidRequestError(f"format must be RAW or PACKED, got {block_format}")
    return block_format == pb.BLOCK_FORMAT_PACKED
