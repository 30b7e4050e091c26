"""Store and retrieve goodput against a raw loopback socket that moves the same bytes.

Every figure is the median over pairs: one store (or retrieve) and, next to it in time, the same
number of raw bytes over a plain TCP connection with `sendall` and `recv_into`. Ratios count
fp16-equivalent bytes, so a packed block counts as the fp16 block it stands for.

    python benchmarks/put_get.py [--pairs 12] [--json] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from polarcache.client import (
    Client,
    KvLayout,
    Match,
    Namespace,
    NamespaceSpec,
    keep_freed_memory,
)
from polarcache.client.codec import pack_blocks

sys.path.insert(0, str(Path(__file__).resolve().parent))

from raw_socket import RawSocket

# One block is 1 MiB in fp16: two layers of 128 tokens, 8 heads of 128 channels.
LAYOUT = KvLayout(num_layers=2, num_kv_heads=8, head_dim=128)
PACKED_PROFILE = "k=pair:r4t4,v=int4"


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are medians of one call, milliseconds.

    CPU times are those of the worker and of the service until its reply, all threads.
    """

    path: str
    megabytes: int
    frame_mib: int
    store_ratio: float
    retrieve_ratio: float
    store_gb_s: float
    retrieve_gb_s: float
    store_ms: float
    store_worker_cpu_ms: float
    store_service_cpu_ms: float
    store_codec_ms: float
    store_redis_ms: float
    retrieve_ms: float
    retrieve_worker_cpu_ms: float
    retrieve_service_cpu_ms: float
    retrieve_codec_ms: float
    retrieve_redis_ms: float
    pairs: int


@contextmanager
def service(directory: Path, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """A service in a process of its own: endpoint and process."""
    port_file = directory / "port"
    port_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "polarcache.cli", "serve", "--device", "cpu", "--port", "0",
            "--port-file", str(port_file), "--state-dir", str(directory / "state"),
            "--log-level", "warning", *flags,
        ]
    )  # fmt: skip
    while not port_file.exists():
        if process.poll() is not None:
            raise SystemExit("the service did not start")
        time.sleep(0.02)
    try:
        yield f"grpc://127.0.0.1:{port_file.read_text().strip()}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def timed_with_cpu(work: Callable[[], object], service_pid: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds of this process, and CPU seconds of the service."""
    # What clock_getcpuclockid returns on Linux.
    service_clock = (~service_pid << 3) | 2
    start_s, service_start_s = time.process_time(), time.clock_gettime(service_clock)
    elapsed_s = timed(work)
    service_s = time.clock_gettime(service_clock) - service_start_s
    return elapsed_s, time.process_time() - start_s, service_s


