"""A store or a retrieve in progress, without I/O: frames in, frames out.

The gRPC streams (`streams.py`) and the local socket (`local.py`) both drive these. All methods
may block: on Redis, on the codec, on copies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from polarcache.cache_service.codec import Place
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import Namespace, NamespaceRegistry
from polarcache.cache_service.store import BlockStore, Pinned
from polarcache.cache_service.store_session import StoreSession
from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.frames import Buffer, checksum, join_frame, split_frame
from polarcache.proto.keys import MAX_BLOCK_KEY_BYTES
from polarcache.proto.plan import Part, plan_frames
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["RetrieveTransfer", "StoreTransfer", "Transfers", "check_keys"]


class Transfers:
    """Begins transfers.

    Args:
        store: The store.
        namespaces: The namespaces.
        counters: Where to count.
        max_blocks_per_call: Most block keys in one call.
    """

    def __init__(
        self,
        store: BlockStore,
        namespaces: NamespaceRegistry,
        counters: Counters,
        max_blocks_per_call: int,
    ) -> None:
        self._store = store
        self._namespaces = namespaces
        self._counters = counters
        self._max_blocks_per_call = max_blocks_per_call

    def begin_store(self, frame: bytes) -> StoreTransfer:
        """From the first frame of a store.

        Raises:
            PolarCacheError: The request is refused.
        """
        self._counters.add("store_requests_total")
        request, _ = split_frame(pb.StoreRequest, frame)
        if not request.HasField("begin"):
            raise InvalidRequestError("the first message of a store must be `begin`")
        begin = request.begin
        namespace = self._namespaces.get(begin.namespace_id)
        keys = check_keys(begin.block_keys, self._max_blocks_per_call)
        if len(set(keys)) != len(keys):
            raise InvalidRequestError("block_keys must all be different")
        return StoreTransfer(self._store, namespace, keys, begin, self._counters)

    def begin_retrieve(self, frame: bytes) -> RetrieveTransfer:
        """From the first frame of a retrieve.

        Raises:
            PolarCacheError: The request is refused.
        """
        self._counters.add("retrieve_requests_total")
        request, _ = split_frame(pb.RetrieveRequest, frame)
        if not request.HasField("begin"):
            raise InvalidRequestError("the first message of a retrieve must be `begin`")
        begin = request.begin
        namespace = self._namespaces.get(begin.namespace_id)
        packed = _is_packed(begin.format)
        pinned = self._store.pin_for_read(
            namespace, begin.lease_id, begin.first_block, begin.num_blocks
        )
        return RetrieveTransfer(
            self._store, namespace, pinned, packed=packed, counters=self._counters
        )


class StoreTransfer:
    """A store. Send `ready`, feed `take`, send what `commit` returns; `close` in any case.

    `commit` waits for Redis where the store is `durable`, else for nothing.
    """

    def __init__(
        self,
        store: BlockStore,
        namespace: Namespace,
        keys: list[bytes],
        begin: pb.StoreBegin,
        counters: Counters,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._num_blocks = len(keys)
        self.durable = begin.durable
        self._counters = counters
        packed = _is_packed(begin.format)
        wanted = store.absent(namespace, keys)
        absent = set(wanted)
        self._present_keys = [key for i, key in enumerate(keys) if i not in absent]
        self.ready = pb.StoreResponse(ready=pb.StoreReady(wanted=wanted)).SerializeToString()
        self._session = StoreSession(
            store, namespace, keys, wanted, packed=packed, counters=counters
        )
        self._committed = False

    def is_quick(self, spans: Sequence[pb.Span]) -> bool:
        """Whether `take` does not block: no codec runs, and the spans' pages are there."""
        return self._session.is_quick(spans)

    def take(
        self, spans: Sequence[pb.Span], payload: memoryview, *, has_checksums: bool = True
    ) -> None:
        """Writes a message's spans to their pages. May run in several threads.

        Raises:
            PolarCacheError: The message is refused.
        """
        self._session.take(spans, payload, has_checksums=has_checksums)

    def commit(self) -> bytes:
        """Makes the blocks visible; the last frame.

        Raises:
            PolarCacheError: A block is not whole, or Redis did not confirm.
        """
        num_stored = self._session.publish(durable=self.durable)
        if self.durable and self._present_keys:
            self._store.persist(self._namespace, self._present_keys)
        self._committed = True
        num_present = self._num_blocks - num_stored
        self._counters.add("stored_present_blocks_total", num_present)
        result = pb.StoreResult(num_stored=num_stored, num_present=num_present)
        return pb.StoreResponse(result=result).SerializeToString()

    def close(self) -> None:
        """Frees what did not become visible, after the writes that run."""
        self._session.close()
        self._counters.add("store_failed_requests_total", not self._committed)


