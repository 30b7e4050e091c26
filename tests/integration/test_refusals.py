"""What breaks off or is wrong leaves nothing behind and is told in a typed way."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pytest
import torch

from polarcache.client import Client, NamespaceSpec, chain_keys
from polarcache.proto.errors import (
    ChecksumMismatchError,
    InvalidRequestError,
    LeaseExpiredError,
    NonFiniteError,
    PolarCacheError,
)
from polarcache.proto.frames import checksum
from polarcache.proto.status import error_from_rpc
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs

WATCHED = ("memory_blocks", "memory_used_bytes", "pinned_blocks", "leases")


class Raw:
    """Speaks the schema directly, to say what the client never would."""

    def __init__(self, service: Any, spec: NamespaceSpec) -> None:
        self.service = service
        self.stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
        opened = self.stub.OpenNamespace(pb.OpenNamespaceRequest(namespace=spec.to_proto()))
        self.namespace_id = opened.namespace_id
        self.slice_bytes = opened.raw_slice_bytes

    def begin(self, **changes: Any) -> pb.StoreRequest:
        fields = {
            "namespace_id": self.namespace_id,
            "block_keys": [b"a", b"b"],
            "format": pb.BLOCK_FORMAT_RAW,
        }
        return pb.StoreRequest(begin=pb.StoreBegin(**(fields | changes)))

    def spans(self, *where: tuple[int, int, int]) -> pb.StoreRequest:
        spans, payload = [], b""
        for block, first, count in where:
            part = bytes(count * self.slice_bytes)
            spans.append(
                pb.Span(
                    block_index=block,
                    first_layer=first,
                    num_layers=count,
                    checksum=checksum(part),
                )
            )
            payload += part
        return pb.StoreRequest(spans=spans, payload=payload)

    def store(self, requests: Iterable[pb.StoreRequest]) -> list[pb.StoreResponse]:
        try:
            return list(self.stub.Store(iter(list(requests)), timeout=20))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def gauges(self) -> dict[str, int]:
        gauges = self.service.gauges()
        return {name: gauges[name] for name in WATCHED}


@pytest.fixture(scope="module")
def service(tmp_path_factory: Any, start_store: Any) -> Iterator[Any]:
    """Of these tests alone: leases of others that expire meanwhile would change the gauges."""
    running = start_store(tmp_path_factory.mktemp("refusals"), "--memory", "128MiB")
    yield running
    assert running.stop() == 0, running.log_path.read_text()


@pytest.fixture
def raw(service: Any, spec: NamespaceSpec) -> Raw:
    return Raw(service, spec)


COMMIT = pb.StoreRequest(commit=True)


def wrong_checksum(raw: Raw) -> pb.StoreRequest:
    request = raw.spans((0, 0, 1))
    request.spans[0].checksum ^= 1
    return request


def cut_payload(raw: Raw) -> pb.StoreRequest:
    request = raw.spans((0, 0, 1))
    request.payload = request.payload[:-2]
    return request


BAD_STORES = {
    "wrong checksum": (
        lambda raw: [raw.begin(), wrong_checksum(raw), COMMIT],
        ChecksumMismatchError,
        "xxh3-64",
    ),
    "cut payload": (
        lambda raw: [raw.begin(), cut_payload(raw), COMMIT],
        InvalidRequestError,
        "a slice; its payload is",
    ),
    "layer out of range": (
        lambda raw: [raw.begin(), raw.spans((0, 2, 2)), COMMIT],
        InvalidRequestError,
        "outside of 3 layers",
    ),
    "huge layer count": (
        lambda raw: [
            raw.begin(),
            pb.StoreRequest(spans=[pb.Span(num_layers=2**32 - 1)], payload=b"x"),
            COMMIT,
        ],
        InvalidRequestError,
        "its payload is 1",
    ),
    "block out of range": (
        lambda raw: [raw.begin(), raw.spans((2, 0, 1)), COMMIT],
        InvalidRequestError,
        "not wanted",
    ),
    "layer twice": (
        lambda raw: [raw.begin(), raw.spans((0, 0, 2)), raw.spans((0, 1, 1)), COMMIT],
        InvalidRequestError,
        "came before",
    ),
    "commit before whole": (
        lambda raw: [raw.begin(), raw.spans((0, 0, 3), (1, 0, 2)), COMMIT],
        InvalidRequestError,
        "block 1 lacks layers",
    ),
    "no commit": (
        lambda raw: [raw.begin(), raw.spans((0, 0, 3), (1, 0, 3))],
        InvalidRequestError,
        "before its last message",
    ),
    "no begin": (lambda raw: [COMMIT], InvalidRequestError, "must be `begin`"),
    "no format": (
        lambda raw: [raw.begin(format=pb.BLOCK_FORMAT_UNSPECIFIED)],
        InvalidRequestError,
        "RAW or PACKED",
    ),
    "no keys": (lambda raw: [raw.begin(block_keys=[])], InvalidRequestError, "block keys, got 0"),
    "empty key": (lambda raw: [raw.begin(block_keys=[b""])], InvalidRequestError, "key 0 is 0"),
    "long key": (
        lambda raw: [raw.begin(block_keys=[b"k" * 65])],
        InvalidRequestError,
        "expected 1 to 64",
    ),
    "same key twice": (
        lambda raw: [raw.begin(block_keys=[b"a", b"a"])],
        InvalidRequestError,
        "all be different",
    ),
    "too many keys": (
        lambda raw: [raw.begin(block_keys=[str(i).encode() for i in range(16_385)])],
        InvalidRequestError,
        "got 16385",
    ),
    "unknown namespace": (
        lambda raw: [raw.begin(namespace_id=b"?" * 16)],
        PolarCacheError,
        "was not opened",
    ),
    "shared memory over gRPC": (
        lambda raw: [
            raw.begin(),
            pb.StoreRequest(
                spans=raw.spans((0, 0, 1)).spans,
                region=pb.RegionRange(offset=77, length=raw.slice_bytes),
            ),
            COMMIT,
        ],
        InvalidRequestError,
        "local socket alone",
    ),
}


@pytest.mark.parametrize("name", list(BAD_STORES))
def test_a_bad_store_is_refused_and_leaves_nothing(raw: Raw, name: str, until: Any) -> None:
    requests, error, message = BAD_STORES[name]
    before = raw.gauges()
    with pytest.raises(error, match=message):
        raw.store(requests(raw))
    until(lambda: raw.gauges() == before)
    found = raw.stub.Lookup(
        pb.LookupRequest(namespace_id=raw.namespace_id, block_keys=[b"a"], no_lease=True)
    )
    assert not found.tiers


def test_a_malformed_frame_is_refused(raw: Raw, service: Any) -> None:
    channel = grpc.insecure_channel(service.endpoint.split("//")[1])
    stream = channel.stream_stream("/polarcache.v1.KvCache/Store")
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([b"\xff\xff\xff"]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("shared", [0, 16 << 20], ids=["messages", "shared-memory"])
@pytest.mark.parametrize("profile", ["exact", "k=pair:r4t4,v=int4", "k=recursive,v=recursive"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(
    service: Any, raw: Raw, spec: NamespaceSpec, make_layers: Any, until: Any,
    shared: int, profile: str, value: float,
) -> None:  # fmt: skip
    before = raw.gauges()
    keys = chain_keys(range(3 * 128), 128)
    for side in (0, 1):
        layers = make_layers(spec.layout, 3)
        layers[2][side][200, 1, 5] = value
        with service.client(shared_memory_bytes=shared) as client:
            namespace = client.open_namespace(spec.with_profile(profile))
            with pytest.raises(NonFiniteError, match="finite"):
                client.store(namespace, keys, layers)
            assert client.lookup(namespace, keys).num_blocks == 0
            if profile == "exact":
                with pytest.raises(NonFiniteError):
                    client.store(namespace, keys, layers, pack="worker")
    until(lambda: raw.gauges() == before)


def test_packed_bytes_that_decode_to_nan_are_refused(service: Any, spec: NamespaceSpec) -> None:
    with service.client() as client:
        namespace = client.open_namespace(spec.with_profile("k=pair:r4t4,v=int4"))
        with pytest.raises(NonFiniteError, match="finite"):
            client.store_packed(namespace, [b"k"], [b"\xff" * namespace.packed_block_bytes])


def test_a_client_killed_in_mid_stream_leaves_nothing(
    service: Any, raw: Raw, spec: NamespaceSpec, until: Any
) -> None:
    before = raw.gauges()
    program = f"""
