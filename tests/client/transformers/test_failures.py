"""A service that is lost: typed errors within the deadline, and the right answer all the same."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from polarcache.client import Client, Namespace
from polarcache.client.transformers import (
    PrefixCache,
    RemotePrefixCache,
    StoredPrefixCache,
    namespace_spec,
)
from polarcache.proto.errors import DeadlineError, ServiceUnavailableError

DEADLINE_S = 1.0
# From the loss to the error, other work of the machine included.
ERROR_WITHIN_S = 8.0
LOGITS_TOLERANCE = 1e-3


@pytest.fixture
def lonely(start_service: Any) -> Any:
    """A service of this test alone."""
    return start_service("--memory", "64MiB", "--redis", "off")


def stored(client: Client, model: PreTrainedModel, ids: torch.Tensor) -> Namespace:
    namespace = client.open_namespace(namespace_spec(model, block_tokens=32))
    with StoredPrefixCache.from_store(
        client, namespace, model, ids, store_prompt=True, on_failure="raise"
    ) as cache:
        model(input_ids=ids, past_key_values=cache)
    return namespace


def before_call(module: Any, number: int, action: Callable[[], object]) -> None:
    """Runs an action when a module is about to be called for the so-manieth time."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            action()

    module.register_forward_pre_hook(count)


@pytest.mark.parametrize(
    ("model", "step", "shared_memory_bytes"),
    [
        ("llama", 1, 0),
        ("llama", 6, 64 << 20),
        ("qwen2-windows", 6, 64 << 20),
        ("qwen3", 6, 0),
    ],
    ids=["llama-prefill", "llama-decode-local", "qwen2-windows-decode-local", "qwen3-decode"],
    indirect=["model"],
)
def test_generation_goes_on_to_the_right_answer_when_the_service_is_killed(
    lonely: Any, prompt: Any, greedy: Any, model: PreTrainedModel, step: int,
    shared_memory_bytes: int,
) -> None:  # fmt: skip
    ids = prompt(75, rows=2)
    expected = greedy(model, ids)
    with lonely.client(timeout_s=DEADLINE_S, shared_memory_bytes=shared_memory_bytes) as client:
        namespace = stored(client, model, ids[:1])
        with RemotePrefixCache.from_store(
            client, namespace, model, ids, store_prompt=True
        ) as cache:
            assert cache.prefix_tokens == 64
            # In the middle of a token: layer 0 has asked the service, layer 1 has not.
            before_call(model.model.layers[1], step, lonely.kill)
            start_s = time.monotonic()
            got = greedy(model, ids, cache)
    assert time.monotonic() - start_s < ERROR_WITHIN_S
    assert isinstance(cache.failure, ServiceUnavailableError)
    assert torch.equal(got.sequences, expected.sequences)
    logits, exact = (torch.stack(output.logits) for output in (got, expected))
    assert (logits - exact).abs().max() < LOGITS_TOLERANCE


def test_a_service_that_hangs_is_given_up_at_the_deadline(
    lonely: Any, prompt: Any, greedy: Any, llama: PreTrainedModel
) -> None:
    ids = prompt(75)
    expected = greedy(llama, ids).sequences
    with lonely.client(timeout_s=DEADLINE_S) as client:
        namespace = stored(client, llama, ids)
        cache = RemotePrefixCache.from_store(client, namespace, llama, ids)
        hang = functools.partial(os.kill, lonely.process.pid, signal.SIGSTOP)
        before_call(llama.model.layers[1], 4, hang)
        start_s = time.monotonic()
        try:
            got = greedy(llama, ids, cache).sequences
            cache.close()
        finally:
            os.kill(lonely.process.pid, signal.SIGCONT)
        assert DEADLINE_S < time.monotonic() - start_s < ERROR_WITHIN_S
    assert isinstance(cache.failure, DeadlineError)
    assert torch.equal(got, expected)


def test_a_lost_service_raises_where_that_is_wanted_and_means_no_prefix_elsewhere(
    lonely: Any, prompt: Any, greedy: Any, llama: PreTrainedModel
) -> None:
    ids = prompt(75)
    expected = greedy(llama, ids).sequences
    kinds: list[type[PrefixCache]] = [StoredPrefixCache, RemotePrefixCache]
    with lonely.client(timeout_s=DEADLINE_S) as client:
        namespace = stored(client, llama, ids)
        unstored = torch.cat([ids, prompt(40, seed=9)], 1)
        with StoredPrefixCache.from_store(
            client, namespace, llama, unstored, store_prompt=True
        ) as cache:
            greedy(llama, unstored, cache)
            with RemotePrefixCache.from_store(
                client, namespace, llama, ids, on_failure="raise"
            ) as raising:
                before_call(llama.model.layers[1], 4, lonely.kill)
                with pytest.raises(ServiceUnavailableError):
                    greedy(llama, ids, raising)
        # It was not needed before the prompt's new blocks were to be stored.
        assert isinstance(cache.failure, ServiceUnavailableError)

        for kind in kinds:
            with kind.from_store(client, namespace, llama, ids, store_prompt=True) as cache:
                got = greedy(llama, ids, cache).sequences
            assert (cache.prefix_tokens, cache.tiers) == (0, ())
            assert isinstance(cache.failure, ServiceUnavailableError)
            assert torch.equal(got, expected)
            with pytest.raises(ServiceUnavailableError):
                kind.from_store(client, namespace, llama, ids, on_failure="raise")


def test_no_lease_outlives_the_cache(
    lonely: Any, prompt: Any, greedy: Any, llama: PreTrainedModel, until: Any
) -> None:
    ids = prompt(75)
    with lonely.client() as client:
        namespace = stored(client, llama, ids)
        for kind in (StoredPrefixCache, RemotePrefixCache):
            with kind.from_store(client, namespace, llama, ids, on_failure="raise") as cache:
                greedy(llama, ids, cache, max_new_tokens=2)
        assert until(lambda: lonely.gauges()["leases"] == 0)
