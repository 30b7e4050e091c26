"""Generation that begins with a stored prefix equals generation without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from polarcache.client import Client
from polarcache.client.transformers import (
    PrefixCache,
    RemotePrefixCache,
    StoredPrefixCache,
    namespace_spec,
)
from polarcache.client.transformers._prefix import compute_prefix
from polarcache.proto.errors import InvalidRequestError, LayoutMismatchError, UnsupportedError

TINY_LM = Path(__file__).parents[3] / "examples" / "tiny_lm"
CACHES = [StoredPrefixCache, RemotePrefixCache]
# The sum over tokens is taken in another order than PyTorch's; logits are of order 10.
LOGITS_TOLERANCE = 1e-3
# What rounding the prefix to fp16 moves logits by.
WIRE_TOLERANCE = 0.05
PROFILES = ["k=pair:r4t4:g32,v=int4", "k=polar:b8,v=polar:b8", "k=recursive,v=recursive"]


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, 1)


def fill(client: Client, namespace: Any, model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Has one worker store the blocks of a prompt."""
    with StoredPrefixCache.from_store(
        client, namespace, model, ids, store_prompt=True, on_failure="raise"
    ) as cache:
        assert cache.prefix_tokens == 0
        model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
def test_exact_prefix_generates_what_no_cache_generates(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, model: PreTrainedModel,
    kind: type[PrefixCache], options: dict[str, int],
) -> None:  # fmt: skip
    namespace, ids = open_namespace(model), prompt(75)
    fill(client, namespace, model, ids)
    # Until windows of 24 tokens end behind the prefix.
    expected = greedy(model, ids, max_new_tokens=20)

    with kind.from_store(client, namespace, model, ids, on_failure="raise") as cache:
        got = greedy(model, ids, cache, max_new_tokens=20, **options)

    assert (cache.prefix_tokens, cache.tiers, cache.failure) == (64, ("memory",), None)
    assert torch.equal(got.sequences, expected.sequences)
    difference = (logits_of(got) - logits_of(expected)).abs().max()
    assert difference < LOGITS_TOLERANCE
    assert cache.moved_bytes > 0


@pytest.mark.parametrize("profile", PROFILES)
def test_remote_attention_equals_retrieving_with_quantized_profiles(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    profile: str,
) -> None:  # fmt: skip
    namespace, ids = open_namespace(llama, profile), prompt(150)
    fill(client, namespace, llama, ids)
    outputs = []
    for kind in CACHES:
        with kind.from_store(client, namespace, llama, ids, on_failure="raise") as cache:
            assert cache.prefix_tokens == 128
            outputs.append(greedy(llama, ids, cache))

    stored, remote = outputs
    assert torch.equal(stored.sequences, remote.sequences)
    assert (logits_of(stored) - logits_of(remote)).abs().max() < LOGITS_TOLERANCE
    exact = logits_of(greedy(llama, ids))
    assert (logits_of(stored) - exact)[:, 0].abs().max() > 10 * LOGITS_TOLERANCE


@pytest.mark.parametrize("profile", PROFILES)
def test_of_float16_namespaces_only_the_rounding_on_the_wire_differs(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    profile: str,
) -> None:  # fmt: skip
    namespace, ids = open_namespace(llama, profile, "float16"), prompt(150)
    fill(client, namespace, llama, ids)

    def logits(kind: type[PrefixCache], **options: Any) -> torch.Tensor:
        with kind.from_store(client, namespace, llama, ids, on_failure="raise", **options) as cache:
            assert cache.prefix_tokens == 128
            return logits_of(greedy(llama, ids, cache))

    remote = logits(RemotePrefixCache)
    # A worker that decodes for itself has the numbers that the service attends to.
    assert (logits(StoredPrefixCache, pack="worker") - remote).abs().max() < LOGITS_TOLERANCE
    # Numbers that the service decoded and sent are rounded: half a unit in the last place.
    # Of the first token: a tie may then break either way.
    rounded = (logits(StoredPrefixCache, pack="service") - remote)[:, 0].abs().max()
    assert 0.0 < rounded < WIRE_TOLERANCE


