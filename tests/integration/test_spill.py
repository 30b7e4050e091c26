"""Blocks between memory and Redis: eviction, promotion, restarts, crashes, damage, outages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polarcache.cache_service.embedded_redis import redis_server_path
from polarcache.client import NamespaceSpec, chain_keys
from polarcache.proto.errors import CapacityError, TierUnavailableError
from polarcache.proto.v1 import polarcache_pb2 as pb

# Ten blocks of the small layout in exact form are 1.875 MiB.
SMALL = ("--memory", "1MiB", "--redis-timeout-ms", "300")
KEYS = chain_keys(range(10 * 128), 128)


def names(redis_server: Any) -> list[bytes]:
    return sorted(redis_server.client().keys("*"))


def test_what_does_not_fit_spills_and_comes_back(
    start_service: Any, redis_server: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    service = start_service(*SMALL, "--redis", redis_server.url)
    layers = make_layers(spec.layout, 10)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, layers)
        match = client.lookup(namespace, KEYS)
        assert match.num_blocks == 10
        assert set(match.tiers) == {"memory", "redis"}
        # Evicted from its end: what memory holds is the beginning of the prefix or the new end.
        assert service.gauges()["memory_used_bytes"] <= 1 << 20
        client.release(match)
        for start in (0, 5):
            half = client.lookup(namespace, KEYS[start : start + 5])
            got = client.retrieve(half)
            assert got.miss_reason == ""
            expected = [(k[start * 128 :][:640], v[start * 128 :][:640]) for k, v in layers]
            assert are_same(got.layers, expected)
            client.release(half)
        assert client.store(namespace, KEYS, layers).sent_bytes == 0
    counters = service.counters()
    assert counters["dropped_blocks_total"] == 0
    assert counters["promoted_blocks_total"] > 0
    assert counters["spilled_blocks_total"] >= counters["evicted_blocks_total"] // 2 > 0
    ttl_s = redis_server.client().ttl(names(redis_server)[0])
    assert 86_000 < ttl_s <= 86_400


def test_a_restarted_service_serves_from_redis(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    service = start_service("--memory", "8MiB")
    layers = make_layers(spec.layout, 10)
    with service.client() as client:
        spec = spec.with_profile("k=pair:r4t4,v=int4")
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, layers)
        before = client.retrieve(client.lookup(namespace, KEYS)).layers
        boot_id = client.describe().boot_id
    assert service.stop() == 0
    service.start()
    with service.client() as client:
        assert client.describe().boot_id != boot_id
        namespace = client.open_namespace(spec)
        match = client.lookup(namespace, KEYS)
        assert match.tiers == ("redis",) * 10
        assert are_same(client.retrieve(match).layers, before)
        assert client.lookup(namespace, KEYS).tiers == ("memory",) * 10


def test_a_client_notices_a_restart_and_opens_its_namespace_again(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any, until: Any
) -> None:
    service = start_service("--memory", "8MiB", "--port", "0")
    layers = make_layers(spec.layout, 2)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS[:2], layers, durable=True)
        port = service.endpoint.rsplit(":", 1)[1]
        service.kill()
        service._flags = ("--memory", "8MiB", "--port", port)
        service.start()

        def found() -> Any:
            try:
                return client.lookup(namespace, KEYS[:2])
            except Exception:
                return None

        match = until(found)
        assert match.tiers == ("redis", "redis")
        assert are_same(client.retrieve(match).layers, layers)
        stored = client.store(namespace, KEYS[2:4], layers)
        assert stored.num_stored == 2


WRITER = """
import sys
import torch
from polarcache.client import Client, NamespaceSpec, KvLayout
endpoint, model, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=64, block_tokens=128)
client = Client(endpoint)
namespace = client.open_namespace(NamespaceSpec(model=model, layout=layout))
number = seed * 100000
while True:
    number += 1
    layers = [tuple(torch.full((128, 2, 64), float((number * 7 + i * 2 + s) % 2000)).half()
                    for s in (0, 1)) for i in range(3)]
    client.store(namespace, [b"crash-%d" % number], layers, durable=number % 3 == 0)
    print(number, int(number % 3 == 0), flush=True)