def measure(
    client: Client,
    service_pid: int,
    raw: RawSocket,
    path: str,
    megabytes: int,
    frame_mib: int,
    pairs: int,
) -> Row:
    """Medians of `pairs` interleaved pairs, after two that are not counted."""
    packed, redis = path.startswith("packed"), path.endswith("Redis")
    profile = "exact" if path.startswith("exact") else PACKED_PROFILE
    namespace = client.open_namespace(
        NamespaceSpec(model=f"{path} {megabytes}", layout=LAYOUT, profile=profile)
    )
    layers = random_layers(megabytes)
    views = [tensor.numpy().reshape(-1).view("uint8").data for pair in layers for tensor in pair]
    target = random_layers(megabytes)
    blocks = pack_blocks(namespace, layers) if packed else []
    packed_target = [bytearray(namespace.packed_block_bytes) for _ in blocks]
    size = megabytes << 20
    store_ratios, retrieve_ratios, store_s, retrieve_s = [], [], [], []
    store_cpu_s: list[tuple[float, float]] = []
    retrieve_cpu_s: list[tuple[float, float]] = []
    encode_ns, decode_ns, write_ns, read_ns = [], [], [], []
    for number in range(pairs + 2):
        keys = [number.to_bytes(4, "big") + i.to_bytes(4, "big") for i in range(megabytes)]
        before = client.stats().counters

        def store_blocks(keys: list[bytes] = keys) -> None:
            if packed:
                client.store_packed(namespace, keys, blocks)
            else:
                client.store(namespace, keys, layers, durable=redis)

        store, *store_cpu = timed_with_cpu(store_blocks, service_pid)
        raw_put = timed(lambda: raw.put(views))
        between = client.stats().counters
        if redis:
            client.clear(namespace, tiers=["memory"])
        match = client.lookup(namespace, keys)

        def retrieve_blocks(match: Match = match) -> None:
            if packed:
                client.retrieve_packed(match, out=packed_target)
            else:
                client.retrieve(match, out=target)

        retrieve, *retrieve_cpu = timed_with_cpu(retrieve_blocks, service_pid)
        raw_get = timed(lambda: raw.get(size))
        after = client.stats().counters
        client.release(match)
        client.delete(namespace, keys)
        if number < 2:
            continue
        store_ratios.append(raw_put / store)
        retrieve_ratios.append(raw_get / retrieve)
        store_s.append(store)
        retrieve_s.append(retrieve)
        store_cpu_s.append((store_cpu[0], store_cpu[1]))
        retrieve_cpu_s.append((retrieve_cpu[0], retrieve_cpu[1]))
        for name, start, end, series in (
            ("codec_encode_ns_total", before, between, encode_ns),
            ("codec_decode_ns_total", between, after, decode_ns),
            ("tier_redis_ns_total", before, between, write_ns),
            ("tier_redis_ns_total", between, after, read_ns),
        ):
            series.append(end[name] - start[name])
    median = statistics.median

    def cpu_ms(pairs_s: list[tuple[float, float]], side: int) -> float:
        return round(median(pair[side] for pair in pairs_s) * 1e3, 2)

    return Row(
        path=path,
        megabytes=megabytes,
        frame_mib=frame_mib,
        store_ratio=round(median(store_ratios), 2),
        retrieve_ratio=round(median(retrieve_ratios), 2),
        store_gb_s=round(size / median(store_s) / 1e9, 2),
        retrieve_gb_s=round(size / median(retrieve_s) / 1e9, 2),
        store_ms=round(median(store_s) * 1e3, 2),
        store_worker_cpu_ms=cpu_ms(store_cpu_s, 0),
        store_service_cpu_ms=cpu_ms(store_cpu_s, 1),
        store_codec_ms=round(median(encode_ns) / 1e6, 2),
        store_redis_ms=round(median(write_ns) / 1e6, 2),
        retrieve_ms=round(median(retrieve_s) * 1e3, 2),
        retrieve_worker_cpu_ms=cpu_ms(retrieve_cpu_s, 0),
        retrieve_service_cpu_ms=cpu_ms(retrieve_cpu_s, 1),
        retrieve_codec_ms=round(median(decode_ns) / 1e6, 2),
        retrieve_redis_ms=round(median(read_ns) / 1e6, 2),
        pairs=pairs,
    )


def random_layers(megabytes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of as many 1 MiB blocks."""
    shape = (megabytes * LAYOUT.block_tokens, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    return [
        (torch.randn(shape).half(), torch.randn(shape).half()) for _ in range(LAYOUT.num_layers)
    ]


def resident_per_packed_byte(endpoint: str, process: psutil.Process) -> dict[str, float]:
    """How the service's resident memory grows with what it stores."""
    with Client(endpoint, shared_memory_bytes=0) as client:
        namespace = client.open_namespace(
            NamespaceSpec(model="resident", layout=LAYOUT, profile=PACKED_PROFILE)
        )
        blocks = pack_blocks(namespace, random_layers(16))
        store_many(client, namespace, blocks, 16, 0)
        samples = []
        for step in range(1, 4):
            samples.append((stored_bytes(client), process.memory_info().rss))
            store_many(client, namespace, blocks, 60, step)
        samples.append((stored_bytes(client), process.memory_info().rss))
    slope = (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])
    return {
        "resident_bytes_per_packed_byte": round(slope, 3),
        "constant_mib": round((samples[0][1] - slope * samples[0][0]) / 2**20),
        "stored_mib": round(samples[-1][0] / 2**20),
    }


