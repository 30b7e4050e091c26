"""A retrieve, without I/O: what to ask and where the answers' bytes go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polarcache.client._slices import PackedSlices, RawSlices, empty_layers
from polarcache.client._types import LayerTensors, Match
from polarcache.proto.errors import BlockCorruptError, InternalError, InvalidRequestError
from polarcache.proto.frames import checksum, split_frame
from polarcache.proto.v1 import polarcache_pb2 as pb

if TYPE_CHECKING:
    from polarcache.client._local import Slot

__all__ = ["RetrieveCall", "receive_layers"]


class RetrieveCall:
    """One retrieve. Send `begin`, feed every answer, send what it returns.

    Args:
        match: The leased prefix.
        first_block: First block to read.
        num_blocks: Blocks to read; None for all from there on.
        packed: Whether to read packed form.

    Raises:
        InvalidRequestError: The range is outside of the match, or the match has no lease.
    """

    def __init__(
        self,
        match: Match,
        first_block: int,
        num_blocks: int | None,
        *,
        packed: bool,
    ) -> None:
        if num_blocks is None:
            num_blocks = match.num_blocks - first_block
        if not 0 <= first_block <= first_block + num_blocks <= match.num_blocks:
            raise InvalidRequestError(
                f"blocks {first_block} to {first_block + num_blocks} are outside of the match of "
                f"{match.num_blocks} blocks"
            )
        if not match.lease_id and num_blocks:
            raise InvalidRequestError("the lookup took no lease, so its blocks cannot be read")
        self.match = match
        namespace = match.namespace
        self.slice_bytes = (
            namespace.packed_slice_bytes if packed else namespace.spec.layout.raw_slice_bytes
        )
        self._first_block = first_block
        self._packed = packed
        self._num_layers = match.namespace.spec.layout.num_layers
        self._slots: dict[int, Slot] = {}
        self.asked_blocks = num_blocks
        self.num_blocks = 0
        self.miss_reason = ""
        self._target: RawSlices | PackedSlices | None = None
        self._left_of_layer: list[int] = []
        self._releases_left = 0
        self.layers_done = 0

    def use_slots(self, slots: list[Slot]) -> None:
        """Receives payloads in shared memory instead of the frames; before `begin`."""
        self._slots = {slot.where.offset: slot for slot in slots}

    def begin(self) -> bytes:
        """First frame."""
        begin = pb.RetrieveBegin(
            namespace_id=self.match.namespace.namespace_id,
            lease_id=self.match.lease_id,
            first_block=self._first_block,
            num_blocks=self.asked_blocks,
            format=pb.BLOCK_FORMAT_PACKED if self._packed else pb.BLOCK_FORMAT_RAW,
            regions=[slot.where for slot in self._slots.values()],
        )
        return pb.RetrieveRequest(begin=begin).SerializeToString()

    def on_header(self, frame: bytes) -> int:
        """Takes the first answer; the number of blocks that will come."""
        answer = pb.RetrieveResponse.FromString(frame)
        if not answer.HasField("header") or answer.header.num_blocks > self.asked_blocks:
            raise InternalError("the service's first answer was not a fitting header")
        self.num_blocks = answer.header.num_blocks
        self.miss_reason = answer.header.miss_reason
        self._left_of_layer = [self.num_blocks] * self._num_layers
        if self._slots:
            # The service fills each place as far as it goes and waits only when none is left, so
            # it takes one release for each frame beyond the places.
            shortest = min(slot.where.length for slot in self._slots.values())
            per_frame = shortest // self.slice_bytes
            num_frames = -(-self.num_blocks * self._num_layers // per_frame)
            self._releases_left = max(0, num_frames - len(self._slots))
        if not self.num_blocks:
            self.layers_done = self._num_layers
        return self.num_blocks

    def write_to(self, target: RawSlices | PackedSlices) -> None:
        """Says where the blocks go, after the header and before the first span."""
        self._target = target

    def on_answer(self, frame: bytes) -> bytes | None:
        """Takes a frame of spans; returns what to send to the service, if anything.

        Raises:
            BlockCorruptError: Bytes are not what the service sent.
            InternalError: The frame does not fit the request.
        """
        answer, payload = split_frame(pb.RetrieveResponse, frame)
        if answer.HasField("region"):
            slot = self._slots.get(answer.region.offset)
            if slot is None:
                raise InternalError("the service wrote to memory that it was not offered")
            self._copy(answer.spans, slot.view, has_checksums=False)
        else:
            self._copy(answer.spans, payload, has_checksums=True)
        if answer.HasField("region") and self._releases_left:
            self._releases_left -= 1
            return pb.RetrieveRequest(released=answer.region).SerializeToString()
        return None

    @property
    def is_complete(self) -> bool:
        """Whether everything came."""
        return self.layers_done == self._num_layers

    def finish(self) -> None:
        """Checks that everything came.

        Raises:
            InternalError: The service ended the stream early.
        """
        if not self.is_complete:
            raise InternalError(
                f"the service ended the stream after {self.layers_done} of "
                f"{self._num_layers} layers"
            )

    def _copy(self, spans: Sequence[pb.Span], payload: memoryview, *, has_checksums: bool) -> None:
        if self._target is None:
            raise InternalError("spans came before the header")
        start = 0
        for span in spans:
            layers = range(span.first_layer, span.first_layer + span.num_layers)
            end = start + len(layers) * self.slice_bytes
            if (
                span.block_index >= self.num_blocks
                or layers.stop > self._num_layers
                or end > len(payload)
            ):
                raise InternalError("the service sent a span that was not asked for")
            if has_checksums and checksum(payload[start:end]) != span.checksum:
                raise BlockCorruptError(
                    f"block {span.block_index}, layer {span.first_layer}: the bytes are not what "
                    "the service sent"
                )
            for part in self._target.parts(span.block_index, layers):
                part[:] = payload[start : start + len(part)]
                start += len(part)
            for layer in layers:
                self._left_of_layer[layer] -= 1
        while self.layers_done < self._num_layers and not self._left_of_layer[self.layers_done]:
            self.layers_done += 1


def receive_layers(call: RetrieveCall, out: Sequence[tuple[Any, Any]] | None) -> list[LayerTensors]:
    """Has a call write to `out`, or to new tensors; the parts of them that will be written."""
    layout = call.match.namespace.spec.layout
    if out is None:
        layers = empty_layers(layout, call.num_blocks)
        call.write_to(RawSlices(layout, call.num_blocks, layers, writable=True))
        return layers
    call.write_to(RawSlices(layout, call.asked_blocks, out, writable=True))
    tokens = call.num_blocks * layout.block_tokens
    return [(keys[:tokens], values[:tokens]) for keys, values in out]
