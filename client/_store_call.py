"""A store, without I/O: which frames to send and what the answers mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from polarcache.client._slices import PackedSlices, RawSlices
from polarcache.client._types import Namespace, StoreResult
from polarcache.proto.errors import InternalError
from polarcache.proto.frames import checksum, join_frame
from polarcache.proto.plan import Part, plan_frames
from polarcache.proto.v1 import polarcache_pb2 as pb

if TYPE_CHECKING:
    from polarcache.client._local import Slot

__all__ = ["StoreCall"]


class StoreCall:
    """One store. Send `begin`, feed every answer, send `frames` once ready, then `commit`.

    Args:
        namespace: Namespace of the blocks.
        block_keys: Their keys.
        slices: The bytes of these and other blocks.
        first_block: Where the first of the keys is in `slices`.
        frame_bytes: Payload bytes of a frame; at least one slice is sent.
        durable: Whether Redis must confirm.
    """

    def __init__(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        slices: RawSlices | PackedSlices,
        *,
        first_block: int,
        frame_bytes: int,
        durable: bool,
    ) -> None:
        self._namespace = namespace
        self._block_keys = block_keys
        self._slices = slices
        self._first_block = first_block
        self._durable = durable
        self._frames: Iterator[list[Part]] = iter(())
        self._per_frame = max(1, frame_bytes // slices.slice_bytes)
        self.slice_bytes = slices.slice_bytes
        self._uses_slots = False
        self.free_slots: list[Slot] = []
        self._slot_of_offset: dict[int, Slot] = {}
        self.is_ready = False
        self.result: StoreResult | None = None
        self._sent_bytes = 0

    def use_slots(self, slots: list[Slot]) -> None:
        """Puts payloads into shared memory instead of the frames; before `begin`."""
        self._uses_slots = True
        self.free_slots = list(slots)
        self._slot_of_offset = {slot.where.offset: slot for slot in slots}
        self._per_frame = slots[0].where.length // self.slice_bytes

    def begin(self) -> bytes:
        """First frame."""
        packed = isinstance(self._slices, PackedSlices)
        begin = pb.StoreBegin(
            namespace_id=self._namespace.namespace_id,
            block_keys=self._block_keys,
            format=pb.BLOCK_FORMAT_PACKED if packed else pb.BLOCK_FORMAT_RAW,
            durable=self._durable,
        )
        return pb.StoreRequest(begin=begin).SerializeToString()

    def on_answer(self, frame: bytes) -> None:
        """Takes an answer: sets `is_ready`, frees a slot, or sets `result`."""
        answer = pb.StoreResponse.FromString(frame)
        if answer.HasField("ready"):
            self._frames = self._plan(answer.ready.wanted)
            self.is_ready = True
        elif answer.HasField("released"):
            self.free_slots.append(self._slot_of_offset[answer.released.offset])
        else:
            self.result = StoreResult(
                answer.result.num_stored, answer.result.num_present, self._sent_bytes
            )

    def finished(self) -> StoreResult:
        """The result, once the stream has ended in order.

        Raises:
            InternalError: The service sent none.
        """
        if self.result is None:
            raise InternalError("the service ended the stream without a result")
        return self.result

    def next_frame(self) -> bytes | None:
        """The next frame of spans, None after the last; needs a free slot where slots are used."""
        frame = next(self._frames, None)
        if frame is None:
            return None
        spans: list[pb.Span] = []
        payload: list[memoryview] = []
        for block_index, layers in frame:
            span = pb.Span(
                block_index=block_index, first_layer=layers.start, num_layers=len(layers)
            )
            parts = self._slices.parts(self._first_block + block_index, layers)
            if not self._uses_slots:
                span.checksum = checksum(*parts)
            spans.append(span)
            payload += parts
        self._sent_bytes += sum(len(part) for part in payload)
        if self._uses_slots:
            return self._fill_slot(spans, payload)
        return join_frame(pb.StoreRequest(spans=spans), payload)

    def _fill_slot(self, spans: list[pb.Span], payload: list[memoryview]) -> bytes:
        slot = self.free_slots.pop()
        end = 0
        for part in payload:
            slot.view[end : end + len(part)] = part
            end += len(part)
        where = pb.RegionRange(offset=slot.where.offset, length=end)
        return pb.StoreRequest(spans=spans, region=where).SerializeToString()

    def frames_and_commit(self) -> Iterator[bytes]:
        """All frames that follow `begin`, where no slots are used."""
        while (frame := self.next_frame()) is not None:
            yield frame
        yield self.commit()

    @staticmethod
    def commit() -> bytes:
        """Last frame."""
        return pb.StoreRequest(commit=True).SerializeToString()

    def _plan(self, wanted: Sequence[int]) -> Iterator[list[Part]]:
        layers = range(self._namespace.spec.layout.num_layers)
        return plan_frames(((block_index, layers) for block_index in wanted), self._per_frame)
