"""Asks a server to go on with a long text: ask.py PORT."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

HELD_OUT = Path(__file__).parents[1] / "tiny_lm" / "held_out_tokens.npy"


def main() -> None:
    """Sends the prompt and prints what came back."""
    prompt = [int(token) for token in np.load(HELD_OUT)[:4000]]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{sys.argv[1]}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    began_s = time.monotonic()
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    seconds = time.monotonic() - began_s
    details = answer["usage"]["prompt_tokens_details"] or {}
    print(f"{answer['usage']['prompt_tokens']} prompt tokens, ", end="")
    print(f"{details.get('cached_tokens', 0)} of them not computed, {seconds:.2f} s")
    print(repr(answer["choices"][0]["text"]))


if __name__ == "__main__":
    main()
