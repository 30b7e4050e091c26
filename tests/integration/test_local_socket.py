"""Shared memory with a worker on the same host: used by itself, never required."""

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from polarcache.client import NamespaceSpec, chain_keys
from polarcache.client._local import LocalConnection
from polarcache.proto.errors import NonFiniteError
from polarcache.proto.local import SIZE

KEYS = chain_keys(range(6 * 128), 128)


def test_it_is_used_by_itself_and_freed_when_the_worker_goes(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any, until: Any
) -> None:
    service = start_service("--redis", "off")
    layers = make_layers(spec.layout, 6)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        # Set up before the first transfer needs it.
        assert service.gauges()["local_workers"] == 1
        client.store(namespace, KEYS, layers)
        match = client.lookup(namespace, KEYS)
        assert are_same(client.retrieve(match).layers, layers)
        assert service.gauges()["local_workers"] == 1
        assert service.gauges()["shared_bytes"] == 16 << 20
    until(lambda: service.gauges()["shared_bytes"] == 0)
    assert service.gauges()["local_workers"] == 0
    path = Path(client_socket(service))
    assert path.stat().st_mode & 0o077 == 0


def client_socket(service: Any) -> str:
    with service.client(shared_memory_bytes=0) as client:
        return str(client.describe().local_socket)


def test_many_threads_share_the_connections(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    service = start_service("--redis", "off")
    failures: list[BaseException] = []
    with service.client() as client:
        namespace = client.open_namespace(spec)

        def work(number: int) -> None:
            try:
                layers = make_layers(spec.layout, 2, seed=number)
                for i in range(5):
                    keys = [b"%d %d %d" % (number, i, j) for j in range(2)]
                    client.store(namespace, keys, layers)
                    match = client.lookup(namespace, keys)
                    assert are_same(client.retrieve(match).layers, layers)
                    client.release(match)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert service.gauges()["local_workers"] == 4


def test_without_it_everything_works(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    service = start_service("--redis", "off", "--no-shared-memory")
    layers = make_layers(spec.layout, 6)
    with service.client() as client:
        assert client.describe().local_socket == ""
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, layers)
        assert are_same(client.retrieve(client.lookup(namespace, KEYS)).layers, layers)


def test_over_the_limit_blocks_travel_over_grpc(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    service = start_service("--redis", "off", "--shared-memory-limit", "1MiB")
    layers = make_layers(spec.layout, 6)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, layers)
        assert are_same(client.retrieve(client.lookup(namespace, KEYS)).layers, layers)
        assert service.gauges()["shared_bytes"] == 0


def test_a_refused_call_drops_the_connection_and_the_next_gets_another(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any, until: Any
) -> None:
    service = start_service("--redis", "off")
    with service.client() as client:
        namespace = client.open_namespace(spec)
        for _ in range(6):
            bad = make_layers(spec.layout, 6)
            bad[1][0][0, 0, 0] = float("inf")
            with pytest.raises(NonFiniteError, match="finite"):
                client.store(namespace, KEYS, bad)
        layers = make_layers(spec.layout, 6)
        client.store(namespace, KEYS, layers)
        assert are_same(client.retrieve(client.lookup(namespace, KEYS)).layers, layers)
        until(lambda: service.gauges()["local_workers"] == 1)


def test_another_service_s_socket_is_left_alone(start_service: Any) -> None:
    service = start_service("--redis", "off")
    with pytest.raises(OSError, match="another service"):
        LocalConnection(client_socket(service), "0" * 32, 1 << 20)


@pytest.mark.parametrize("fault", ["no descriptor", "not sealed", "wrong size", "garbage"])
def test_a_faulty_handshake_is_refused(start_service: Any, fault: str) -> None:
    service = start_service("--redis", "off")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect(client_socket(service))
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    if fault == "no descriptor":
        connection.sendall(SIZE.pack(4096))
    elif fault == "garbage":
        connection.sendall(b"\xff" * 100)
    else:
        size = 8192 if fault == "wrong size" else 4096
        socket.send_fds(connection, [SIZE.pack(size)], [fd])
    os.close(fd)
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    assert service.gauges()["shared_bytes"] == 0
