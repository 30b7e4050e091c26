"""LMCache's own storage manager, as its multi-process server runs it, with PolarCache as its L2."""

import argparse
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache", reason="make test-lmcache installs LMCache")

from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import (
    add_l2_adapters_args,
    parse_args_to_l2_adapters_config,
)
from lmcache.v1.distributed.storage_manager import StorageManager

from polarcache.client.lmcache import PolarCacheL2Adapter
from polarcache.proto.errors import InvalidRequestError

CHUNK_TOKENS, LAYERS, HEADS, HEAD_DIM = 64, 3, 2, 64
SHAPES = {
    "split": [2, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM],
    "packed": [1, LAYERS, CHUNK_TOKENS, HEADS * 2 * HEAD_DIM],
    "packed-3d": [LAYERS, CHUNK_TOKENS, HEADS * 2 * HEAD_DIM],
}


class Server:
    """What LMCache's server does with its storage manager, for one object group."""

    def __init__(self, adapter: dict[str, Any], shape: str = "split") -> None:
        parser = add_l2_adapters_args(argparse.ArgumentParser())
        arguments = parser.parse_args(["--l2-adapter", json.dumps(adapter)])
        memory = L1MemoryManagerConfig(
            size_in_bytes=64 << 20, use_lazy=False, shm_name=f"polarcache-{uuid.uuid4().hex}"
        )
        self.manager = StorageManager(
            StorageManagerConfig(
                L1ManagerConfig(memory),
                EvictionConfig("LRU"),
                parse_args_to_l2_adapters_config(arguments),
            )
        )
        self.layout = MemoryLayoutDesc([torch.Size(SHAPES[shape])], [torch.float16])

    @property
    def adapter(self) -> PolarCacheL2Adapter:
        ((_, adapter),) = self.manager.l2_adapters()
        return adapter

    def store(self, keys: list[ObjectKey], chunks: list[torch.Tensor]) -> None:
        """Puts chunks into L1; LMCache copies them to L2 by itself."""
        objects = self.manager.reserve_write(keys, self.layout)
        assert len(objects) == len(keys)
        for key, chunk in zip(keys, chunks, strict=True):
            objects[key].tensor.copy_(chunk)
        self.manager.finish_write(keys)

    def fetch(self, keys: list[ObjectKey]) -> tuple[int, list[torch.Tensor]]:
        """Brings the stored prefix into L1; how much of it came from L2, and the chunks."""
        rows = [GroupedObjectKeys(keys, keys[0].object_group_id, self.layout)]
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(rows))
        assert self.manager.wait_prefetch_status(handle, 30)
        result = self.manager.query_prefetch_status(handle)
        hits = keys[: result.hit_cells[0].popcount()]
        with self.manager.read_prefetched_results(hits) as objects:
            chunks = [one.tensor.clone() for one in objects or []]
        self.manager.finish_read_prefetched(hits)
        return result.l2_hit_count, chunks


def chunk_keys(model: str, num_chunks: int, rank: int = 0, **fields: Any) -> list[ObjectKey]:
    kv_rank = ObjectKey.ComputeKVRank(2, rank, 2, rank)
    return [
        ObjectKey(bytes([i + 1]) * 32, model.replace("@", "-"), kv_rank, **fields)
        for i in range(num_chunks)
    ]


def random_chunks(shape: str, num_chunks: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(SHAPES[shape], generator=generator).to(torch.float16) for _ in range(num_chunks)
    ]


@pytest.fixture
def start_server(service: Any) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(shape: str = "split", **options: Any) -> Server:
            params = {
                "endpoint": service.endpoint, "num_kv_heads": HEADS, "head_dim": HEAD_DIM,
            } | options  # fmt: skip
            server = Server(
                {
                    "type": "plugin",
                    "module_path": "polarcache.client.lmcache",
                    "class_name": "PolarCacheL2Adapter",
                    "adapter_params": params,
                },
                shape,
            )
            stack.callback(server.manager.close)
            return server

        yield start


