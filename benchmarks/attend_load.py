"""Streams that decode, in processes of their own: the load of `attend.py`.

    python benchmarks/attend_load.py

For each line of input, the JSON of a `Job`: opens its streams, prints "ready", waits for a line,
attends for `seconds`, prints the JSON of a `Load`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from polarcache.client import AttendStream, Client, KvLayout, NamespaceSpec


@dataclass(frozen=True)
class Job:
    """What a process does.

    Attributes:
        endpoint: Of the service.
        shared_bytes: Of the client; 0 has everything travel over gRPC.
        prefixes: Number of the prefix of each stream.
        num_blocks: Blocks of each prefix.
        layout: Arguments of `KvLayout`.
        profile: Codec profile.
        heads: Query heads.
        seconds: How long to attend.
        think_s: Pause of a stream between an answer and its next request, seconds.
    """

    endpoint: str
    shared_bytes: int
    prefixes: list[int]
    num_blocks: int
    layout: dict[str, int]
    profile: str
    heads: int
    seconds: float
    think_s: float = 0.0

    def spec(self) -> NamespaceSpec:
        """The namespace of the prefixes."""
        return NamespaceSpec(model="attend", layout=KvLayout(**self.layout), profile=self.profile)


@dataclass
class Load:
    """What came of it, over all requests: times in microseconds, each request's own."""

    round_trip_us: list[float]
    queue_us: list[float]
    kernel_us: list[float]
    batch_requests: list[int]


def keys_of(prefix: int, num_blocks: int) -> list[bytes]:
    """Block keys of a prefix."""
    return [b"prefix %d block %d" % (prefix, i) for i in range(num_blocks)]


class Crew:
    """Load processes, which serve one load after the other: starting one takes seconds.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(size)
        ]

    def run(self, jobs: Sequence[Job]) -> Load:
        """Runs several jobs at once, each in a process; their loads together."""
        processes = self._processes[: len(jobs)]
        for process, job in zip(processes, jobs, strict=True):
            _say(process, json.dumps(asdict(job)))
        for process in processes:
            if _heard(process) != "ready":
                raise SystemExit("a load process failed")
        for process in processes:
            _say(process, "go")
        return _sum(Load(**json.loads(_heard(process))) for process in processes)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.communicate(timeout=30)


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    print(line, file=process.stdin, flush=True)


def _heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _sum(loads: Iterable[Load]) -> Load:
    total = Load([], [], [], [])
    for load in loads:
        for name, values in asdict(load).items():
            getattr(total, name).extend(values)
    return total


def _attend(stream: AttendStream, job: Job, end_s: float, load: Load) -> None:
    layers = job.layout["num_layers"]
    head_dim = job.layout["head_dim"]
    queries = torch.randn(1, job.heads, head_dim).half()
    step = 0
    while (start_s := time.perf_counter()) < end_s:
        stream.attend(step % layers, queries)
        took_us = (time.perf_counter() - start_s) * 1e6
        timing = stream.timing
        assert timing is not None
        load.round_trip_us.append(took_us)
        load.queue_us.append(timing.queue_ns / 1e3)
        load.kernel_us.append(timing.kernel_ns / 1e3)
        load.batch_requests.append(timing.batch_requests)
        step += 1
        if job.think_s:
            time.sleep(job.think_s)


def _run(job: Job) -> Load:
    loads = [Load([], [], [], []) for _ in job.prefixes]
    with Client(job.endpoint, shared_memory_bytes=job.shared_bytes, timeout_s=30) as client:
        namespace = client.open_namespace(job.spec())
        streams = [
            client.attend(
                client.lookup(namespace, keys_of(prefix, job.num_blocks)), query_heads=job.heads
            )
            for prefix in job.prefixes
        ]
        for stream in streams:
            assert stream.is_local == bool(job.shared_bytes)
            assert stream.prefix_tokens == job.num_blocks * namespace.spec.layout.block_tokens
        print("ready", flush=True)
        sys.stdin.readline()
        end_s = time.perf_counter() + job.seconds
        threads = [
            threading.Thread(target=_attend, args=(stream, job, end_s, load))
            for stream, load in zip(streams, loads, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stream in streams:
            stream.close()
    return _sum(loads)


def main() -> None:
    """Attends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(asdict(_run(Job(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main()
