"""One store in progress: pages that fill up span by span and become visible all at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from polarcache.cache_service.codec import Place
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import Namespace
from polarcache.cache_service.store import BlockStore
from polarcache.cache_service.tiers.pool import Page
from polarcache.proto.errors import ChecksumMismatchError, InvalidRequestError
from polarcache.proto.frames import checksum
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["StoreSession"]


class StoreSession:
    """Blocks on their way into the store.

    `take` may run in several threads, and `close` beside it: no page is freed while it is written.

    Args:
        store: The store.
        namespace: Namespace of the blocks.
        block_keys: Keys of all blocks of the call.
        wanted: Indices of those that will come.
        packed: Whether payloads are in packed form.
        counters: Where to count.
    """

    def __init__(
        self,
        store: BlockStore,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        wanted: Sequence[int],
        *,
        packed: bool,
        counters: Counters,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._block_keys = block_keys
        self._packed = packed
        self._counters = counters
        self._changed = threading.Condition()
        self._closed = False
        self._num_writing = 0
        codec = namespace.codec
        self._only_copies = codec.only_copies(packed=packed)
        self._keeps_checksums = codec.is_verbatim(packed=packed)
        # Pages that are free are taken at once, so that spans need not wait for them.
        free = store.memory.allocate_free(codec.packed_block_bytes, len(wanted))
        self._pages: dict[int, Page] = dict(zip(wanted, free, strict=False))
        # Bit l of a block's mask is set while layer l is missing.
        self._all_layers = (1 << namespace.spec.layout.num_layers) - 1
        self._missing = dict.fromkeys(wanted, self._all_layers)

    def is_quick(self, spans: Sequence[pb.Span]) -> bool:
        """Whether `take` waits for nothing and runs no codec: it is done in a copy's time."""
        return self._only_copies and all(span.block_index in self._pages for span in spans)

    def take(
        self, spans: Sequence[pb.Span], payload: memoryview, *, has_checksums: bool = True
    ) -> None:
        """Checks a message's spans and writes them to their pages.

        Args:
            spans: The spans.
            payload: Their bytes.
            has_checksums: Whether the bytes travelled with checksums.

        Raises:
            InvalidRequestError: A span is out of range, came before, or is of another length.
            ChecksumMismatchError: A span's bytes are not those that were sent.
            NonFiniteError: Keys or values hold NaN, infinity, or what the codec cannot carry.
            CapacityError: There is no room.
        """
        slice_bytes = self._namespace.codec.slice_bytes(packed=self._packed)
        expected = sum(span.num_layers for span in spans) * slice_bytes
        if len(payload) != expected:
            raise InvalidRequestError(
                f"the spans of this message are {expected} bytes, {slice_bytes} a slice; its "
                f"payload is {len(payload)}"
            )
        if has_checksums:
            start = 0
            for span in spans:
                end = start + span.num_layers * slice_bytes
                _verify(span, payload[start:end])
                start = end
        places = self._claim(spans)
        start_ns = time.monotonic_ns()
        try:
            self._namespace.codec.write(places, payload, packed=self._packed)
            if has_checksums and self._keeps_checksums:
                for span in spans:
                    layers = span.first_layer, span.num_layers
                    self._pages[span.block_index].checksums[layers] = span.checksum
        finally:
            with self._changed:
                self._num_writing -= 1
                self._changed.notify_all()
        self._counters.add("codec_encode_ns_total", time.monotonic_ns() - start_ns)
        self._counters.add("received_payload_bytes_total", len(payload))

    def publish(self, *, durable: bool) -> int:
        """Makes the blocks visible; how many were new.

        Raises:
            InvalidRequestError: A block is not whole; none becomes visible.
            TierUnavailableError: `durable` and Redis did not confirm; the blocks are in memory.
        """
        with self._changed:
            partial = [i for i, missing in self._missing.items() if missing]
            if partial or self._closed:
                first = f"; block {partial[0]} lacks layers" if partial else ""
                raise InvalidRequestError(
                    f"commit came before all wanted blocks: {len(partial)} of "
                    f"{len(self._missing)} are not whole{first}"
                )
            blocks = [(self._block_keys[i], self._pages[i]) for i in sorted(self._pages)]
            self._pages = {}
        raw_bytes = self._namespace.spec.layout.raw_block_bytes * len(blocks)
        self._counters.add("stored_raw_bytes_total", raw_bytes)
        return self._store.publish(self._namespace, blocks, durable=durable)

    def close(self) -> None:
        """Frees the pages of blocks that did not become visible."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._num_writing == 0)
            pages, self._pages = self._pages, {}
        self._store.memory.free(list(pages.values()))

    def _claim(self, spans: Sequence[pb.Span]) -> list[Place]:
        """Where the spans go; their layers count as taken and their pages are kept for a writer."""
        with self._changed:
            if self._closed:
                raise InvalidRequestError("the store call has ended")
            places = [self._claim_one(span) for span in spans]
            self._num_writing += 1
            return places

    def _claim_one(self, span: pb.Span) -> Place:
        index = span.block_index
        first, end = span.first_layer, span.first_layer + span.num_layers
        layers = ((1 << span.num_layers) - 1) << first
        if span.num_layers < 1 or layers & ~self._all_layers:
            num_layers = self._namespace.spec.layout.num_layers
            raise InvalidRequestError(
                f"layers {first} to {end} of block {index} are outside of {num_layers} layers"
            )
        if layers & ~self._missing.get(index, 0):
            raise InvalidRequestError(
                f"layers {first} to {end} of block {index} were not wanted or came before"
            )
        if index not in self._pages:
            self._pages[index] = self._store.allocate(self._namespace.codec.packed_block_bytes)
        self._missing[index] &= ~layers
        return Place(self._store.memory.view(self._pages[index]), range(first, end))


def _verify(span: pb.Span, payload: memoryview) -> None:
    if checksum(payload) != span.checksum:
        raise ChecksumMismatchError(
            f"block {span.block_index}, layers from {span.first_layer}: the payload is not "
            "what was sent; expected its xxh3-64"
        )
