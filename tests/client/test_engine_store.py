"""Engines' blocks to a real service and back, and what happens when it is not there."""

import dataclasses
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from polarcache.client import KvLayout, NamespaceSpec
from polarcache.client import _engine_store as engine_store
from polarcache.client._engine_store import BlockTensors, EngineStore, StoreLimits
from polarcache.proto.errors import InvalidRequestError, LayoutMismatchError

LIMITS = StoreLimits(lookup_timeout_s=5.0, transfer_timeout_s=20.0)
KEYS = [bytes([i]) * 32 for i in range(5)]


def random_blocks(layout: KvLayout, num_blocks: int, seed: int) -> list[BlockTensors]:
    """Strided blocks [L, P, H, D], as an engine's pool of tokens holds them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.block_tokens, layout.num_layers, layout.num_kv_heads)

    def side(width: int) -> torch.Tensor:
        made = torch.randn(*shape, width, generator=generator)
        return made.to(getattr(torch, layout.dtype)).transpose(0, 1)

    return [(side(layout.head_dim), side(layout.v_head_dim)) for _ in range(num_blocks)]


def empty_blocks(layout: KvLayout, num_blocks: int) -> list[BlockTensors]:
    return [
        (torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan))
        for keys, values in random_blocks(layout, num_blocks, 0)
    ]


def same(one: list[BlockTensors], other: list[BlockTensors]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for pair, other_pair in zip(one, other, strict=True)
        for a, b in zip(pair, other_pair, strict=True)
    )


@pytest.fixture
def store(service: Any) -> Iterator[EngineStore]:
    made = EngineStore(service.endpoint, LIMITS)
    yield made
    made.close()


@pytest.mark.parametrize("scratch_blocks", [1, 2, 100])
def test_blocks_pass_through_a_small_buffer(
    service: Any, spec: NamespaceSpec, scratch_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = dataclasses.replace(spec.layout, v_head_dim=32, dtype="bfloat16")
    spec = dataclasses.replace(spec, layout=layout)
    num_bytes = scratch_blocks * layout.raw_block_bytes
    monkeypatch.setattr(engine_store, "_SCRATCH_BYTES", num_bytes)
    store = EngineStore(service.endpoint, LIMITS)
    blocks, got = random_blocks(layout, 5, 1), empty_blocks(layout, 5)

    assert store.count(spec, KEYS) == 0
    assert store.load(spec, KEYS, got) == 0
    assert store.save(spec, KEYS[:3], blocks[:3]) == 3
    assert store.count(spec, KEYS) == 3
    assert store.load(spec, KEYS, got) == 3
    assert same(got[:3], blocks[:3])
    assert torch.isnan(got[3][0]).all()
    assert store.save(spec, KEYS, blocks) == 5
    assert store.load(spec, KEYS, got) == 5
    assert same(got, blocks)
    assert store.delete(spec, KEYS[2:3]) == 1
    assert store.count(spec, KEYS) == 2
    assert store.clear(spec)
    assert store.count(spec, KEYS) == 0
    store.close()


def test_a_load_gives_its_lease_back(store: EngineStore, service: Any, spec: NamespaceSpec) -> None:
    blocks = random_blocks(spec.layout, 5, 1)
    store.save(spec, KEYS, blocks)
    before = service.gauges()["leases"]
    assert store.load(spec, KEYS, blocks) == 5
    assert service.gauges()["leases"] == before


def test_loads_and_saves_end_at_their_deadline(
    service: Any, spec: NamespaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_store, "_SCRATCH_BYTES", spec.layout.raw_block_bytes)
    # Every look at the clock finds another 9 of the 20 seconds gone.
    clock = itertools.count(step=9).__next__
    store = EngineStore(service.endpoint, LIMITS, clock)
    blocks, got = random_blocks(spec.layout, 5, 1), empty_blocks(spec.layout, 5)
    assert store.save(spec, KEYS, blocks) == 2
    assert store.count(spec, KEYS) == 2
    store.save(spec, KEYS[2:], blocks[2:])
    assert store.load(spec, KEYS, got) == 2
    assert same(got[:2], blocks[:2])
    assert torch.isnan(got[2][0]).all()
    store.close()


def test_a_load_ends_where_a_block_was_lost(
    store: EngineStore, spec: NamespaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store._load_scratch, "_num_bytes", 2 * spec.layout.raw_block_bytes)
    blocks, got = random_blocks(spec.layout, 5, 1), empty_blocks(spec.layout, 5)
    store.save(spec, KEYS, blocks)
    retrieve = store._client.retrieve

    def lose_one(match: Any, *, first_block: int, num_blocks: int, out: Any, pack: Any) -> Any:
        num_blocks -= first_block + num_blocks > 3
        tokens = num_blocks * spec.layout.block_tokens
        out = [(keys[:tokens], values[:tokens]) for keys, values in out]
        return retrieve(match, first_block=first_block, num_blocks=num_blocks, out=out, pack=pack)

    monkeypatch.setattr(store._client, "retrieve", lose_one)
    assert store.load(spec, KEYS, got) == 3
    assert same(got[:3], blocks[:3])
    assert torch.isnan(got[3][0]).all()


def test_more_keys_than_one_lookup_takes(
    store: EngineStore, spec: NamespaceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(spec, KEYS[:4], random_blocks(spec.layout, 4, 1))
    for per_call in (1, 2, 3, 4):
        monkeypatch.setattr(engine_store, "_LOOKUP_KEYS", per_call)
        assert store.count(spec, KEYS) == 4


@pytest.mark.parametrize("pack", ["service", "worker"])
def test_quantized_blocks_come_back_close(service: Any, spec: NamespaceSpec, pack: Any) -> None:
    spec = spec.with_profile("k=pair:r4t4,v=int4")
    store = EngineStore(service.endpoint, dataclasses.replace(LIMITS, pack=pack))
    blocks, got = random_blocks(spec.layout, 2, 1), empty_blocks(spec.layout, 2)
    assert store.save(spec, KEYS[:2], blocks) == 2
    assert store.load(spec, KEYS[:2], got) == 2
    for pair, original in zip(got, blocks, strict=True):
        for a, b in zip(pair, original, strict=True):
            assert 0 < float((a - b).float().norm() / b.float().norm()) < 0.2
    store.close()


def test_a_store_that_is_away_is_asked_once_in_a_while(
    spec: NamespaceSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"grpc://127.0.0.1:{probe.getsockname()[1]}"
    now_s = 100.0
    store = EngineStore(endpoint, dataclasses.replace(LIMITS, retry_s=3.0), clock=lambda: now_s)
    store.check(spec)
    assert store.is_away
    blocks = random_blocks(spec.layout, 5, 1)
    asked = []
    store._client.open_namespace = asked.append
    assert store.count(spec, KEYS) == 0
    assert store.load(spec, KEYS, blocks) == 0
    assert store.save(spec, KEYS, blocks) == 0
    assert not store.clear(spec)
    assert asked == []
    assert len(caplog.records) == 1
    del store._client.open_namespace
    now_s += 3.1
    assert store.count(spec, KEYS) == 0
    assert len(caplog.records) == 1
    store.close()


def test_a_store_that_hangs_is_a_miss_within_the_deadline(
    start_service: Callable[..., Any], spec: NamespaceSpec, until: Any
) -> None:
    service = start_service("--redis", "off")
    limits = StoreLimits(lookup_timeout_s=0.5, transfer_timeout_s=1.0, retry_s=0.05)
    store = EngineStore(service.endpoint, limits)
    blocks = random_blocks(spec.layout, 5, 1)
    assert until(lambda: store.save(spec, KEYS, blocks) == 5)
    os.kill(service.process.pid, signal.SIGSTOP)
    try:
        for call in (
            lambda: store.count(spec, KEYS),
            lambda: store.load(spec, KEYS, blocks),
            lambda: store.save(spec, [b"new"], blocks[:1]),
        ):
            time.sleep(0.06)
            began_s = time.monotonic()
            assert call() == 0
            assert 0.1 < time.monotonic() - began_s < 4
    finally:
        os.kill(service.process.pid, signal.SIGCONT)
    assert until(lambda: store.count(spec, KEYS) == 5)
    assert not store.is_away
    store.close()


def test_a_store_that_restarts_is_used_again(
    start_service: Callable[..., Any], spec: NamespaceSpec, until: Any
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    service = start_service("--redis", "off", "--port", port)
    store = EngineStore(service.endpoint, dataclasses.replace(LIMITS, retry_s=0.05))
    blocks, got = random_blocks(spec.layout, 5, 1), empty_blocks(spec.layout, 5)
    assert store.save(spec, KEYS, blocks) == 5
    service.kill()
    assert store.load(spec, KEYS, got) == 0
    service.start()
    assert until(lambda: store.save(spec, KEYS, blocks) == 5)
    assert store.load(spec, KEYS, got) == 5
    assert same(got, blocks)
    store.close()


def test_what_the_operator_must_mend_is_said_at_the_start(
    store: EngineStore, spec: NamespaceSpec
) -> None:
    with pytest.raises(InvalidRequestError, match="profile"):
        store.check(spec.with_profile("k=zip,v=int4"))
    store.check(spec)
    wider = dataclasses.replace(spec.layout, head_dim=128, v_head_dim=128, rotary_dim=128)
    with pytest.raises(LayoutMismatchError, match="head_dim"):
        store.check(dataclasses.replace(spec, layout=wider))


def test_bad_blocks_are_a_miss_and_a_log_line(
    store: EngineStore, spec: NamespaceSpec, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = random_blocks(spec.layout, 2, 1)
    assert store.save(spec, KEYS[:1], [(blocks[0][0][:1], blocks[0][1])]) == 0
    assert "LayoutMismatchError" in caplog.text
    blocks[1][0][0, 0, 0, 0] = float("nan")
    assert store.save(spec, KEYS[:2], blocks) == 0
    assert "NonFiniteError" in caplog.text
    assert not store.is_away


def test_after_close_everything_is_a_miss(store: EngineStore, spec: NamespaceSpec) -> None:
    blocks = random_blocks(spec.layout, 1, 1)
    assert store.save(spec, KEYS[:1], blocks) == 1
    store.close()
    assert store.count(spec, KEYS[:1]) == 0
    assert store.load(spec, KEYS[:1], blocks) == 0
    store._is_closed = False
    store._client.close()
    with pytest.raises(ValueError, match="closed"):
        store.count(spec, KEYS[:1])
