#!/usr/bin/env python3
"""Remote attention: what a round trip of one layer costs, and what batching gives.

    python benchmarks/attend.py [--json]                  round trips, on the CPU
    python benchmarks/attend.py --device cuda [--json]    and batching over long prefixes

Round trips are those of one token (32 query heads of 128 channels), stream open, the kernel's time
subtracted, against bare round trips of the same bytes that alternate with them: those of servers
that compute the same in between, and of servers that compute nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attend_baselines import HEAD_DIM, HEADS, KV_HEADS, SHORT_PROFILES, Echo, PingPong, Server
from attend_load import Crew, Job, Load, keys_of

from polarcache.client import AttendStream, Client, KvLayout

SHARED_BYTES = 64 << 20
LONG = {"num_layers": 2, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_tokens": 128}
CODED = "k=pair:r4t4,v=int4"

Row: TypeAlias = dict[str, Any]


class Service:
    """A service in a process of its own.

    Args:
        device: Its device.
        memory: Its memory tier.
        flags: More arguments.
    """

    def __init__(self, device: str, memory: str, *flags: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="pc-bench-")
        name = self._directory.name
        self._port_file = Path(name) / "port"
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "polarcache.cli", "serve", "--device", device, "--port", "0",
                "--port-file", str(self._port_file), "--state-dir", f"{name}/state",
                "--redis", "off", "--memory", memory, "--lease-ms", "300000",
                "--log-level", "warning", *flags,
            ]
        )  # fmt: skip

    def endpoint(self) -> str:
        """Where it listens, once it does."""
        while not self._port_file.exists():
            if self._process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.05)
        return f"grpc://127.0.0.1:{self._port_file.read_text().strip()}"

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(60)
        self._directory.cleanup()


def short_job(endpoint: str, device: str, seconds: float) -> Job:
    """Streams on one block: the kernel takes little of the round trip."""
    profile, block_tokens = SHORT_PROFILES[device.partition(":")[0]]
    layout = {**LONG, "block_tokens": block_tokens}
    return Job(endpoint, 0, [], 1, layout, profile, HEADS, seconds)


def store(client: Client, job: Job, prefixes: int) -> None:
    """Stores the same random layers under the keys of several prefixes."""
    layout = KvLayout(**job.layout)
    namespace = client.open_namespace(job.spec())
    shape = (job.num_blocks * layout.block_tokens, layout.num_kv_heads, layout.head_dim)
    layers = [(torch.randn(shape).half(), torch.randn(shape).half())] * layout.num_layers
    for prefix in range(prefixes):
        client.store(namespace, keys_of(prefix, job.num_blocks), layers)


def sample(ask: Callable[[], float], count: int) -> float:
    """Median of some round trips, microseconds.

    Args:
        ask: One round trip; the kernel's time in it, which is subtracted, microseconds.
        count: How many.
    """
    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        kernel_us = ask()
        times.append((time.perf_counter() - start_s) * 1e6 - kernel_us)
    return statistics.median(times)


def asking(stream: AttendStream) -> Callable[[], float]:
    """A round trip of one layer; its kernel's time, microseconds."""
    queries = torch.randn(1, HEADS, HEAD_DIM).half()

    def ask() -> float:
        stream.attend(0, queries)
        assert stream.timing is not None
        return stream.timing.kernel_ns / 1e3

    return ask


def start_servers(device: str) -> dict[str, Server]:
    """The bare servers by name: those that compute, and those that compute nothing."""
    kinds = ("grpc_echo", "tcp_ping_pong", "unix_ping_pong")
    return {
        name + suffix: Server(name.split("_")[0], where)
        for name in kinds
        for suffix, where in (("", device), ("_without_kernel", ""))
    }


def round_trips(job: Job, servers: dict[str, Server], rounds: int, count: int) -> dict[str, float]:
    """Medians over rounds: microseconds of each path, and ratios within a round."""
    peers = {
        name: (Echo if name.startswith("grpc") else PingPong)(server.address())
        for name, server in servers.items()
    }
    endpoint = job.endpoint
    with Client(endpoint, shared_memory_bytes=0) as remote, Client(endpoint) as local:
        store(remote, job, 1)
        streams = []
        for client in (remote, local):
            match = client.lookup(client.open_namespace(job.spec()), keys_of(0, 1))
            streams.append(client.attend(match, query_heads=HEADS))
        assert [stream.is_local for stream in streams] == [False, True]
        paths = {"grpc_attend": asking(streams[0]), "shared_attend": asking(streams[1])}
        paths |= {name: peer.ask for name, peer in peers.items()}
        for ask in paths.values():
            sample(ask, count)
        samples = [{name: sample(ask, count) for name, ask in paths.items()} for _ in range(rounds)]
        for one in (*streams, *peers.values()):
            one.close()
    median = statistics.median
    result = {f"{name}_us": round(median(one[name] for one in samples), 1) for name in paths}
    for baseline in servers:
        attend = "grpc_attend" if baseline.startswith("grpc") else "shared_attend"
        ratio = median(one[attend] / one[baseline] for one in samples)
        result[f"{attend}_to_{baseline}"] = round(ratio, 2)
    return result


def split(jobs: Job, num_streams: int, num_prefixes: int, processes: int) -> list[Job]:
    """The job of `num_streams` streams, over processes."""
    prefixes = [stream % num_prefixes for stream in range(num_streams)]
    return [
        replace(jobs, prefixes=prefixes[number::processes])
        for number in range(min(processes, num_streams))
    ]


