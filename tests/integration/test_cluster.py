"""Redis Cluster: three nodes, blocks spread over them."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from polarcache.cache_service.embedded_redis import redis_server_path
from polarcache.client import NamespaceSpec, chain_keys

SLOTS = 16384


@pytest.fixture
def cluster(until: Any, unused_ports: list[int]) -> Iterator[list[redis.Redis]]:
    """Three primaries on free ports."""
    processes, nodes = [], []
    for port in unused_ports:
        directory = tempfile.mkdtemp(prefix="pc-cluster-")
        processes.append(
            subprocess.Popen(
                [
                    redis_server_path(), "--port", str(port), "--cluster-enabled", "yes",
                    "--bind", "127.0.0.1", "--save", "", "--dir", directory,
                    "--cluster-config-file", str(Path(directory) / "nodes.conf"),
                ],
                stdout=subprocess.DEVNULL,
            )
        )  # fmt: skip
        nodes.append(redis.Redis(port=port))
    for node in nodes:
        until(lambda node=node: _answers(node))
    share = SLOTS // len(nodes) + 1
    for i, node in enumerate(nodes):
        node.execute_command("CLUSTER", "ADDSLOTS", *range(i * share, min((i + 1) * share, SLOTS)))
        if i:
            nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", unused_ports[i])
    for node in nodes:
        until(lambda node=node: b"cluster_state:ok" in _info(node), 30.0)
    yield nodes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def unused_ports() -> list[int]:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    # The cluster bus listens at the port plus 10,000.
    return [port if port < 55_000 else port - 20_000 for port in ports]


def _answers(node: redis.Redis) -> bool:
    try:
        return bool(node.ping())
    except redis.RedisError:
        return False


def _info(node: redis.Redis) -> bytes:
    answer = node.execute_command("CLUSTER", "INFO")
    return answer if isinstance(answer, bytes) else str(answer).encode()


def test_blocks_spill_to_all_nodes_and_come_back(
    start_service: Any, cluster: list[redis.Redis], spec: NamespaceSpec, make_layers: Any,
    are_same: Any,
) -> None:  # fmt: skip
    port = cluster[0].connection_pool.connection_kwargs["port"]
    service = start_service("--redis", f"redis+cluster://127.0.0.1:{port}")
    keys = chain_keys(range(24 * 128), 128)
    layers = make_layers(spec.layout, 24)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, keys, layers, durable=True)
        assert all(node.dbsize() > 0 for node in cluster)
        assert sum(node.dbsize() for node in cluster) == 24
        client.clear(namespace, tiers=["memory"])
        match = client.lookup(namespace, keys)
        assert match.tiers == ("redis",) * 24
        assert are_same(client.retrieve(match).layers, layers)
        assert client.delete(namespace, keys[:2]) == 2
        assert client.clear(tiers=["redis"]).redis_records == 22
    assert sum(node.dbsize() for node in cluster) == 0
