"""Blocks over a real socket and back."""

import dataclasses
from typing import Any

import grpc
import pytest

from polarcache.client import AsyncClient, Client, KvLayout, Match, NamespaceSpec, chain_keys
from polarcache.client.codec import pack_blocks, unpack_blocks
from polarcache.proto.errors import (
    InvalidRequestError,
    LayoutMismatchError,
    NamespaceUnknownError,
)
from polarcache.proto.frames import checksum
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs

TRANSPORTS = {"messages": 0, "shared-memory": 16 << 20}
PROFILES = [
    "exact",
    "k=pair:r4t4:minmax,v=int4",
    "k=pair:r3t3,v=int2",
    "k=recursive,v=recursive",
    "k=exact,v=int4",
    "k=pair:r4t4,v=exact",
    "k=pair:tiers7,v=polar:b8",
    "k=polar:b6,v=polar:b6",
]


@pytest.fixture(params=list(TRANSPORTS))
def client(request: pytest.FixtureRequest, service: Any) -> Any:
    with service.client(shared_memory_bytes=TRANSPORTS[request.param]) as connected:
        yield connected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_exact_blocks_come_back_bit_for_bit(
    client: Client, spec: NamespaceSpec, make_layers: Any, are_same: Any, dtype: str
) -> None:
    layout = dataclasses.replace(spec.layout, dtype=dtype)
    namespace = client.open_namespace(dataclasses.replace(spec, layout=layout))
    keys = chain_keys(range(5 * 128 + 40), 128)
    layers = make_layers(layout, 5)

    stored = client.store(namespace, keys, layers)
    match = client.lookup(namespace, [*keys, b"unknown"])
    got = client.retrieve(match)

    assert (stored.num_stored, stored.num_present) == (5, 0)
    assert (match.num_blocks, match.num_tokens, set(match.tiers)) == (5, 640, {"memory"})
    assert (got.num_blocks, got.num_tokens, got.miss_reason) == (5, 640, "")
    assert are_same(got.layers, layers)
    assert are_same(list(client.retrieve_layers(match)), layers)
    part = client.retrieve(match, first_block=1, num_blocks=2)
    assert are_same(part.layers, [(k[128:384], v[128:384]) for k, v in layers])


@pytest.mark.parametrize("profile", PROFILES)
def test_packing_in_the_worker_equals_packing_in_the_service(
    client: Client, spec: NamespaceSpec, make_layers: Any, are_same: Any, profile: str
) -> None:
    namespace = client.open_namespace(spec.with_profile(profile))
    keys = chain_keys(range(4 * 128), 128)
    layers = make_layers(spec.layout, 4)

    client.store(namespace, keys, layers)
    match = client.lookup(namespace, keys)
    decoded = client.retrieve(match)
    packed = client.retrieve_packed(match)

    assert are_same(unpack_blocks(namespace, packed.blocks), decoded.layers)
    assert [bytes(b) for b in packed.blocks] == [bytes(b) for b in pack_blocks(namespace, layers)]
    assert len(packed.blocks[0]) == namespace.packed_block_bytes

    client.release(match)
    assert client.delete(namespace, keys) == 4
    sent = client.store(namespace, keys, layers, pack="worker").sent_bytes
    assert sent == 4 * namespace.packed_block_bytes
    again = client.retrieve(client.lookup(namespace, keys), pack="worker")
    assert are_same(again.layers, decoded.layers)


