"""Both sides with a real store and without vLLM: what one engine stores another one loads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity
from polarcache.client.vllm.link import StoreLink
from polarcache.client.vllm.lookups import Lookups
from polarcache.client.vllm.pins import PinnedBlocks
from polarcache.client.vllm.plan import StepPlan
from polarcache.client.vllm.scheduler import SchedulerSide
from polarcache.client.vllm.worker import WorkerSide

MAX_S = 30.0


class Engine:
    """An engine that computes nothing: its cache is random."""

    def __init__(
        self, identity: EngineIdentity, fakes: SimpleNamespace, make_cache: Any, seed: int,
        **options: Any,
    ) -> None:  # fmt: skip
        config = ConnectorConfig(**{"min_load_tokens": 128, "retry_ms": 50, **options})
        self.identity = identity
        self.fakes = fakes
        self.layers, cache = make_cache(identity, seed)
        self.pool = fakes.Pool(fakes.num_blocks)
        pins = PinnedBlocks(1, fakes.num_blocks)
        pins.bind(self.pool)
        self.link = StoreLink(config, identity.specs)
        self.lookups = Lookups(self.link, config)
        self.side = SchedulerSide(identity, config, self.link, self.lookups, pins)
        self.worker = WorkerSide(identity, config, StoreLink(config, identity.specs), 0, cache)

    def close(self) -> None:
        self.worker.close()
        self.lookups.close()
        self.link.close()

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + MAX_S
        while not (value := condition()):
            assert time.monotonic() < end_s
            time.sleep(0.01)
        return value

    def matched(self, request: Any, num_computed_tokens: int = 0) -> int:
        self.wait_until(
            lambda: self.side.matched_tokens(request, num_computed_tokens)[0] is not None
        )
        tokens, _ = self.side.matched_tokens(request, num_computed_tokens)
        assert tokens is not None
        return tokens

    def compute(self, request: Any, block_ids: list[int]) -> None:
        """One step that computes the request, and waits until its stores are reported."""
        self.side.allocated(request, block_ids, 0)
        output = self.fakes.scheduled(
            {request.request_id: request.num_tokens}, {request.request_id: block_ids}
        )
        plan = self.side.plan(output)
        self.worker.start_stores(plan)
        self.wait_until(lambda: self.report() is None and not self.pool.held)

    def report(self) -> Any:
        report = self.worker.take_report()
        if report is not None:
            self.side.reported(report)
        return report

    def load(self, request: Any, block_ids: list[int], had: int = 0) -> tuple[int, set[int]]:
        """One load; the tokens asked for and the blocks that are missing."""
        tokens = self.matched(request, had)
        self.side.allocated(request, block_ids, tokens)
        self.worker.start_loads(self.side.plan(self.fakes.scheduled({})))
        if tokens:
            self.wait_until(lambda: self.worker.take_finished_loads() == {request.request_id})
        missing = self.worker.take_missing_blocks()
        self.report()
        return tokens, missing

    def tokens(self, block_ids: list[int]) -> list[torch.Tensor]:
        """What is in the cache, for each layer [T, H, 2D]."""
        return [layer[block_ids].transpose(1, 2).flatten(0, 1) for layer in self.layers]


@pytest.fixture
def make_engine(
    identity: EngineIdentity, fakes: SimpleNamespace, make_cache: Any
) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(seed: int, endpoint: str, **options: Any) -> Engine:
        engines.append(Engine(identity, fakes, make_cache, seed, endpoint=endpoint, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("pack", ["service", "worker"])
@pytest.mark.parametrize("shared_memory_bytes", [0, 8 << 20])
def test_what_one_engine_stores_another_loads_bit_for_bit(
    make_engine: Callable[..., Engine], fakes: SimpleNamespace, service: Any, pack: str,
    shared_memory_bytes: int,
) -> None:  # fmt: skip
    options = {"pack": pack, "shared_memory_bytes": shared_memory_bytes}
    one, other = (make_engine(seed, service.endpoint, **options) for seed in (1, 2))
    one.wait_until(lambda: one.link.namespaces and other.link.namespaces)
    here, there = list(range(63)), list(range(127, 64, -1))
    before = [layer.clone() for layer in other.layers]
    one.compute(fakes.Request("r", range(1000)), here)
    # Seven whole stored blocks; the engine has 16 tokens of the first one already.
    tokens, missing = other.load(fakes.Request("s", range(1000)), there, had=16)
    assert (tokens, missing) == (7 * 128 - 16, set())
    assert same(one.tokens(here[1:56]), other.tokens(there[1:56]))
    untouched = [i for i in range(128) if i not in there[1:56]]
    assert all(
        torch.equal(layer[untouched], old[untouched])
        for layer, old in zip(other.layers, before, strict=True)
    )
    # Nothing stays leased, and nothing that was found is stored again.
    assert other.wait_until(lambda: service.gauges()["leases"] == 0)
    stored = service.counters()["stored_blocks_total"]
    request = fakes.Request("s", range(1000))
    other.compute(request, there)
    assert service.counters()["stored_blocks_total"] == stored


def test_blocks_that_are_gone_are_reported_missing(
    make_engine: Callable[..., Engine], fakes: SimpleNamespace, service: Any
) -> None:
    one, other = (make_engine(seed, service.endpoint) for seed in (1, 2))
    one.wait_until(lambda: one.link.namespaces and other.link.namespaces)
    request = fakes.Request("r", range(1000))
    one.compute(request, list(range(63)))
    request = fakes.Request("s", range(1000))
    assert other.matched(request) == 7 * 128
    # Deleted between lookup and load, with its lease ended as if the engine had been slow.
    found = other.lookups.result(other.side._tracked["s"].lookup)  # type: ignore[arg-type]
    assert found is not None
    one.link.client.release(found.matches[0])
    one.link.client.delete(one.link.namespaces[0], request.block_hashes[7::8][4:])
    block_ids = list(range(63))
    other.side.allocated(request, block_ids, 7 * 128)
    other.worker.start_loads(other.side.plan(fakes.scheduled({})))
    other.wait_until(lambda: other.worker.take_finished_loads() == {"s"})
    assert other.worker.take_missing_blocks() == set(range(56))
    other.report()
    assert other.side.matched_tokens(request, 0) == (0, False)


def test_an_engine_finds_a_store_that_comes_and_goes(
    start_service: Any, make_engine: Callable[..., Engine], fakes: SimpleNamespace, free_port: int
) -> None:
    endpoint = f"grpc://127.0.0.1:{free_port}"
    engine = make_engine(1, endpoint, shared_memory_bytes=0, transfer_timeout_ms=2000)
    request = fakes.Request("r", range(1000))
    assert engine.matched(request) == 0
    engine.compute(request, list(range(63)))
    # It appears.
    service = start_service("--port", str(free_port), "--redis", "off")
    engine.wait_until(lambda: engine.link.namespaces)
    engine.wait_until(lambda: engine.worker._link.namespaces)
    engine.compute(fakes.Request("s", range(1000)), list(range(63)))
    assert service.gauges()["memory_blocks"] == 7
    # It dies between lookup and load.
    request = fakes.Request("t", range(1000))
    assert engine.matched(request) == 7 * 128
    service.kill()
    engine.side.allocated(request, list(range(63)), 7 * 128)
    engine.worker.start_loads(engine.side.plan(fakes.scheduled({})))
    engine.wait_until(lambda: engine.worker.take_finished_loads() == {"t"})
    assert engine.worker.take_missing_blocks() == set(range(56))
    engine.report()
    # Stores fail and let go of their blocks; soon nothing is tried any more.
    engine.compute(fakes.Request("u", range(2000, 3000)), list(range(63)))
    engine.wait_until(lambda: not engine.link.namespaces or engine.matched(
        fakes.Request(f"v{time.monotonic()}", range(1000))) == 0)  # fmt: skip
    # It comes back, empty: everything is stored again.
    service.start()
    engine.wait_until(lambda: engine.link.namespaces)
    engine.wait_until(lambda: engine.worker._link.namespaces)
    engine.compute(fakes.Request("w", range(1000)), list(range(63)))
    assert service.gauges()["memory_blocks"] == 7
    assert engine.matched(fakes.Request("x", range(1000))) == 7 * 128


def test_an_idle_worker_waits_for_the_end_of_a_transfer(
    make_engine: Callable[..., Engine], fakes: SimpleNamespace, service: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("polarcache.client.vllm.worker.IDLE_WAIT_S", MAX_S)
    one, other = (make_engine(seed, service.endpoint) for seed in (1, 2))
    one.wait_until(lambda: one.link.namespaces and other.link.namespaces)
    began_s = time.monotonic()
    idle = StepPlan(may_wait=True)
    one.worker.wait_while_idle(idle)  # There is nothing to wait for.
    request, block_ids = fakes.Request("r", range(1000)), list(range(63))
    one.side.allocated(request, block_ids, 0)
    one.worker.start_stores(one.side.plan(fakes.scheduled({"r": 1000}, {"r": block_ids})))
    one.worker.wait_while_idle(idle)
    assert one.report().stores == {0: 1}
    # The lease is given back after the engine is told.
    may_release = threading.Event()
    monkeypatch.setattr(other.worker._link.client, "release", lambda match: may_release.wait(MAX_S))
    request = fakes.Request("s", range(1000))
    other.side.allocated(request, block_ids, other.matched(request))
    plan = other.side.plan(fakes.scheduled({}))
    assert plan.may_wait
    other.worker.start_loads(plan)
    other.worker.wait_while_idle(plan)
    assert other.worker.take_finished_loads() == {"s"}
    assert time.monotonic() - began_s < MAX_S
    may_release.set()


def test_layers_are_waited_for_one_by_one(
    make_engine: Callable[..., Engine], fakes: SimpleNamespace, service: Any
) -> None:
    one, other = (make_engine(seed, service.endpoint, load="layerwise") for seed in (1, 2))
    one.wait_until(lambda: one.link.namespaces and other.link.namespaces)
    one.compute(fakes.Request("r", range(1000)), list(range(63)))
    request = fakes.Request("s", range(1000))
    tokens = other.matched(request)
    assert other.side.matched_tokens(request, 0) == (7 * 128, False)
    other.side.allocated(request, list(range(63)), tokens)
    plan: StepPlan = other.side.plan(fakes.scheduled({}))
    other.worker.start_loads(plan)
    for i, name in enumerate(other.identity.layer_names):
        other.worker.wait_for_layer(name)
        assert torch.equal(other.layers[i][:56], one.layers[i][:56])
    other.worker.wait_for_layer("a layer without a cache")
    other.worker.finish_sync_loads()
    # The engine did not wait outside of the batch, so it is told of nothing.
    assert other.worker.take_finished_loads() == set()
    assert other.worker.take_missing_blocks() == set()


def test_quantized_blocks_come_back_close(
    fakes: SimpleNamespace, make_cache: Any, service: Any, tmp_path: Any
) -> None:
    from polarcache.client.vllm.identity import engine_identity

    config = ConnectorConfig(profile="k=pair:r4t4,v=int4", model="quantized")
    identity = engine_identity(*fakes.engine_configs(tmp_path), config)
    one, other = (
        Engine(identity, fakes, make_cache, seed, endpoint=service.endpoint) for seed in (1, 2)
    )
    try:
        one.wait_until(lambda: one.link.namespaces and other.link.namespaces)
        one.compute(fakes.Request("r", range(1000)), list(range(63)))
        assert other.load(fakes.Request("s", range(1000)), list(range(63))) == (7 * 128, set())
        for mine, theirs in zip(
            one.tokens(list(range(56))), other.tokens(list(range(56))), strict=True
        ):
            error = (mine.float() - theirs.float()).norm() / mine.float().norm()
            # Four bits of normally distributed values: about 0.1.
            assert 0.01 < error < 0.2
    finally:
        one.close()
        other.close()