import sys, time, grpc
from polarcache.proto.v1 import polarcache_pb2 as pb, polarcache_pb2_grpc as stubs
from polarcache.proto.frames import checksum
stub = stubs.KvCacheStub(grpc.insecure_channel({service.endpoint.split("//")[1]!r}))
part = bytes(3 * {raw.slice_bytes})
def requests():
    yield pb.StoreRequest(begin=pb.StoreBegin(namespace_id={raw.namespace_id!r},
        block_keys=[b"a", b"b"], format=pb.BLOCK_FORMAT_RAW))
    yield pb.StoreRequest(payload=part,
        spans=[pb.Span(block_index=0, num_layers=3, checksum=checksum(part))])
    print("sent", flush=True)
    time.sleep(60)
for _ in stub.Store(requests(), timeout=60):
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"sent\n"
    until(lambda: raw.gauges()["memory_used_bytes"] > before["memory_used_bytes"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: raw.gauges() == before)


def test_a_silent_worker_is_ended(start_service: Any, spec: NamespaceSpec, until: Any) -> None:
    service = start_service("--stream-idle-ms", "300", "--redis", "off")
    raw = Raw(service, spec)
    before = raw.gauges()

    def requests() -> Any:
        yield raw.begin()
        yield raw.spans((0, 0, 1))
        ended.wait(30)

    ended = threading.Event()
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.stub.Store(requests(), timeout=20))
    ended.set()
    assert "sent nothing for 300 ms" in (caught.value.details() or "")
    until(lambda: raw.gauges() == before)