"""


def test_after_kill_9_every_reported_block_is_right(
    start_service: Any, tmp_path: Path, until: Any, layout: Any
) -> None:
    service = start_service("--memory", "4MiB")
    spec = NamespaceSpec(model="crash", layout=layout)
    durable: set[int] = set()
    written: set[int] = set()
    for round_number in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, service.endpoint, "crash", str(seed)],
                stdout=(tmp_path / f"out{i}").open("wb"),
                stderr=subprocess.DEVNULL,
            )
            for i, seed in ((1, 2 * round_number + 1), (2, 2 * round_number + 2))
        ]
        outputs = [tmp_path / f"out{i}" for i in (1, 2)]
        until(lambda outputs=outputs: all(o.stat().st_size > 400 for o in outputs), 60.0)
        service.kill()
        for writer, output in zip(writers, outputs, strict=True):
            writer.wait(30)
            lines = [line.split() for line in output.read_text().splitlines() if " " in line]
            written |= {int(number) for number, _ in lines}
            durable |= {int(number) for number, is_durable in lines if is_durable == "1"}
        service.start()
        with service.client() as client:
            namespace = client.open_namespace(spec)
            found = 0
            for number in sorted(written):
                match = client.lookup(namespace, [b"crash-%d" % number])
                if match.num_blocks == 0:
                    assert number not in durable
                    continue
                got = client.retrieve(match)
                assert got.num_blocks == 1
                client.release(match)
                for i, pair in enumerate(got.layers):
                    for s, tensor in enumerate(pair):
                        assert tensor.eq((number * 7 + i * 2 + s) % 2000).all()
                found += 1
            assert found >= len(durable) > 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other key", "foreign"])
def test_a_damaged_record_is_a_miss_counted_and_removed(
    start_service: Any, redis_server: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any,
    damage: str,
) -> None:  # fmt: skip
    service = start_service("--redis", redis_server.url, "--memory", "8MiB")
    layers = make_layers(spec.layout, 4)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS[:4], layers, durable=True)
        client.clear(namespace, tiers=["memory"])
        redis = redis_server.client()
        name = f"polarcache:{{{namespace.namespace_id.hex()}:{KEYS[2].hex()}}}"
        record = bytearray(redis.get(name))
        if damage == "flip":
            record[len(record) // 2] ^= 1
        elif damage == "cut":
            del record[-100:]
        elif damage == "empty":
            record = bytearray()
        elif damage == "other key":
            record = bytearray(redis.get(name.replace(KEYS[2].hex(), KEYS[1].hex())))
        else:
            record = bytearray(b"not a record of ours" * 50)
        redis.set(name, bytes(record))

        match = client.lookup(namespace, KEYS[:4])
        assert match.num_blocks == 4
        got = client.retrieve(match)

        assert got.num_blocks == 2
        assert "refused" in got.miss_reason
        assert are_same(got.layers, [(k[:256], v[:256]) for k, v in layers])
        assert not redis.exists(name)
        assert client.lookup(namespace, KEYS[:4]).num_blocks == 2
        assert client.store(namespace, KEYS[:4], layers).num_stored == 1
        again = client.retrieve(client.lookup(namespace, KEYS[:4]))
        assert are_same(again.layers, layers)
    refused = {k: v for k, v in service.counters().items() if k.startswith("redis_refused") and v}
    assert sum(refused.values()) == 1
    assert service.counters()["retrieve_missed_blocks_total"] == 2


def test_a_record_that_left_redis_meanwhile_is_a_miss(
    start_service: Any, redis_server: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", redis_server.url)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS[:2], make_layers(spec.layout, 2), durable=True)
        client.clear(namespace, tiers=["memory"])
        match = client.lookup(namespace, KEYS[:2])
        redis_server.client().flushall()
        got = client.retrieve(match)
        assert (got.num_blocks, got.miss_reason) == (0, "gone from redis")
        assert all(len(k) == 0 for k, _ in got.layers)


@pytest.mark.parametrize("outage", ["stopped", "silent"])
def test_without_redis_memory_serves_and_nothing_hangs(
    start_service: Any, redis_server: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any,
    until: Any, outage: str,
) -> None:  # fmt: skip
    service = start_service(*SMALL, "--redis", redis_server.url)
    layers = make_layers(spec.layout, 2)
    with service.client(timeout_s=5.0) as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS[:2], layers)
        if outage == "stopped":
            redis_server.stop()
        else:
            redis_server.pause()

        start_s = time.monotonic()
        match = client.lookup(namespace, KEYS)
        assert (match.num_blocks, match.partial) == (2, True)
        assert are_same(client.retrieve(match).layers, layers)
        client.release(match)
        with pytest.raises(TierUnavailableError):
            client.store(namespace, KEYS[2:4], layers, durable=True)
        # Room is made by dropping; new blocks are taken all the same.
        ten = make_layers(spec.layout, 10, seed=1)
        other = [b"x" + key for key in KEYS]
        for i in range(10):
            one = [(k[i * 128 :][:128], v[i * 128 :][:128]) for k, v in ten]
            client.store(namespace, other[i : i + 1], one)
        assert time.monotonic() - start_s < 8
        assert service.counters()["dropped_blocks_total"] > 0

        def is_degraded() -> bool:
            return client.describe().health == pb.HEALTH_STATUS_DEGRADED

        until(is_degraded)
        assert "redis" in client.describe().health_reasons[0]
        assert service.gauges()["redis_up"] == 0

        if outage == "stopped":
            redis_server.start()
        else:
            redis_server.resume()
        until(lambda: not is_degraded())
        assert client.store(namespace, [b"back"], [(k[:128], v[:128]) for k, v in layers],
                            durable=True).num_stored == 1  # fmt: skip
        assert not client.lookup(namespace, KEYS).partial


def test_redis_out_of_memory_is_refused_and_counted(
    start_service: Any, start_redis: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    full = start_redis("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    service = start_service("--redis", full.url)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        with pytest.raises(TierUnavailableError, match=r"refused.*maxmemory"):
            client.store(namespace, KEYS, make_layers(spec.layout, 10), durable=True)
        assert client.lookup(namespace, KEYS).num_blocks == 10
        assert client.describe().health == pb.HEALTH_STATUS_OK


def test_leased_blocks_are_not_evicted_and_no_room_is_typed(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, are_same: Any
) -> None:
    service = start_service("--memory", "1MiB", "--redis", "off")
    layers = make_layers(spec.layout, 5)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS[:5], layers)
        match = client.lookup(namespace, KEYS[:5])
        with pytest.raises(CapacityError, match="no room"):
            client.store(namespace, [b"other"], [(k[:128], v[:128]) for k, v in layers])
        assert are_same(client.retrieve(match).layers, layers)
        client.release(match)
        client.store(namespace, [b"other"], [(k[:128], v[:128]) for k, v in layers])
    gauges = service.gauges()
    assert gauges["pinned_blocks"] == 0
    assert gauges["memory_used_bytes"] == gauges["memory_blocks"] * namespace.raw_block_bytes


def test_a_lower_limit_spills_and_the_full_one_returns(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--memory", "4MiB")
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, make_layers(spec.layout, 10))
        lowered = client.set_memory_limit(1 << 20)
        assert lowered.limit_bytes == 1 << 20
        assert lowered.used_bytes <= 1 << 20
        match = client.lookup(namespace, KEYS, lease=False)
        assert match.tiers == ("memory",) * 5 + ("redis",) * 5
        assert client.set_memory_limit(0).limit_bytes == 4 << 20


def test_the_embedded_redis_outlives_a_crash_and_ends_with_the_service(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    assert os.access(redis_server_path(), os.X_OK)
    service = start_service()
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS[:1], make_layers(spec.layout, 1), durable=True)
    service.process.send_signal(signal.SIGKILL)
    service.process.wait(10)
    service.start()
    assert "adopted the redis-server" in service.log_path.read_text()
    with service.client() as client:
        assert client.lookup(client.open_namespace(spec), KEYS[:1]).tiers == ("redis",)
    assert service.stop() == 0
    assert not list((service.directory / "state").glob("*.sock"))