def figures(load: Load, seconds: float) -> dict[str, float]:
    """Medians of a load, microseconds, and its rate."""
    median = statistics.median
    wires = [
        whole - queue - kernel
        for whole, queue, kernel in zip(
            load.round_trip_us, load.queue_us, load.kernel_us, strict=True
        )
    ]
    return {
        "layers_per_s": round(len(wires) / seconds),
        "round_trip_us": round(median(load.round_trip_us), 1),
        "wire_us": round(median(wires), 1),
        "queue_us": round(median(load.queue_us), 1),
        "kernel_us": round(median(load.kernel_us), 1),
        "batch_requests": round(statistics.mean(load.batch_requests), 1),
        "slowest_ms": round(max(load.round_trip_us) / 1e3, 1),
    }


def concurrency(job: Job, crew: Crew, counts: list[int], processes: int) -> list[Row]:
    """Where the time of concurrent streams on short prefixes goes, on both paths."""
    rows: list[Row] = []
    with Client(job.endpoint, shared_memory_bytes=0) as client:
        store(client, job, max(counts))
    for path, shared_bytes in (("grpc", 0), ("shared memory", SHARED_BYTES)):
        for count in counts:
            one = replace(job, shared_bytes=shared_bytes)
            load = crew.run(split(one, count, count, processes))
            rows.append({"path": path, "streams": count, **figures(load, job.seconds)})
    return rows


def long_memory(streams: int, tokens: int) -> str:
    """Memory for so many long prefixes."""
    packed_bytes = LONG["num_layers"] * LONG["num_kv_heads"] * 140 * tokens * streams
    return f"{(packed_bytes >> 20) + 256}MiB"


def batching(jobs: dict[str, Job], crew: Crew, streams: int, processes: int) -> list[Row]:
    """Many streams on long prefixes: batched against one by one, shared against distinct.

    Args:
        jobs: A job of each service, by whether it batches, "yes" or "no".
        crew: Runs them.
        streams: Streams.
        processes: Processes of the crew to use.
    """
    rows: list[Row] = []
    for batched, job in jobs.items():
        with Client(job.endpoint, transfer_timeout_s=300) as client:
            store(client, job, streams)
        for prefixes in (streams, 1):
            load = crew.run(split(job, streams, prefixes, processes))
            rows.append({"batching": batched, "prefixes": prefixes, **figures(load, job.seconds)})
    return rows


def gains(rows: list[Row]) -> dict[str, float]:
    """Rates of batching over one by one, and of a shared prefix over distinct ones."""
    rate = {(row["batching"], row["prefixes"] == 1): row["layers_per_s"] for row in rows}
    return {
        "batching_distinct": round(rate["yes", False] / rate["no", False], 2),
        "batching_shared": round(rate["yes", True] / rate["no", True], 2),
        "shared_over_distinct": round(rate["yes", True] / rate["yes", False], 2),
    }


def main() -> None:
    """Runs everything and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="device of the service")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--rounds", type=int, default=15, help="alternations of round trips; 0 for none"
    )
    parser.add_argument("--count", type=int, default=200, help="round trips of one alternation")
    parser.add_argument("--streams", default="1,8,32", help="concurrent streams, short prefixes")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each load")
    parser.add_argument("--long-streams", type=int, help="streams on long prefixes; 0 for none")
    parser.add_argument("--long-tokens", type=int, default=32768, help="tokens of such a prefix")
    parser.add_argument("--processes", type=int, help="processes of the streams on long prefixes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    is_cuda = options.device.startswith("cuda")
    long_streams = options.long_streams
    if long_streams is None:
        long_streams = 32 if is_cuda else 0
    processes = options.processes or max(1, min(16, (os.cpu_count() or 2) - 4))
    counts = [int(count) for count in options.streams.split(",") if count]
    # Child processes first: they must not inherit gRPC's threads.
    crew = Crew(processes)
    servers = start_servers(options.device) if options.rounds else {}
    services = [Service(options.device, "256MiB")]
    if long_streams:
        memory = long_memory(long_streams, options.long_tokens)
        services += [
            Service(options.device, memory, *flags)
            for flags in ((), ("--attend-batch", "1", "--attend-window-us", "0"))
        ]
    try:
        endpoints = [service.endpoint() for service in services]
        job = short_job(endpoints[0], options.device, options.seconds)
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        }
        if servers:
            result["round_trips"] = round_trips(job, servers, options.rounds, options.count)
        # While they end they take the cores.
        while servers:
            servers.popitem()[1].close()
        if counts:
            result["concurrency"] = concurrency(job, crew, counts, processes)
        if long_streams:
            num_blocks = options.long_tokens // LONG["block_tokens"]
            jobs = {
                batched: Job(
                    endpoint, SHARED_BYTES, [], num_blocks, LONG, CODED, HEADS, options.seconds
                )
                for batched, endpoint in zip(("yes", "no"), endpoints[1:], strict=True)
            }
            result["batching"] = batching(jobs, crew, long_streams, processes)
            result["gains"] = gains(result["batching"])
    finally:
        for one in (*services, *servers.values(), crew):
            one.close()
    if options.json:
        print(json.dumps(result, indent=1))
        return
    console = Console(width=140)
    for name, value in result.items():
        if isinstance(value, list):
            table = Table(title=name)
            for column in value[0]:
                table.add_column(column, justify="right")
            for row in value:
                table.add_row(*(str(cell) for cell in row.values()))
            console.print(table)
        else:
            console.print(name, value)


if __name__ == "__main__":
    main()