@pytest.mark.parametrize("profile", PROFILES)
def test_exact_first_tokens_are_those_of_the_model(
    client: Client, open_namespace: Any, prompt: Any, llama: PreTrainedModel, profile: str
) -> None:
    namespace, ids = open_namespace(llama, profile), prompt(150)
    fill(client, namespace, llama, ids)
    caches = [
        StoredPrefixCache.from_store(
            client, namespace, llama, ids, on_failure="raise", exact_first_tokens=number
        )
        for number in (0, 4, 1000)
    ]
    computed = compute_prefix(llama, ids[0, :128])
    for layer, (keys, values) in enumerate(computed):
        for name, expected in (("keys", keys), ("values", values)):
            coded, some, every = (getattr(cache.layers[layer], name) for cache in caches)
            assert torch.allclose(some[:, :, :4], expected[:, :, :4], atol=1e-5)
            assert torch.equal(some[:, :, 4:], coded[:, :, 4:])
            assert not torch.allclose(coded[:, :, :4], expected[:, :, :4], atol=1e-5)
            assert torch.allclose(every, expected, atol=1e-5)


def test_exact_first_tokens_that_cannot_be_are_refused(
    client: Client, open_namespace: Any, prompt: Any, llama: PreTrainedModel
) -> None:
    namespace, ids = open_namespace(llama), prompt(75)
    with pytest.raises(InvalidRequestError, match="at least 0"):
        StoredPrefixCache.from_store(client, namespace, llama, ids, exact_first_tokens=-1)
    with pytest.raises(UnsupportedError, match="as it is stored"):
        RemotePrefixCache.from_store(client, namespace, llama, ids, exact_first_tokens=4)