@pytest.mark.parametrize("shape", list(SHAPES))
def test_chunks_of_one_server_are_fetched_by_another(
    start_server: Callable[..., Server], spec: Any, until: Any, shape: str
) -> None:
    keys, chunks = chunk_keys(spec.model, 5), random_chunks(shape, 5, 1)
    one, other = start_server(shape), start_server(shape)
    one.store(keys[:4], chunks[:4])

    until(lambda: other.fetch(keys)[0] == 4)
    third = start_server(shape)
    num_hits, got = third.fetch(keys)

    assert num_hits == 4
    assert all(torch.equal(a, b) for a, b in zip(got, chunks[:4], strict=True))
    assert third.adapter.report_status()["is_healthy"]
    for other_keys in (
        chunk_keys(spec.model, 5, rank=1),
        chunk_keys(spec.model, 5, cache_salt="tenant-a"),
        chunk_keys(spec.model, 5, object_group_id=1),
        chunk_keys("another", 5),
    ):
        assert third.fetch(other_keys)[0] == 0


@pytest.mark.parametrize("pack", ["service", "worker"])
@pytest.mark.parametrize("shape", ["split", "packed"])
def test_a_quantized_profile_comes_back_close(
    start_server: Callable[..., Server], spec: Any, until: Any, shape: str, pack: str
) -> None:
    options = {"profile": "k=pair:r4t4:g64,v=int4", "pack": pack}
    keys, chunks = chunk_keys(spec.model, 3), random_chunks(shape, 3, 2)
    start_server(shape, **options).store(keys, chunks)
    got: list[torch.Tensor] = []

    def is_there() -> bool:
        num_hits, got[:] = start_server(shape, **options).fetch(keys)
        return num_hits == 3

    until(is_there)
    for a, b in zip(got, chunks, strict=True):
        assert 0 < float((a - b).float().norm() / b.float().norm()) < 0.2


def test_without_a_store_the_server_starts_and_misses_until_it_comes(
    start_server: Callable[..., Server], start_service: Callable[..., Any], spec: Any, until: Any
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(endpoint=f"grpc://127.0.0.1:{port}", retry_ms=50)
    keys, chunks = chunk_keys(spec.model, 3), random_chunks("split", 3, 3)
    began_s = time.monotonic()
    assert server.fetch(keys)[0] == 0
    assert time.monotonic() - began_s < 5
    assert not server.adapter.report_status()["is_healthy"]

    start_service("--redis", "off", "--port", str(port))
    server.store(keys, chunks)

    def is_there() -> bool:
        # LMCache tries a store to L2 once: the next chunks go there.
        more = chunk_keys(f"{spec.model}-{time.monotonic()}", 3)
        server.store(more, chunks)
        other = start_server(endpoint=f"grpc://127.0.0.1:{port}")
        try:
            return bool(until(lambda: other.fetch(more)[0] == 3, 2))
        except AssertionError:
            return False

    assert until(is_there)


def test_objects_that_cannot_be_stored_are_missing(
    start_server: Callable[..., Server], spec: Any, caplog: pytest.LogCaptureFixture, until: Any
) -> None:
    server = start_server(num_kv_heads=HEADS + 1)
    keys = chunk_keys(spec.model, 2)
    server.store(keys, random_chunks("split", 2, 4))
    until(lambda: "cannot store objects" in caplog.text)
    assert start_server(num_kv_heads=HEADS + 1).fetch(keys)[0] == 0


def test_wrong_options_are_refused_when_the_server_starts(
    start_server: Callable[..., Server],
) -> None:
    with pytest.raises(InvalidRequestError, match="endpont"):
        start_server(endpont="grpc://127.0.0.1:1")
    with pytest.raises(InvalidRequestError, match="head_dim"):
        start_server(head_dim=None)
