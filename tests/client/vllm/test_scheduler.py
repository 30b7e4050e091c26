"""The scheduler's side, against a store that answers when told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity
from polarcache.client.vllm.plan import IDLE_WAIT_S, StepPlan, WorkerReport
from polarcache.proto.errors import DeadlineError
from tests.client.vllm.scheduler_fakes import BLOCK, Engine, keys_of


def test_a_lookup_is_awaited_and_led_to_a_load(engine: Engine, prompt: Any, until: Any) -> None:
    engine.store.has[0].update(keys_of(prompt, 5))
    engine.store.may_answer.clear()
    engine.side.on_new_request(prompt)
    assert engine.side.matched_tokens(prompt, 0) == (None, False)
    engine.store.may_answer.set()
    assert engine.answered(prompt) == (5 * BLOCK, True)
    assert engine.store.asked == [7]
    block_ids = list(range(40, 103))
    engine.side.allocated(prompt, block_ids, 5 * BLOCK)
    (load,) = engine.side.plan(engine.fakes.scheduled({})).loads
    assert (load.first_block, load.num_blocks, load.skip_tokens) == (0, 5, 0)
    assert load.block_ids == tuple(range(40, 80))
    assert load.prefixes[0].num_blocks == 5
    # The worker gives the lease back; the second call for the same load changes nothing.
    assert engine.store.leases == {load.prefixes[0].lease_id}
    engine.side.allocated(prompt, block_ids, 0)
    assert engine.side.plan(engine.fakes.scheduled({})) == StepPlan(may_wait=True)


def test_an_idle_engine_waits_a_little_for_a_lookup(
    engine: Engine, fakes: SimpleNamespace, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.store.has[0].update(keys_of(prompt, 5))
    engine.store.may_answer.clear()
    waits: list[float] = []

    def wait_in_vain(lookup: Any, timeout_s: float) -> None:
        waits.append(timeout_s)
        engine.now_s += 0.75 * IDLE_WAIT_S

    def wait(lookup: Any, timeout_s: float) -> None:
        waits.append(timeout_s)
        engine.store.may_answer.set()
        lookup.future.result(20)

    monkeypatch.setattr(engine.lookups, "wait", wait_in_vain)
    others = [fakes.Request(name, range(1000)) for name in "stuv"]
    for other in others:
        assert engine.side.matched_tokens(other, 0) == (None, False)
    # However many requests there are: not longer than this altogether.
    assert waits == pytest.approx([IDLE_WAIT_S, 0.25 * IDLE_WAIT_S])
    assert engine.side.plan(engine.fakes.scheduled({})) == StepPlan(may_wait=False)
    for other in others:
        engine.side.finished(other.request_id)
    # In the next step it waits again, and has the answer at once.
    monkeypatch.setattr(engine.lookups, "wait", wait)
    assert engine.side.matched_tokens(prompt, 0) == (5 * BLOCK, True)
    assert waits[2:] == pytest.approx([IDLE_WAIT_S])


def test_a_computing_engine_waits_for_no_lookup(
    engine: Engine, fakes: SimpleNamespace, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.step(fakes.Request("s", range(100)), 100)
    engine.store.may_answer.clear()
    waits: list[Any] = []
    monkeypatch.setattr(engine.lookups, "wait", lambda *arguments: waits.append(arguments))
    assert engine.side.matched_tokens(prompt, 0) == (None, False)
    assert waits == []
    engine.side.finished("s")
    assert engine.side.matched_tokens(prompt, 0) == (None, False)
    assert len(waits) == 1
    engine.store.may_answer.set()


def test_only_what_the_engine_lacks_is_loaded(engine: Engine, prompt: Any) -> None:
    engine.store.has[0].update(keys_of(prompt, 5))
    # Nine engine blocks: one whole stored block and 16 tokens of the next.
    assert engine.answered(prompt, 144) == (5 * BLOCK - 144, True)
    engine.side.allocated(prompt, list(range(63)), 5 * BLOCK - 144)
    (load,) = engine.side.plan(engine.fakes.scheduled({})).loads
    assert (load.first_block, load.num_blocks, load.skip_tokens) == (1, 4, 16)
    assert load.block_ids == tuple(range(9, 40))


def test_the_last_token_is_always_computed(engine: Engine, fakes: SimpleNamespace) -> None:
    request = fakes.Request("r", range(3 * BLOCK))
    engine.store.has[0].update(keys_of(request, 3))
    # Its block is loaded nevertheless, for the tokens before it.
    assert engine.answered(request) == (3 * BLOCK - 1, True)
    engine.side.allocated(request, list(range(24)), 3 * BLOCK - 1)
    (load,) = engine.side.plan(engine.fakes.scheduled({})).loads
    assert (load.first_block, load.num_blocks, load.skip_tokens) == (0, 3, 0)
    assert load.block_ids == tuple(range(24))


def test_a_lease_is_given_back_when_nothing_is_loaded(
    engine: Engine, prompt: Any, until: Any
) -> None:
    engine.store.has[0].update(keys_of(prompt, 5))
    assert engine.answered(prompt) == (5 * BLOCK, True)
    assert engine.store.leases
    engine.side.allocated(prompt, list(range(63)), 0)
    until(lambda: not engine.store.leases)
    engine.answered(prompt)
    assert engine.store.leases
    engine.side.finished("r")
    until(lambda: not engine.store.leases)


def test_a_request_that_ends_before_its_lookup_leaves_no_lease(
    engine: Engine, prompt: Any, until: Any
) -> None:
    engine.store.has[0].update(keys_of(prompt, 5))
    engine.store.may_answer.clear()
    engine.side.on_new_request(prompt)
    until(lambda: engine.lookups._threads._work_queue.empty())
    engine.side.finished("r")
    engine.store.may_answer.set()
    until(lambda: engine.store.asked and not engine.store.leases)


def test_little_is_recomputed_rather_than_loaded(
    identity: EngineIdentity, fakes: SimpleNamespace, prompt: Any, until: Any
) -> None:
    engine = Engine(identity, fakes, min_load_tokens=4 * BLOCK)
    engine.store.has[0].update(keys_of(prompt, 5))
    assert engine.answered(prompt, 2 * BLOCK) == (0, False)
    engine.side.allocated(prompt, list(range(63)), 0)
    until(lambda: not engine.store.leases)
    # Where no load can be long enough the store is not even asked.
    asked = len(engine.store.asked)
    assert engine.side.matched_tokens(prompt, 5 * BLOCK) == (0, False)
    assert len(engine.store.asked) == asked


def test_slow_loads_are_recomputed(
    identity: EngineIdentity, fakes: SimpleNamespace, prompt: Any
) -> None:
    engine = Engine(identity, fakes, min_load_bytes_per_s=1e9)
    engine.store.has[0].update(keys_of(prompt, 5))
    assert engine.answered(prompt) == (5 * BLOCK, True)
    engine.side.reported(WorkerReport(loads={"x": 1}, loaded_bytes=1000, load_s=1.0))
    assert engine.answered(prompt) == (0, False)


def test_a_slow_or_failed_lookup_is_a_miss(
    identity: EngineIdentity, fakes: SimpleNamespace, prompt: Any, until: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = Engine(identity, fakes, lookup_timeout_ms=50)
    engine.store.has[0].update(keys_of(prompt, 5))
    engine.store.may_answer.clear()
    assert engine.answered(prompt) == (0, False)
    # Not without a word.
    assert "no answer after 50 ms" in caplog.text
    engine.store.may_answer.set()
    until(lambda: engine.store.asked and not engine.store.leases)
    engine.store.error = DeadlineError("late")
    assert engine.answered(fakes.Request("s", range(1000))) == (0, False)
    assert engine.store.errors == [engine.store.error]
    # Not even an error of ours may reach the engine.
    engine.store.error = RuntimeError("a bug")
    assert engine.answered(fakes.Request("t", range(1000))) == (0, False)


def test_a_store_that_is_away_costs_nothing(engine: Engine, prompt: Any) -> None:
    engine.store.namespaces = ()
    engine.side.on_new_request(prompt)
    assert engine.side.matched_tokens(prompt, 0) == (0, False)
    assert engine.step(prompt, 1000) == StepPlan()
    assert engine.pool.held == set()


def test_a_failed_load_is_not_tried_again_and_its_blocks_are_stored(
    engine: Engine, prompt: Any
) -> None:
    engine.store.has[0].update(keys_of(prompt, 5))
    engine.answered(prompt)
    engine.side.allocated(prompt, list(range(63)), 5 * BLOCK)
    engine.side.plan(engine.fakes.scheduled({}))
    # Not even in part: the engine may be computing on blocks that did not come.
    assert engine.step(prompt, 640).stores == ()
    prompt.num_computed_tokens = 0
    engine.side.reported(WorkerReport(loads={"r": 1}, failed_loads={"r"}))
    assert engine.side.matched_tokens(prompt, 0) == (0, False)
    (store,) = engine.step(prompt, 1000).stores
    assert store.keys == tuple(keys_of(prompt, 7))


def test_a_resumed_request_is_looked_up_anew(engine: Engine, prompt: Any) -> None:
    engine.answered(prompt)
    engine.side.allocated(prompt, list(range(63)), 0)
    engine.step(prompt, 512)
    # Preempted: it starts over, and what it stored before is there by now.
    engine.store.has[0].update(keys_of(prompt, 4))
    prompt.num_computed_tokens = 0
    assert engine.answered(prompt) == (4 * BLOCK, True)


def test_every_rank_must_have_a_block(fakes: SimpleNamespace, tmp_path: Any, until: Any) -> None:
    from polarcache.client.vllm.identity import engine_identity

    configs = fakes.engine_configs(tmp_path, parallel={"tensor_parallel_size": 2})
    engine = Engine(engine_identity(*configs, ConnectorConfig()), fakes)
    request = fakes.Request("r", range(1000))
    engine.store.has[0].update(keys_of(request, 5))
    engine.store.has[1].update(keys_of(request, 3))
    assert engine.answered(request) == (3 * BLOCK, True)
    engine.side.allocated(request, list(range(63)), 3 * BLOCK)
    (load,) = engine.side.plan(fakes.scheduled({})).loads
    assert len(load.prefixes) == 2
    assert load.num_blocks == 3
    # Both ranks must have ended before the request's blocks are stored.
    engine.side.reported(WorkerReport(loads={"r": 1}))
    assert engine.step(request, 1000).stores == ()
    engine.side.reported(WorkerReport(loads={"r": 1}))
    (store,) = engine.step(request, 0).stores
    engine.side.reported(WorkerReport(stores={store.job_id: 1}))
    assert engine.pool.held
    engine.side.reported(WorkerReport(stores={store.job_id: 1}))
    assert not engine.pool.held
    # A rank that has nothing: no lease stays behind.
    other = fakes.Request("s", range(2000, 3000))
    engine.store.has[0].update(keys_of(other, 5))
    for lease in list(engine.store.leases):
        engine.store.leases.discard(lease)
    assert engine.answered(other) == (0, False)
    until(lambda: not engine.store.leases)


def test_a_role_may_only_load_or_only_store(
    identity: EngineIdentity, fakes: SimpleNamespace, prompt: Any
) -> None:
    producer = Engine(identity, fakes, may_load=False)
    producer.store.has[0].update(keys_of(prompt, 5))
    assert producer.side.matched_tokens(prompt, 0) == (0, False)
    assert producer.step(prompt, 1000).stores
    consumer = Engine(identity, fakes, may_store=False)
    prompt.num_computed_tokens = 0
    assert consumer.step(prompt, 1000).stores == ()


def test_stale_leases_are_renewed(
    identity: EngineIdentity, fakes: SimpleNamespace, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(identity, fakes)
    engine.store.has[0].update(keys_of(prompt, 5))
    engine.answered(prompt)
    clock = engine.lookups._clock
    monkeypatch.setattr(engine.lookups, "_clock", lambda: clock() + 31)
    assert engine.side.matched_tokens(prompt, 0) == (None, False)
    assert engine.answered(prompt) == (5 * BLOCK, True)
    assert len(engine.store.asked) == 2
