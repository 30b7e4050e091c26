"""Three requests that begin alike: the first stores its prompt, the others start from the store.

    polarcache serve                       # in another terminal
    python examples/transformers/generate.py [--endpoint URL] [--model DIR_OR_NAME]

The second request retrieves the stored prefix, the third leaves it in the service.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polarcache.client import DEFAULT_ENDPOINT, Client, Namespace
from polarcache.client.transformers import (
    PrefixCache,
    RemotePrefixCache,
    StoredPrefixCache,
    namespace_spec,
)

TINY_LM = Path(__file__).parent.parent / "tiny_lm"
NEW_TOKENS = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the requests and prints what came of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--endpoint", default=DEFAULT_ENDPOINT)
    parser.add_argument("--model", default=str(TINY_LM), help="a directory, or a name on the Hub")
    parser.add_argument("--profile", default="exact", help="how keys and values are stored")
    parser.add_argument("--text", type=Path, help="what the prompts begin with; else a sample")
    options = parser.parse_args(arguments)

    # Also "eager", "sdpa" or others, where no prefix is left in the service.
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="polarcache"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.text:
        document = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    else:
        sample = np.load(TINY_LM / "held_out_tokens.npy")[:1000].astype(np.int64)
        document = torch.from_numpy(sample)

    with Client(options.endpoint) as client:
        namespace = client.open_namespace(namespace_spec(model, profile=options.profile))
        requests: list[tuple[type[PrefixCache], str]] = [
            (StoredPrefixCache, "In the beginning"),
            (StoredPrefixCache, "The end of the story"),
            (RemotePrefixCache, "The end of the story"),
        ]
        for kind, question in requests:
            asked = tokenizer(question, return_tensors="pt").input_ids[0]
            tokens = torch.cat([document, asked])[None]
            answer = answer_from(kind, client, namespace, model, tokens)
            print(f"  {question!r} -> {tokenizer.decode(answer)!r}")


def answer_from(
    kind: type[PrefixCache],
    client: Client,
    namespace: Namespace,
    model: PreTrainedModel,
    tokens: torch.Tensor,
) -> list[int]:
    """Generates from the longest stored prefix; stores what was not."""
    start_s = time.perf_counter()
    with kind.from_store(client, namespace, model, tokens, store_prompt=True) as cache:
        output = model.generate(
            tokens, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    print(
        f"{kind.__name__}: {cache.prefix_tokens} of {tokens.shape[1]} tokens from "
        f"{'+'.join(cache.tiers) or 'nowhere'}, {cache.moved_bytes / 2**10:.0f} KiB moved, "
        f"{time.perf_counter() - start_s:.2f} s"
    )
    found: list[int] = output[0, tokens.shape[1] :].tolist()
    return found


if __name__ == "__main__":
    main()
