"""What the scheduler's side has stored, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from polarcache.client.vllm.identity import EngineIdentity
from polarcache.client.vllm.plan import WorkerReport
from tests.client.vllm.scheduler_fakes import Engine, keys_of


def test_whole_blocks_are_stored_chunk_by_chunk_and_held(engine: Engine, prompt: Any) -> None:
    block_ids = list(range(100, 37, -1))
    assert engine.step(prompt, 100, block_ids).stores == ()
    (first,) = engine.step(prompt, 400, block_ids).stores
    assert first.keys == tuple(keys_of(prompt, 3))
    assert first.block_ids == tuple(block_ids[:24])
    (second,) = engine.step(prompt, 500, block_ids).stores
    # The 104 tokens that fill no stored block stay here.
    assert second.keys == tuple(keys_of(prompt, 7)[3:])
    assert second.block_ids == tuple(block_ids[24:56])
    assert engine.pool.held == set(block_ids[:56])
    engine.side.finished("r")
    assert engine.pool.held == set(block_ids[:56])
    engine.side.reported(WorkerReport(stores={first.job_id: 1}))
    assert engine.pool.held == set(block_ids[24:56])
    engine.side.reported(WorkerReport(stores={second.job_id: 1}))
    assert engine.pool.held == set()


def test_generated_tokens_are_stored_when_their_hash_is_known(
    identity: EngineIdentity, fakes: SimpleNamespace
) -> None:
    for store_generated, num_stores in ((True, 1), (False, 0)):
        engine = Engine(identity, fakes, store_generated=store_generated)
        request = fakes.Request("r", range(120))
        assert engine.step(request, 120).stores == ()
        for token in range(7):
            request.token_ids.append(token)
            assert engine.step(request, 1).stores == ()
        # The 128th token is computed now, but is not in the hashes before it is appended.
        request.num_computed_tokens += 1
        request.token_ids.append(7)
        assert len(engine.step(request, 1).stores) == num_stores


def test_what_was_found_or_stored_is_not_stored_again(
    engine: Engine, prompt: Any, fakes: SimpleNamespace
) -> None:
    engine.store.has[0].update(keys_of(prompt, 3))
    engine.answered(prompt)
    engine.side.allocated(prompt, list(range(63)), 0)
    (store,) = engine.step(prompt, 1000).stores
    assert store.keys == tuple(keys_of(prompt, 7)[3:])
    again = fakes.Request("again", range(1000))
    assert engine.step(again, 1000).stores == ()
    engine.side.reported(WorkerReport(stores={store.job_id: 1}))
    # After a restart of the store everything is offered anew.
    engine.store.namespaces = (*engine.store.namespaces,)
    once_more = fakes.Request("once more", range(1000))
    (store,) = engine.step(once_more, 1000).stores
    assert store.keys == tuple(keys_of(prompt, 7))


def test_after_a_failed_store_nothing_follows_that_would_lack_its_prefix(
    engine: Engine, prompt: Any
) -> None:
    (store,) = engine.step(prompt, 512).stores
    engine.side.reported(WorkerReport(stores={store.job_id: 1}, failed_stores={"r"}))
    assert engine.step(prompt, 488).stores == ()
    assert engine.pool.held == set()


def test_stores_leave_the_engine_blocks_to_work_with(
    identity: EngineIdentity, fakes: SimpleNamespace, prompt: Any
) -> None:
    engine = Engine(identity, fakes, max_pinned=17 / fakes.num_blocks)
    (store,) = engine.step(prompt, 900).stores
    assert len(store.keys) == 2
    assert engine.step(prompt, 50).stores == ()
    engine.side.reported(WorkerReport(stores={store.job_id: 1}))
    (store,) = engine.step(prompt, 50).stores
    assert store.keys == tuple(keys_of(prompt, 4)[2:])
