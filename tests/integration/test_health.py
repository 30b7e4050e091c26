"""What probes and tools see: standard health, reflection, drain."""

import threading
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from polarcache.client import NamespaceSpec, chain_keys
from polarcache.proto.errors import PolarCacheError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def channel(service: Any) -> grpc.Channel:
    return grpc.insecure_channel(service.endpoint.split("//")[1])


def health(service: Any, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel(service))
    return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status)


def test_standard_health_tells_of_the_service_and_of_redis(
    start_service: Any, redis_server: Any, until: Any
) -> None:
    service = start_service("--redis", redis_server.url, "--redis-timeout-ms", "200")
    names = ["", "polarcache.v1.KvCache", "polarcache.v1.KvCacheAdmin", "polarcache.redis"]
    assert [health(service, name) for name in names] == [SERVING] * 4
    redis_server.stop()
    until(lambda: health(service, "polarcache.redis") == NOT_SERVING)
    assert health(service, "") == SERVING
    redis_server.start()
    until(lambda: health(service, "polarcache.redis") == SERVING)


def test_reflection_lists_the_services(service: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel(service))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]))
    names = {one.name for one in answer.list_services_response.service}
    assert {"polarcache.v1.KvCache", "polarcache.v1.KvCacheAdmin"} <= names


def test_sigterm_drains_memory_to_redis(
    start_service: Any, redis_server: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", redis_server.url)
    keys = chain_keys(range(8 * 128), 128)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, keys, make_layers(spec.layout, 8))
    assert service.stop() == 0
    assert redis_server.client().dbsize() == 8


def test_calls_in_flight_end_in_order_or_in_a_typed_error(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", "off", "--drain-timeout-s", "5")
    layers = make_layers(spec.layout, 8)
    outcomes: list[object] = []

    def work() -> None:
        with service.client(timeout_s=5, transfer_timeout_s=10) as client:
            try:
                namespace = client.open_namespace(spec)
                for i in range(10_000):
                    keys = [b"%d %d" % (i, j) for j in range(8)]
                    outcomes.append(client.store(namespace, keys, layers).num_stored)
            except PolarCacheError as error:
                outcomes.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while len(outcomes) < 3:
        pass
    assert service.stop() == 0
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(outcomes[-1], PolarCacheError)
    assert set(outcomes[:-1]) == {8}


def test_a_port_in_use_is_told(start_service: Any, service: Any) -> None:
    port = service.endpoint.rsplit(":", 1)[1]
    with pytest.raises(AssertionError, match="cannot listen"):
        start_service("--redis", "off", "--port", port)


def test_a_redis_that_is_no_url_is_told(start_service: Any) -> None:
    with pytest.raises(AssertionError, match="must be"):
        start_service("--redis", "localhost")
