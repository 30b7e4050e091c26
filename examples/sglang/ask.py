"""Sends one long prompt twice to an SGLang server and prints what came from a cache.

python examples/sglang/ask.py http://127.0.0.1:30000
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request

PARAGRAPH = (
    "The ledger of the harbour lists every ship that came in, what it carried, who paid the pilot "
    "and how long it lay at the quay. "
)


def ask(server: str, prompt: str) -> None:
    """Generates 16 tokens greedily and prints the answer's figures."""
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
    request = urllib.request.Request(
        f"{server}/generate",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    began_s = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    facts = answer["meta_info"]
    print(
        f"{facts['prompt_tokens']} prompt tokens, {facts['cached_tokens']} from a cache, "
        f"{time.monotonic() - began_s:.3f} s: {answer['text']!r}"
    )


def main() -> None:
    """Asks twice."""
    server = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
    prompt = PARAGRAPH * 120 + "In one sentence, what does the ledger list?"
    for _ in range(2):
        ask(server, prompt)


if __name__ == "__main__":
    main()
