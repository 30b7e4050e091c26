"""Checksums of what a store keeps and a retrieve sends."""

import pytest
import torch

from polarcache.cache_service.memory import MemoryTier
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import Namespace, NamespaceRegistry
from polarcache.cache_service.store import BlockStore
from polarcache.cache_service.tiers.pool import PagePool
from polarcache.cache_service.transfers import Transfers
from polarcache.proto.frames import checksum, join_frame, split_frame
from polarcache.proto.layout import KvLayout, NamespaceSpec
from polarcache.proto.v1 import polarcache_pb2 as pb

LAYERS = 3
LAYOUT = KvLayout(num_layers=LAYERS, num_kv_heads=1, head_dim=16, block_tokens=32)
KEY = b"block"


class Service:
    """A store without a network, and one namespace of it."""

    def __init__(self, profile: str) -> None:
        device = torch.device("cpu")
        self.memory = MemoryTier(PagePool(1 << 20, device))
        store = BlockStore(self.memory, None, Counters())
        registry = NamespaceRegistry(device, 1 << 20)
        self.transfers = Transfers(store, registry, Counters(), 16)
        spec = NamespaceSpec(model="m", layout=LAYOUT, profile=profile)
        self.namespace: Namespace = registry.open(spec)
        self.id = self.namespace.namespace_id
        self.store = store

    def put(self, payload: bytes, block_format: pb.BlockFormat, cuts: list[range]) -> None:
        """Stores the block, its layers in as many spans as there are cuts."""
        begin = pb.StoreBegin(namespace_id=self.id, block_keys=[KEY], format=block_format)
        transfer = self.transfers.begin_store(pb.StoreRequest(begin=begin).SerializeToString())
        size = len(payload) // LAYERS
        for cut in cuts:
            part = payload[cut.start * size : cut.stop * size]
            span = pb.Span(first_layer=cut.start, num_layers=len(cut), checksum=checksum(part))
            frame = join_frame(pb.StoreRequest(spans=[span]), [part])
            request, received = split_frame(pb.StoreRequest, frame)
            transfer.take(request.spans, received)
        transfer.commit()
        transfer.close()

    def get(self, block_format: pb.BlockFormat) -> list[tuple[pb.Span, memoryview]]:
        """Retrieves the block: each span and its bytes."""
        lease = self.store.lookup(self.namespace, [KEY], 60.0).lease
        assert lease is not None
        begin = pb.RetrieveBegin(
            namespace_id=self.id, lease_id=lease.lease_id, num_blocks=1, format=block_format
        )
        request = pb.RetrieveRequest(begin=begin).SerializeToString()
        transfer = self.transfers.begin_retrieve(request)
        spans = []
        for frame in transfer.frames(1):
            answer, payload = split_frame(pb.RetrieveResponse, transfer.message(frame))
            (span,) = answer.spans
            spans.append((span, payload))
        transfer.close(complete=True)
        return spans

    def damage(self, layer: int) -> None:
        """Flips a bit of a stored slice in memory."""
        (entry,) = self.memory.find(self.id, [KEY])
        assert entry is not None
        self.memory.view(entry.page)[layer * self.namespace.codec.packed.slice_bytes + 5] ^= 1


def slices(service: Service, *, packed: bool) -> bytes:
    """Random layers of one block, on the wire."""
    layers = torch.randn(2, LAYERS, 32, 1, 16).half()
    if not packed:
        return layers.transpose(0, 1).contiguous().numpy().tobytes()
    size = service.namespace.codec.packed.slice_bytes
    out = torch.zeros(LAYERS, size, dtype=torch.uint8)
    service.namespace.codec.kernel_codec.encode(layers[0], layers[1], out)
    return out.numpy().tobytes()


@pytest.mark.parametrize(
    ("profile", "block_format"),
    [("exact", pb.BLOCK_FORMAT_RAW), ("k=pair:r4t4:g32,v=int4", pb.BLOCK_FORMAT_PACKED)],
)
def test_a_reader_sees_bytes_that_changed_in_memory(
    profile: str, block_format: pb.BlockFormat
) -> None:
    service = Service(profile)
    payload = slices(service, packed=block_format == pb.BLOCK_FORMAT_PACKED)
    service.put(payload, block_format, [range(i, i + 1) for i in range(LAYERS)])
    got = service.get(block_format)
    assert b"".join(part for _, part in got) == payload
    assert [checksum(part) == span.checksum for span, part in got] == [True] * LAYERS
    service.damage(layer=1)
    got = service.get(block_format)
    assert [checksum(part) == span.checksum for span, part in got] == [True, False, True]


@pytest.mark.parametrize(
    ("profile", "stored", "read"),
    [
        ("exact", pb.BLOCK_FORMAT_RAW, pb.BLOCK_FORMAT_PACKED),
        ("k=pair:r4t4:g32,v=int4", pb.BLOCK_FORMAT_RAW, pb.BLOCK_FORMAT_RAW),
        ("k=pair:r4t4:g32,v=int4", pb.BLOCK_FORMAT_RAW, pb.BLOCK_FORMAT_PACKED),
        ("k=pair:r4t4:g32,v=int4", pb.BLOCK_FORMAT_PACKED, pb.BLOCK_FORMAT_RAW),
    ],
)
def test_other_forms_and_cuts_get_checksums_of_what_is_sent(
    profile: str, stored: pb.BlockFormat, read: pb.BlockFormat
) -> None:
    service = Service(profile)
    payload = slices(service, packed=stored == pb.BLOCK_FORMAT_PACKED)
    service.put(payload, stored, [range(2), range(2, LAYERS)])
    got = service.get(read)
    assert len(got) == LAYERS
    assert all(checksum(part) == span.checksum for span, part in got)