def store_many(
    client: Client, namespace: Namespace, blocks: list[object], times: int, step: int
) -> None:
    """Stores the same bytes under fresh keys."""
    for i in range(times):
        keys = [b"%d %d %d" % (step, i, j) for j in range(len(blocks))]
        client.store_packed(namespace, keys, blocks)


def stored_bytes(client: Client) -> int:
    """Packed bytes in the memory tier."""
    return int(client.stats().gauges["memory_used_bytes"])


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    columns = list(Row.__dataclass_fields__)
    lines = [
        "# Store and retrieve against a raw loopback socket",
        "",
        f"`python benchmarks/put_get.py --output benchmarks/results`, {result['date']}, "
        f"{result['machine']}, commit {result['commit']}. Ratios of fp16-equivalent bytes a second "
        "to a raw TCP socket that moves the same fp16 bytes between two processes; medians of "
        "interleaved pairs. `*_codec_ms` is the time in codec, checks and page copies, summed over "
        "threads, `*_redis_ms` the time in Redis, `*_cpu_ms` the CPU time of all threads. The "
        "memory tier's time is that of its page copies. `via Redis` stores durably and retrieves "
        "from Redis alone.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[c]) for c in columns) + " |" for row in result["rows"]),
        "",
        "Resident memory of the service as it stores packed blocks: "
        + ", ".join(f"{name} {value}" for name, value in result["memory"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Model name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """Short hash of the checkout, or "unknown"."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Runs everything and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=12, help="counted pairs of each figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="directory for put_get.json")
    parser.add_argument("--sizes", default="1,4,16,64", help="MiB of blocks of one call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes = [int(size) for size in options.sizes.split(",")]
    rows: list[Row] = []
    # Child processes first: they must not inherit gRPC's threads.
    raw = RawSocket()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for frame_mib in (2, 4):
            flags = ("--memory", "1GiB", "--frame-bytes", f"{frame_mib}MiB", "--redis", "off")
            with service(directory, *flags) as (endpoint, process):
                with Client(endpoint, shared_memory_bytes=0) as over_tcp:
                    for size in sizes:
                        for path in ("exact", "packed by worker"):
                            rows.append(
                                measure(
                                    over_tcp, process.pid, raw, path, size, frame_mib,
                                    options.pairs,
                                )
                            )  # fmt: skip
                    if frame_mib == 2:
                        path = "coded by service"
                        rows.append(measure(over_tcp, process.pid, raw, path, 16, 2, options.pairs))
                if frame_mib == 4:
                    with Client(endpoint) as shared:
                        path = "exact, shared memory"
                        for size in sizes:
                            rows.append(
                                measure(shared, process.pid, raw, path, size, 4, options.pairs)
                            )
        flags = ("--memory", "1GiB", "--redis", "embedded")
        with service(directory, *flags) as (endpoint, process), Client(endpoint) as client:
            path = "exact, via Redis"
            rows.append(measure(client, process.pid, raw, path, 16, 4, options.pairs))
        with service(directory, "--memory", "1GiB", "--redis", "off") as (endpoint, process):
            resident = resident_per_packed_byte(endpoint, process)
    raw.close()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu_name()}, {psutil.cpu_count()} cores",
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
        "memory": resident,
    }
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "put_get.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.output / "put_get.md").write_text(markdown(result))
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(title="store and retrieve, ratio to a raw loopback socket (fp16-equivalent)")
    for column in Row.__dataclass_fields__:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in asdict(row).values()))
    console = Console(width=180)
    console.print(table)
    console.print(resident)


if __name__ == "__main__":
    main()