# Logits are of order 10: some units in the last place, over three layers.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float16, 0.03)], ids=["bf16", "fp16"]
)
def test_models_of_half_precision_read_their_prefix(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    model, ids = llama.to(dtype), prompt(75)
    namespace = open_namespace(model)
    assert namespace.spec.layout.dtype == str(dtype).removeprefix("torch.")
    fill(client, namespace, model, ids)
    expected = logits_of(greedy(model, ids, max_new_tokens=1))
    for kind in CACHES:
        with kind.from_store(client, namespace, model, ids, on_failure="raise") as cache:
            got = logits_of(greedy(model, ids, cache, max_new_tokens=1))
        assert cache.prefix_tokens == 64
        assert (got - expected).abs().max() < tolerance
    without_prefix = logits_of(greedy(model, ids[:, 64:], max_new_tokens=1))
    assert (without_prefix - expected).abs().max() > 4 * tolerance


@pytest.mark.parametrize("profile", ["exact", "k=pair:r4t4,v=int4"])
def test_a_trained_model_reads_its_prefix_remotely_as_retrieved(
    client: Client, greedy: Any, spec: Any, profile: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        TINY_LM, dtype=torch.float32, attn_implementation="polarcache"
    ).eval()
    text = np.load(TINY_LM / "held_out_tokens.npy")[:600].astype(np.int64)
    ids = torch.from_numpy(text)[None]
    namespace = client.open_namespace(namespace_spec(model, name=spec.model, profile=profile))
    fill(client, namespace, model, ids)
    outputs = []
    for kind in CACHES:
        with kind.from_store(client, namespace, model, ids, on_failure="raise") as cache:
            outputs.append(greedy(model, ids, cache))
        assert cache.prefix_tokens == 512
    if profile == "exact":
        outputs.append(greedy(model, ids))
    for other in outputs[1:]:
        assert torch.equal(outputs[0].sequences, other.sequences)
        assert (logits_of(outputs[0]) - logits_of(other)).abs().max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("kind", CACHES)
def test_what_was_generated_is_stored_too_and_found_by_the_next_turn(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    kind: type[PrefixCache],
) -> None:  # fmt: skip
    namespace, ids = open_namespace(llama), prompt(40)
    fill(client, namespace, llama, ids)
    with kind.from_store(client, namespace, llama, ids, on_failure="raise") as cache:
        first = greedy(llama, ids, cache, max_new_tokens=30).sequences
        stored = cache.store_new_blocks(first)
    # 69 tokens have keys; the first block was there.
    assert (cache.prefix_tokens, stored.num_stored, stored.num_present) == (32, 1, 0)

    ids = torch.cat([first, prompt(9, seed=4)], 1)
    with kind.from_store(client, namespace, llama, ids, on_failure="raise") as cache:
        second = greedy(llama, ids, cache).sequences
    assert cache.prefix_tokens == 64
    assert torch.equal(second, greedy(llama, ids).sequences)


@pytest.mark.parametrize("kind", CACHES)
def test_rows_of_a_batch_and_beams_share_the_prefix(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, model: PreTrainedModel,
    kind: type[PrefixCache],
) -> None:  # fmt: skip
    namespace, ids = open_namespace(model), prompt(70, rows=3)
    fill(client, namespace, model, ids[:1])
    for options in ({}, {"num_beams": 2}):
        with kind.from_store(
            client, namespace, model, ids, on_failure="raise", store_prompt=True
        ) as cache:
            got = greedy(model, ids, cache, **options).sequences
        assert cache.prefix_tokens == 64
        assert torch.equal(got, greedy(model, ids, **options).sequences)


@pytest.mark.parametrize("kind", CACHES)
def test_each_row_s_own_blocks_are_stored(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    kind: type[PrefixCache],
) -> None:  # fmt: skip
    namespace, ids = open_namespace(llama), prompt(64, rows=2)
    with kind.from_store(
        client, namespace, llama, ids, on_failure="raise", store_prompt=True
    ) as cache:
        greedy(llama, ids, cache, num_beams=2)
    for row in ids:
        tail = torch.cat([row, prompt(6)[0]])[None]
        with kind.from_store(client, namespace, llama, tail, on_failure="raise") as cache:
            got = greedy(llama, tail, cache).sequences
        assert cache.prefix_tokens == 64
        assert torch.equal(got, greedy(llama, tail).sequences)


@pytest.mark.parametrize("kind", CACHES)
def test_packing_in_the_worker_gives_the_same(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    kind: type[PrefixCache],
) -> None:  # fmt: skip
    namespace, ids = open_namespace(llama, PROFILES[0]), prompt(70)
    with kind.from_store(
        client, namespace, llama, ids, on_failure="raise", store_prompt=True, pack="worker"
    ) as cache:
        greedy(llama, ids, cache)
    outputs = []
    for where in ("worker", "service"):
        with kind.from_store(
            client, namespace, llama, ids, on_failure="raise", pack=where
        ) as cache:
            outputs.append(greedy(llama, ids, cache).sequences)
        assert cache.prefix_tokens == 64
    assert torch.equal(*outputs)


def test_short_prompts_have_no_prefix_and_long_ones_leave_a_token(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel
) -> None:
    namespace, ids = open_namespace(llama), prompt(64)
    fill(client, namespace, llama, ids)
    for length, found in ((1, 0), (32, 0), (33, 32), (64, 32)):
        cut = ids[:, :length]
        with RemotePrefixCache.from_store(
            client, namespace, llama, cut, on_failure="raise"
        ) as cache:
            got = greedy(llama, cut, cache).sequences
        assert cache.prefix_tokens == found
        assert torch.equal(got, greedy(llama, cut).sequences)


def test_attention_that_leaves_the_prefix_out_is_refused(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel
) -> None:
    namespace, ids = open_namespace(llama), prompt(40)
    fill(client, namespace, llama, ids)
    with RemotePrefixCache.from_store(client, namespace, llama, ids) as cache:
        llama.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="layer 0 left the stored prefix out"):
            greedy(llama, ids, cache)
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        RemotePrefixCache.from_store(client, namespace, llama, ids)


def test_wrong_calls_are_refused_whatever_happens_on_failure(
    client: Client, open_namespace: Any, prompt: Any, greedy: Any, llama: PreTrainedModel,
    spec: Any,
) -> None:  # fmt: skip
    namespace, ids = open_namespace(llama), prompt(40)
    other = client.open_namespace(spec)
    with pytest.raises(LayoutMismatchError, match="the model"):
        StoredPrefixCache.from_store(client, other, llama, ids)
    with pytest.raises(InvalidRequestError, match="token_ids"):
        StoredPrefixCache.from_store(client, namespace, llama, ids[None])
    fill(client, namespace, llama, ids)
    with RemotePrefixCache.from_store(client, namespace, llama, ids) as cache:
        greedy(llama, ids, cache)
        with pytest.raises(InvalidRequestError, match="begin with the prompt"):
            cache.store_new_blocks(ids + 1)
        with pytest.raises(InvalidRequestError, match="cannot remove"):
            cache.crop(-30)