class RetrieveTransfer:
    """A retrieve. Send `header`, then a frame for each of `frames`; `close` in any case.

    Attributes:
        header: The first frame.
        slice_bytes: Bytes of one slice on the wire.
        is_quick: Whether `message` does not block: no codec runs.
    """

    def __init__(
        self,
        store: BlockStore,
        namespace: Namespace,
        pinned: Pinned,
        *,
        packed: bool,
        counters: Counters,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._pinned = pinned
        self._packed = packed
        self._counters = counters
        self.slice_bytes = namespace.codec.slice_bytes(packed=packed)
        self.is_quick = namespace.codec.only_copies(packed=packed)
        self._is_verbatim = namespace.codec.is_verbatim(packed=packed)
        self._num_layers = namespace.spec.layout.num_layers
        header = pb.RetrieveHeader(num_blocks=len(pinned.entries), miss_reason=pinned.miss_reason)
        self.header = pb.RetrieveResponse(header=header).SerializeToString()

    def frames(self, frame_bytes: int) -> Iterator[list[Part]]:
        """What goes into each frame: layer by layer, or block by block in packed form."""
        return plan_frames(self._parts(), max(1, frame_bytes // self.slice_bytes))

    def message(self, frame: list[Part]) -> bytes:
        """A frame that carries its payload, with the checksums it came with where it has them."""
        buffers = self._read(frame)
        spans = _spans(frame)
        for span, buffer in zip(spans, buffers, strict=True):
            known = self._pinned.entries[span.block_index].page.checksums
            came_with = known.get((span.first_layer, span.num_layers))
            if came_with is None or not self._is_verbatim:
                came_with = checksum(buffer)
            span.checksum = came_with
        return join_frame(pb.RetrieveResponse(spans=spans), buffers)

    def into_region(self, frame: list[Part], where: pb.RegionRange, view: memoryview) -> bytes:
        """A frame whose payload is put into shared memory."""
        start_ns = time.monotonic_ns()
        codec = self._namespace.codec
        num_bytes = codec.read_into(self._places(frame), view, packed=self._packed)
        self._count_read(start_ns, num_bytes)
        spans = _spans(frame)
        return pb.RetrieveResponse(spans=spans, region=where).SerializeToString()

    def close(self, *, complete: bool) -> None:
        """Lets go of the blocks, once no frame is being built.

        Args:
            complete: Whether everything was sent.
        """
        self._store.unpin(self._pinned)
        if complete:
            self._counters.add("retrieved_blocks_total", len(self._pinned.entries))
        else:
            self._counters.add("retrieve_failed_requests_total")

    def _parts(self) -> Iterator[Part]:
        """A worker can use RAW layers as they come; a packed block is of use when it is whole."""
        layers = range(self._num_layers)
        for part in [layers] if self._packed else [layers[i : i + 1] for i in layers]:
            for block_index in range(len(self._pinned.entries)):
                yield block_index, part

    def _read(self, frame: list[Part]) -> list[Buffer]:
        start_ns = time.monotonic_ns()
        buffers = self._namespace.codec.read(self._places(frame), packed=self._packed)
        self._count_read(start_ns, sum(len(buffer) for buffer in buffers))
        return buffers

    def _places(self, frame: list[Part]) -> list[Place]:
        entries, memory = self._pinned.entries, self._store.memory
        return [Place(memory.view(entries[i].page), layers) for i, layers in frame]

    def _count_read(self, start_ns: int, num_bytes: int) -> None:
        self._counters.add("codec_decode_ns_total", time.monotonic_ns() - start_ns)
        self._counters.add("sent_payload_bytes_total", num_bytes)


def _spans(frame: list[Part]) -> list[pb.Span]:
    return [
        pb.Span(block_index=i, first_layer=layers.start, num_layers=len(layers))
        for i, layers in frame
    ]


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


def _is_packed(block_format: int) -> bool:
    if block_format not in (pb.BLOCK_FORMAT_RAW, pb.BLOCK_FORMAT_PACKED):
        raise InvalidRequestError(f"format must be RAW or PACKED, got {block_format}")
    return block_format == pb.BLOCK_FORMAT_PACKED