def test_packed_blocks_that_span_frames_come_into_given_buffers(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", "off", "--frame-bytes", "256KiB")
    spec = dataclasses.replace(spec, layout=KvLayout(5, 3, 64))
    layers = make_layers(spec.layout, 3)
    with service.client(shared_memory_bytes=0) as client:
        namespace = client.open_namespace(spec)
        assert 2 * namespace.packed_slice_bytes < 256 << 10 < namespace.packed_block_bytes
        blocks = pack_blocks(namespace, layers)
        client.store_packed(namespace, [b"a", b"b", b"c"], blocks)
        match = client.lookup(namespace, [b"a", b"b", b"c", b"d"])
        out = [bytearray(namespace.packed_block_bytes) for _ in range(3)]
        got = client.retrieve_packed(match, out=out)
        assert [bytes(block) for block in out] == [bytes(block) for block in blocks]
        assert all(a is b for a, b in zip(got.blocks, out, strict=True))
        with pytest.raises(LayoutMismatchError, match="writable bytes"):
            client.retrieve_packed(match, out=[bytes(block) for block in out])
        with pytest.raises(LayoutMismatchError, match="writable bytes"):
            client.retrieve_packed(match, out=[block[:-1] for block in out])


@pytest.mark.parametrize(
    "layout",
    [
        KvLayout(2, 1, 64, 128),
        KvLayout(2, 3, 96, rotary_dim=64, rope_pairing="interleaved"),
        KvLayout(1, 2, 80, dtype="bfloat16", block_tokens=256),
        KvLayout(1, 1, 256, block_tokens=128, rotary_dim=0),
    ],
    ids=lambda layout: f"H{layout.num_kv_heads}-D{layout.head_dim}-Dv{layout.v_head_dim}",
)
def test_every_geometry_round_trips(
    client: Client, spec: NamespaceSpec, make_layers: Any, layout: KvLayout
) -> None:
    spec = dataclasses.replace(spec, layout=layout, profile="k=pair:r4t4,v=int4")
    namespace = client.open_namespace(spec)
    keys = chain_keys(range(2 * layout.block_tokens), layout.block_tokens)
    layers = make_layers(layout, 2)
    client.store(namespace, keys, layers)
    got = client.retrieve(client.lookup(namespace, keys))
    for pair, original in zip(got.layers, layers, strict=True):
        for a, b in zip(pair, original, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert float((a - b).float().norm() / b.float().norm()) < 0.2


def test_a_present_block_moves_no_payload(
    client: Client, service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    namespace = client.open_namespace(spec)
    keys = chain_keys(range(4 * 128), 128)
    layers = make_layers(spec.layout, 4)
    client.store(namespace, keys[:3], [(k[:384], v[:384]) for k, v in layers])
    before = service.counters()["received_payload_bytes_total"]

    again = client.store(namespace, keys, layers)

    assert (again.num_stored, again.num_present) == (1, 3)
    assert again.sent_bytes == namespace.raw_block_bytes
    received = service.counters()["received_payload_bytes_total"] - before
    assert received == namespace.raw_block_bytes


def test_layers_may_be_strided_or_plain_buffers(
    client: Client, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    namespace = client.open_namespace(spec)
    layers = make_layers(spec.layout, 2)
    strided = [
        (k.transpose(0, 1).contiguous().transpose(0, 1), v.flip(0).flip(0)) for k, v in layers
    ]
    buffers = [(k.numpy().tobytes(), v.numpy()) for k, v in layers]
    for number, given in enumerate((strided, buffers)):
        keys = [bytes([number, i]) for i in range(2)]
        client.store(namespace, keys, given)
        assert are_same(client.retrieve(client.lookup(namespace, keys)).layers, layers)


async def test_the_async_client_does_the_same(
    service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    for name, shared in TRANSPORTS.items():
        async with AsyncClient(service.endpoint, shared_memory_bytes=shared) as client:
            namespace = await client.open_namespace(dataclasses.replace(spec, salt=name))
            keys = chain_keys(range(40 * 128), 128)
            layers = make_layers(spec.layout, 40)
            stored = await client.store(namespace, keys, layers, durable=True)
            match = await client.lookup(namespace, keys)
            assert (stored.num_stored, match.num_blocks) == (40, 40)
            assert are_same((await client.retrieve(match)).layers, layers)
            assert are_same([pair async for pair in client.retrieve_layers(match)], layers)
            packed = await client.retrieve(match, pack="worker")
            assert are_same(packed.layers, layers)
            await client.release(match)
            assert await client.delete(namespace, keys) == 40
            with pytest.raises(LayoutMismatchError):
                await client.store(namespace, keys, layers[:1])
            layers[0][0][3, 0, 0] = float("nan")
            with pytest.raises(InvalidRequestError, match="finite"):
                await client.store(namespace, keys, layers)


def test_layer_0_comes_while_later_layers_travel(
    service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    layout = dataclasses.replace(spec.layout, num_layers=8, num_kv_heads=8)
    with service.client(shared_memory_bytes=0) as client:
        namespace = client.open_namespace(dataclasses.replace(spec, layout=layout))
        keys = chain_keys(range(8 * 128), 128)
        client.store(namespace, keys, make_layers(layout, 8))
        match = client.lookup(namespace, keys)
        stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
        begin = pb.RetrieveBegin(
            namespace_id=namespace.namespace_id,
            lease_id=match.lease_id,
            num_blocks=8,
            format=pb.BLOCK_FORMAT_RAW,
        )
        header, *frames = stub.Retrieve(iter([pb.RetrieveRequest(begin=begin)]), timeout=20)
    assert header.header.num_blocks == 8
    assert len(frames) > 2
    order = [(s.first_layer, s.block_index) for frame in frames for s in frame.spans]
    assert order == [(layer, block) for layer in range(8) for block in range(8)]


def test_a_plain_stub_of_any_language_can_store_and_retrieve(
    service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    """Frames are ordinary protobuf: spans in any order, whole blocks or single layers."""
    stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
    opened = stub.OpenNamespace(pb.OpenNamespaceRequest(namespace=spec.to_proto()))
    layers = make_layers(spec.layout, 2)
    key_bytes = [[t.numpy()[b * 128 : b * 128 + 128].tobytes() for t in pair]
                 for b in range(2) for pair in layers]  # fmt: skip
    slices = {(b, la): b"".join(key_bytes[b * 3 + la]) for b in range(2) for la in range(3)}

    def span(block: int, first: int, count: int) -> tuple[pb.Span, bytes]:
        payload = b"".join(slices[block, layer] for layer in range(first, first + count))
        return pb.Span(block_index=block, first_layer=first, num_layers=count,
                       checksum=checksum(payload)), payload  # fmt: skip

    def requests() -> Any:
        yield pb.StoreRequest(
            begin=pb.StoreBegin(
                namespace_id=opened.namespace_id, block_keys=[b"k0", b"k1"],
                format=pb.BLOCK_FORMAT_RAW,
            )
        )  # fmt: skip
        for parts in ([span(1, 2, 1), span(0, 0, 1)], [span(0, 1, 2)], [span(1, 0, 2)]):
            yield pb.StoreRequest(
                spans=[s for s, _ in parts], payload=b"".join(p for _, p in parts)
            )
        yield pb.StoreRequest(commit=True)

    *_, last = stub.Store(requests(), timeout=20)
    assert last.result.num_stored == 2
    found = stub.Lookup(
        pb.LookupRequest(namespace_id=opened.namespace_id, block_keys=[b"k0", b"k1"])
    )
    begin = pb.RetrieveBegin(
        namespace_id=opened.namespace_id, lease_id=found.lease_id, num_blocks=2,
        format=pb.BLOCK_FORMAT_RAW,
    )  # fmt: skip
    _, *frames = stub.Retrieve(iter([pb.RetrieveRequest(begin=begin)]), timeout=20)
    for frame in frames:
        start = 0
        for one in frame.spans:
            expected = slices[one.block_index, one.first_layer]
            assert frame.payload[start : start + len(expected)] == expected
            assert one.checksum == checksum(expected)
            start += len(expected)


def test_namespaces_do_not_see_each_other(
    client: Client, spec: NamespaceSpec, make_layers: Any
) -> None:
    mine = client.open_namespace(spec)
    other = client.open_namespace(dataclasses.replace(spec, tenant="other"))
    client.store(mine, [b"same key"], make_layers(spec.layout, 1))
    assert client.lookup(other, [b"same key"]).num_blocks == 0
    assert client.lookup(mine, [b"same key"]).num_blocks == 1


def test_opening_again_is_the_same_and_a_conflict_is_refused(
    client: Client, spec: NamespaceSpec
) -> None:
    first = client.open_namespace(spec.with_profile("k=pair,v=int4"))
    again = client.open_namespace(spec.with_profile("k=pair:r4t4:arc:g128,v=int4"))
    assert first == again
    assert first.spec.profile == "k=pair:r4t4,v=int4"
    assert (first.key_bits, first.value_bits) == (4.25, 4.5)
    for change in ({"head_dim": 128, "rotary_dim": 128}, {"rope_pairing": "interleaved"}):
        layout = dataclasses.replace(spec.layout, **change)
        with pytest.raises(LayoutMismatchError, match=next(iter(change))):
            client.open_namespace(dataclasses.replace(spec, layout=layout))
    other_block = dataclasses.replace(spec.layout, block_tokens=256)
    assert client.open_namespace(dataclasses.replace(spec, layout=other_block)) != first


def test_what_the_service_cannot_do_is_typed(service: Any, spec: NamespaceSpec) -> None:
    with service.client() as client:
        namespace = client.open_namespace(spec)
        with pytest.raises(InvalidRequestError, match="profile"):
            client.open_namespace(spec.with_profile("k=zip,v=int4"))
        with pytest.raises(InvalidRequestError, match="1 to 64"):
            client.lookup(namespace, [bytes(65)])
        with pytest.raises(InvalidRequestError, match="block keys, got 20000"):
            client.lookup(namespace, [str(i).encode() for i in range(20_000)])
        unknown = dataclasses.replace(namespace, namespace_id=b"?" * 16)
        with pytest.raises(NamespaceUnknownError):
            client.lookup(unknown, [b"k"])
        no_lease = Match(namespace, ("memory",), b"", 0, partial=False)
        with pytest.raises(InvalidRequestError, match="lease"):
            client.retrieve(no_lease)
