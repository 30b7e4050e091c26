"""Some streams that decode, in a process of their own: a part of the load of `attend.py`.

    python benchmarks/attend_load.py JOB    JOB is the JSON of a `Job`

Prints "ready" once its streams are open, waits for a line, attends for `seconds`, prints a `Load`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
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


class Process:
    """A load process.

    Args:
        job: What it does.
    """

    def __init__(self, job: Job) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Waits until its streams are open."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit("a load process failed")

    def start(self) -> None:
        """Lets it attend."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> Load:
        """What came of it, when it is done."""
        assert self._process.stdout is not None
        load = Load(**json.loads(self._process.stdout.readline()))
        self._process.wait(30)
        return load


def run(jobs: Sequence[Job]) -> Load:
    """Runs several processes at once; their loads together."""
    processes = [Process(job) for job in jobs]
    for process in processes:
        process.wait_until_ready()
    for process in processes:
        process.start()
    total = Load([], [], [], [])
    for process in processes:
        load = process.result()
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


def main() -> None:
    """Attends."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
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
    total = Load([], [], [], [])
    for load in loads:
        for name, values in asdict(load).items():
            getattr(total, name).extend(values)
    print(json.dumps(asdict(total)), flush=True)


if __name__ == "__main__":
    main()
