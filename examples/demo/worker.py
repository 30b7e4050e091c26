"""One inference worker of the demo, in a process of its own: `worker.py ROLE SETTINGS_JSON`.

It knows the service's endpoint and the document, nothing of the other workers. It prints JSON
lines: {"step", "done", "total"} while it works, {"result": ...} at the end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from document import MODEL_DIR, VALUE_TOKENS, Document, make_document
from model import LanguageModel, Layers

from polarcache.client import Client, Namespace, NamespaceSpec, chain_keys
from polarcache.client.transformers import PrefixCache, RemotePrefixCache, StoredPrefixCache

Settings = dict[str, Any]


def main() -> None:
    """Runs the role and prints its result."""
    role, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(2)
    document = make_document(
        settings["tokens"], settings["records"], settings["continuation_tokens"]
    )
    say("load the model", 0, 1)
    model = LanguageModel(MODEL_DIR)
    with Client(settings["endpoint"], timeout_s=20) as client:
        roles = {"store": store, "reuse": reuse, "judge": judge, "attend": attend}
        result = roles[role](client, model, document, settings)
    print(json.dumps({"result": result}), flush=True)


def store(client: Client, model: LanguageModel, document: Document, settings: Settings) -> Any:
    """Prefills the document and stores its blocks through every profile."""
    length = len(document.tokens)
    layers = model.prefill(document.tokens, lambda done: say("prefill", done, length))
    rows = []
    for i, profile in enumerate(settings["profiles"]):
        say("store", i, len(settings["profiles"]))
        namespace = open_namespace(client, model, profile)
        keys = chain_keys(document.tokens.tolist(), namespace.spec.layout.block_tokens)
        start_s = time.perf_counter()
        stored = client.store(namespace, keys, layers)
        rows.append(
            {
                "profile": profile,
                "blocks": stored.num_stored,
                "raw_bytes": len(keys) * namespace.raw_block_bytes,
                "packed_bytes": len(keys) * namespace.packed_block_bytes,
                "bits": namespace.bits,
                "store_s": time.perf_counter() - start_s,
            }
        )
    return rows


def reuse(client: Client, model: LanguageModel, document: Document, settings: Settings) -> Any:
    """Answers questions with the stored prefix, and without it."""
    records = settings["questions"]
    expected, ttft_without_s = recomputed(model, document, records)
    rows = []
    for i, profile in enumerate(settings["profiles"]):
        say("answer from the store", i, len(settings["profiles"]))
        namespace = open_namespace(client, model, profile)
        keys = chain_keys(document.tokens.tolist(), namespace.spec.layout.block_tokens)
        seen: dict[str, Any] = {}

        def fetch(
            namespace: Namespace = namespace, keys: list[bytes] = keys, seen: Any = seen
        ) -> Layers:
            match = client.lookup(namespace, keys)
            seen["match"], seen["prefix"] = match, client.retrieve(match).layers
            client.release(match)
            return list(seen["prefix"])

        first, ttft_s = timed_answer(model, fetch, document.prompt(records[0]))
        answers = [first] + [
            model.answer(seen["prefix"], document.prompt(record), VALUE_TOKENS)
            for record in records[1:]
        ]
        rows.append(
            {
                "profile": profile,
                "tokens_matched": seen["match"].num_tokens,
                "tiers": sorted(set(seen["match"].tiers)),
                "ttft_s": ttft_s,
                "ttft_without_s": ttft_without_s,
                "moved_bytes": seen["match"].num_blocks * namespace.raw_block_bytes,
                "answers_agree": sum(a == b for a, b in zip(answers, expected, strict=True)),
                "answers_right": sum(
                    answer == document.values[record].tolist()
                    for answer, record in zip(answers, records, strict=True)
                ),
                "answers": len(answers),
            }
        )
    return rows


def recomputed(
    model: LanguageModel, document: Document, records: list[int]
) -> tuple[list[list[int]], float]:
    """Answers without the cache, and the seconds to the first token of the first."""
    model.answer(model.prefill(document.tokens[:512]), document.prompt(0), 1)  # Warms up.
    say("answer without the cache", 0, 1)
    local: Layers = []

    def prefill() -> Layers:
        local.extend(model.prefill(document.tokens))
        return local

    first, ttft_s = timed_answer(model, prefill, document.prompt(records[0]))
    others = [model.answer(local, document.prompt(record), VALUE_TOKENS) for record in records[1:]]
    return [first, *others], ttft_s


def attend(client: Client, model: LanguageModel, document: Document, settings: Settings) -> Any:
    """Answers by remote attention: the prefix stays in the service."""
    records = settings["questions"]
    expected, ttft_without_s = recomputed(model, document, records)
    rows = []
    for i, profile in enumerate(settings["profiles"]):
        say("answer by remote attention", i, len(settings["profiles"]))
        namespace = open_namespace(client, model, profile)
        prompts = [torch.cat([document.tokens, document.prompt(record)]) for record in records]
        remote = [
            generated(RemotePrefixCache, client, namespace, model, prompt) for prompt in prompts
        ]
        stored = generated(StoredPrefixCache, client, namespace, model, prompts[0])
        cache: PrefixCache = remote[0]["cache"]
        # The last token is chosen and never attended with.
        num_queries = len(prompts[0]) - cache.prefix_tokens + VALUE_TOKENS - 1
        answers = [one["answer"] for one in remote]
        rows.append(
            {
                "profile": profile,
                "tokens_matched": cache.prefix_tokens,
                "tiers": list(cache.tiers),
                "ttft_s": remote[0]["ttft_s"],
                "ttft_without_s": ttft_without_s,
                "moved_bytes": cache.moved_bytes,
                "moved_token_bytes": cache.moved_bytes / num_queries,
                "retrieving_bytes": stored["cache"].moved_bytes,
                "logits_from_retrieving": float(
                    (remote[0]["logits"] - stored["logits"]).abs().max()
                ),
                "answers_agree": sum(a == b for a, b in zip(answers, expected, strict=True)),
                "answers_right": sum(
                    answer == document.values[record].tolist()
                    for answer, record in zip(answers, records, strict=True)
                ),
                "answers": len(answers),
            }
        )
    return rows


def generated(
    kind: type[PrefixCache],
    client: Client,
    namespace: Namespace,
    model: LanguageModel,
    prompt: torch.Tensor,
) -> dict[str, Any]:
    """An answer by `model.generate`, its logits, its cache, the seconds to its first token."""
    start_s = time.perf_counter()
    result: dict[str, Any] = {}

    def on_first() -> None:
        result["ttft_s"] = time.perf_counter() - start_s

    with kind.from_store(client, namespace, model.model, prompt, on_failure="raise") as cache:
        result["answer"], result["logits"] = model.generate(cache, prompt, VALUE_TOKENS, on_first)
    return {**result, "cache": cache}


def judge(client: Client, model: LanguageModel, document: Document, settings: Settings) -> Any:
    """Perplexity of the continuation and recall of all records, read through every profile."""
    rows = reuse(client, model, document, settings)
    exact = quality(model, document, model.prefill(document.tokens))
    reference = exact.pop("log_probabilities")
    for i, row in enumerate(rows):
        say("judge", i, len(rows))
        namespace = open_namespace(client, model, row["profile"])
        keys = chain_keys(document.tokens.tolist(), namespace.spec.layout.block_tokens)
        match = client.lookup(namespace, keys)
        coded = quality(model, document, client.retrieve(match).layers)
        client.release(match)
        log_probabilities = coded.pop("log_probabilities")
        difference = reference.exp() * (reference - log_probabilities)
        row |= coded
        row["kl_millinats"] = float(difference.sum(-1).mean()) * 1e3
        row["perplexity_exact"] = exact["perplexity"]
        row["recall_exact"] = exact["recall"]
    return rows


def quality(model: LanguageModel, document: Document, prefix: Layers) -> dict[str, Any]:
    """Perplexity, recall, and log-probabilities [T, vocabulary] of the continuation."""
    text = document.continuation
    log_probabilities = model.logits(prefix, text)[:-1].log_softmax(-1)
    loss = -log_probabilities.gather(1, text[1:, None]).mean()
    exam, starts = document.exam()
    predicted = model.logits(prefix, exam).argmax(-1)
    right = [
        bool((predicted[start - 1 : start - 1 + VALUE_TOKENS] == value).all())
        for start, value in zip(starts.tolist(), document.values, strict=True)
    ]
    return {
        "perplexity": float(loss.exp()),
        "recall": sum(right) / len(right),
        "log_probabilities": log_probabilities,
    }


def timed_answer(
    model: LanguageModel, prefix: Callable[[], Layers], question: torch.Tensor
) -> tuple[list[int], float]:
    """An answer, and the seconds to its first token, making the prefix included."""
    start_s = time.perf_counter()
    first_s = start_s

    def on_first() -> None:
        nonlocal first_s
        first_s = time.perf_counter()

    answer = model.answer(prefix(), question, VALUE_TOKENS, on_first)
    return answer, first_s - start_s


def open_namespace(client: Client, model: LanguageModel, profile: str) -> Namespace:
    """The demo's namespace with a profile."""
    spec = NamespaceSpec(model="tiny-lm", revision="1", layout=model.layout, profile=profile)
    return client.open_namespace(spec)


def say(step: str, done: int, total: int) -> None:
    """Tells the demo how far the work is."""
    print(json.dumps({"step": step, "done": done, "total": total}), flush=True)


if __name__ == "__main__":
    main()
