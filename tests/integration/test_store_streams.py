"""Streams that carry many stores: reused, ended by deadline, drain and restart."""

import os
import signal
import time
from typing import Any

import grpc
import pytest

from polarcache.client import NamespaceSpec, chain_keys
from polarcache.client._grpc_streams import StoreStream
from polarcache.client._store_call import StoreCall
from polarcache.proto.errors import (
    DeadlineError,
    InvalidRequestError,
    LayoutMismatchError,
    NonFiniteError,
    ServiceUnavailableError,
)
from polarcache.proto.frames import checksum
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs

KEYS = chain_keys(range(3 * 128), 128)


def test_one_stream_carries_calls_one_after_the_other(
    service: Any, spec: NamespaceSpec, until: Any
) -> None:
    stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
    opened = stub.OpenNamespace(pb.OpenNamespaceRequest(namespace=spec.to_proto()))
    part = bytes(3 * opened.raw_slice_bytes)

    def requests() -> Any:
        for key in (b"a", b"b", b"a"):
            yield pb.StoreRequest(
                begin=pb.StoreBegin(
                    namespace_id=opened.namespace_id,
                    block_keys=[key],
                    format=pb.BLOCK_FORMAT_RAW,
                )
            )
            until(lambda: answers and answers[-1].HasField("ready"))
            if answers[-1].ready.wanted:
                span = pb.Span(num_layers=3, checksum=checksum(part))
                yield pb.StoreRequest(spans=[span], payload=part)
            yield pb.StoreRequest(commit=True)
            until(lambda: answers[-1].HasField("result"))

    answers: list[Any] = []
    for answer in stub.Store(requests(), timeout=30):
        answers.append(answer)
    results = [(a.result.num_stored, a.result.num_present) for a in answers[1::2]]
    assert results == [(1, 0), (1, 0), (0, 1)]


def test_a_client_reuses_its_stream_until_a_call_fails(
    service: Any, spec: NamespaceSpec, make_layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[StoreStream] = []
    original = StoreStream.__init__

    def counted(self: StoreStream, *args: Any) -> None:
        opened.append(self)
        original(self, *args)

    monkeypatch.setattr(StoreStream, "__init__", counted)
    layers = make_layers(spec.layout, 1)
    bad = make_layers(spec.layout, 1)
    bad[0][0][0, 0, 0] = float("nan")
    with service.client(shared_memory_bytes=0) as client:
        namespace = client.open_namespace(spec)
        for i in range(3):
            assert client.store(namespace, [b"%d" % i], layers).num_stored == 1
        assert len(opened) == 1
        with pytest.raises(NonFiniteError):
            client.store(namespace, [b"bad"], bad)
        assert client.store(namespace, [b"good"], layers).num_stored == 1
        assert len(opened) == 2


def test_a_frame_that_cannot_be_built_ends_the_call(
    service: Any, spec: NamespaceSpec, make_layers: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(call: StoreCall) -> bytes:
        raise LayoutMismatchError("no such bytes")

    layers = make_layers(spec.layout, 3)
    before = service.gauges()["memory_used_bytes"]
    with service.client(shared_memory_bytes=0) as client:
        namespace = client.open_namespace(spec)
        with monkeypatch.context() as patch:
            patch.setattr(StoreCall, "next_frame", broken)
            with pytest.raises(LayoutMismatchError, match="no such bytes"):
                client.store(namespace, [b"p", b"q", b"r"], layers)
        until(lambda: service.gauges()["memory_used_bytes"] == before)
        assert client.store(namespace, [b"p", b"q", b"r"], layers).num_stored == 3


def test_a_frozen_service_costs_a_worker_its_deadline(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", "off")
    layers = make_layers(spec.layout, 3)
    with service.client(shared_memory_bytes=0, transfer_timeout_s=1.0) as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, [b"a", b"b", b"c"], layers)
        os.kill(service.process.pid, signal.SIGSTOP)
        try:
            start_s = time.monotonic()
            with pytest.raises(DeadlineError):
                client.store(namespace, KEYS, layers)
            assert 0.9 < time.monotonic() - start_s < 10
        finally:
            os.kill(service.process.pid, signal.SIGCONT)


def test_an_idle_stream_does_not_hold_up_a_drain(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", "off", "--drain-timeout-s", "30")
    with service.client(shared_memory_bytes=0) as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, make_layers(spec.layout, 3))
        start_s = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - start_s < 20
        with pytest.raises(ServiceUnavailableError):
            client.store(namespace, [b"a", b"b", b"c"], make_layers(spec.layout, 3))


def test_a_stream_that_ends_within_a_call_is_refused(service: Any, spec: NamespaceSpec) -> None:
    stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
    opened = stub.OpenNamespace(pb.OpenNamespaceRequest(namespace=spec.to_proto()))
    begin = pb.StoreBegin(
        namespace_id=opened.namespace_id, block_keys=[b"x"], format=pb.BLOCK_FORMAT_RAW
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Store(iter([pb.StoreRequest(begin=begin)]), timeout=20))
    assert dict(caught.value.trailing_metadata())["polarcache-reason"] == (
        InvalidRequestError.__name__
    )