def test_a_refused_message_ends_the_call_while_the_worker_is_silent(raw: Raw, until: Any) -> None:
    before = raw.gauges()
    ended = threading.Event()

    def requests() -> Any:
        yield raw.begin()
        yield raw.spans((1, 0, 3))
        yield wrong_checksum(raw)
        ended.wait(30)

    start_s = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        list(raw.stub.Store(requests(), timeout=25))
    ended.set()
    assert isinstance(error_from_rpc(caught.value), ChecksumMismatchError)
    assert time.monotonic() - start_s < 15  # The service waits for 30 s for a silent worker.
    until(lambda: raw.gauges() == before)


def test_an_expired_lease_reads_nothing(
    service: Any, spec: NamespaceSpec, make_layers: Any, until: Any
) -> None:
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, [b"k"], make_layers(spec.layout, 1))
        before = service.counters()["leases_expired_total"]
        match = client.lookup(namespace, [b"k"], lease_ms=1)
        until(lambda: service.counters()["leases_expired_total"] > before)
        with pytest.raises(LeaseExpiredError):
            client.retrieve(match)
        released = client.lookup(namespace, [b"k"])
        client.release(released)
        with pytest.raises(LeaseExpiredError):
            client.retrieve_packed(released)


@pytest.mark.parametrize("shared", [0, 64 << 20], ids=["messages", "shared-memory"])
def test_an_abandoned_retrieve_unpins_its_blocks(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, until: Any, shared: int
) -> None:
    service = start_service("--redis", "off")
    spec = dataclasses.replace(spec, layout=dataclasses.replace(spec.layout, num_kv_heads=16))
    with service.client(shared_memory_bytes=shared) as client:
        namespace = client.open_namespace(spec)
        keys = chain_keys(range(16 * 128), 128)
        client.store(namespace, keys, make_layers(spec.layout, 16))
        for _ in range(20):
            match = client.lookup(namespace, keys)
            layers = client.retrieve_layers(match)
            next(layers)
            layers.close()
            client.release(match)
        until(lambda: service.gauges()["pinned_blocks"] == 0)
        again = client.retrieve(client.lookup(namespace, keys))
        assert again.num_blocks == 16
    assert "ERROR" not in service.log_path.read_text()


def test_a_service_that_is_not_there_is_typed_at_once(spec: NamespaceSpec) -> None:
    with Client("grpc://127.0.0.1:1", timeout_s=2.0) as client, pytest.raises(PolarCacheError):
        client.open_namespace(spec)
    with pytest.raises(InvalidRequestError, match="grpc://host:port"):
        Client("http://127.0.0.1")


def test_wrong_tensors_are_refused_before_anything_is_sent(
    service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    layers = make_layers(spec.layout, 1)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        for wrong in (
            layers[:2],
            [(k[:64], v) for k, v in layers],
            [(k.to(torch.bfloat16), v) for k, v in layers],
            [(k.numpy().tobytes()[:-1], v) for k, v in layers],
        ):
            with pytest.raises(PolarCacheError, match=r"expected|must be"):
                client.store(namespace, [b"k"], wrong)
        assert client.lookup(namespace, [b"k"]).num_blocks == 0
