"""PolarCache at work on this machine: four workers, one document, one service.

Worker A computes a document's keys and values and stores them. Worker B asks other questions of
the same document and starts from the store. Then memory is shrunk, blocks spill to Redis, the
service restarts, and worker C is served from Redis. Worker D downloads nothing: the service attends
to the document for it.

    python examples/demo/run.py [--output DIR] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import attended_line, draw_quality, print_report, verdict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from polarcache.client import Client

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "worker.py"
PROFILES = [
    "exact",
    "k=pair:r4t4:minmax,v=int4",
    "k=pair:r4t4,v=int4",
    "k=polar:b8,v=polar:b8",
    "k=pair:tiers6,v=polar:b6",
    "k=recursive,v=recursive",
    "k=recursive:deep,v=recursive:deep",
]
FULL = {"tokens": 5120, "records": 48, "continuation_tokens": 1024, "profiles": PROFILES}
QUICK = {
    "tokens": 2048,
    "records": 16,
    "continuation_tokens": 512,
    "profiles": [PROFILES[0], PROFILES[2], PROFILES[5]],
}
REMOTE_PROFILES = [PROFILES[0], PROFILES[2], PROFILES[3]]
SHRUNK_BYTES = 1 << 20


class Service:
    """The cache service in a process of its own.

    Args:
        state_dir: Directory of its embedded Redis.
        log_path: Where its log goes.
    """

    def __init__(self, state_dir: Path, log_path: Path) -> None:
        self._state_dir = state_dir
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = ""

    def start(self) -> None:
        """Starts it and waits until it listens."""
        port_file = self._state_dir / "port"
        port_file.unlink(missing_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "polarcache.cli", "serve", "--device", "cpu",
                    "--memory", "512MiB", "--redis", "embedded", "--port", "0",
                    "--state-dir", str(self._state_dir), "--port-file", str(port_file),
                ],
                stderr=log,
            )  # fmt: skip
        while not port_file.exists():
            if self._process.poll() is not None:
                raise SystemExit(f"the service did not start; see {self._log_path}")
            time.sleep(0.05)
        self.endpoint = f"grpc://127.0.0.1:{port_file.read_text().strip()}"

    def stop(self) -> None:
        """Has it copy memory to Redis and end."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise
            finally:
                self._process = None


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """Progress bars."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def run_worker(progress: Progress, name: str, role: str, settings: dict[str, Any]) -> Any:
    """Runs a worker process to its end and returns its result."""
    task = progress.add_task(f"worker {name}: start", total=None)
    process = subprocess.Popen(
        [sys.executable, str(WORKER), role, json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        # Threads that wait must not spin: on busy cores that made a prefill three times as slow.
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
    )
    result = None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            message = json.loads(line)
            if "result" in message:
                result = message["result"]
            else:
                progress.update(
                    task,
                    description=f"worker {name}: {message['step']}",
                    completed=message["done"],
                    total=message["total"],
                )
        if process.wait() != 0 or result is None:
            raise SystemExit(f"worker {name} failed with exit code {process.returncode}")
    finally:
        process.kill()
    progress.update(task, description=f"worker {name}: done", completed=1, total=1)
    return result


def shrink(service: Service) -> dict[str, int]:
    """Shrinks the memory tier, so that blocks spill; what happened."""
    with Client(service.endpoint, transfer_timeout_s=60) as client:
        before = dict(client.stats().gauges)
        client.set_memory_limit(SHRUNK_BYTES)
        stats = client.stats()
        return {
            "blocks_before": before["memory_blocks"],
            "blocks_after": stats.gauges["memory_blocks"],
            "spilled_blocks": stats.counters["spilled_blocks_total"],
            "spilled_bytes": stats.counters["spilled_bytes_total"],
        }


def run(console: Console, output: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """Runs the whole story; its results."""
    results: dict[str, Any] = {"settings": scale}
    with tempfile.TemporaryDirectory(prefix="polarcache-demo-") as state:
        service = Service(Path(state), output / "service.log")
        try:
            with bar(console) as progress:
                task = progress.add_task("service: start", total=1)
                service.start()
                progress.update(task, completed=1)
                scale = {**scale, "endpoint": service.endpoint}
                results["A"] = run_worker(progress, "A", "store", scale)
                some = {**scale, "questions": [3, 5, 7, 8], "profiles": scale["profiles"][:3]}
                results["B"] = run_worker(progress, "B", "reuse", some)
                task = progress.add_task("service: shrink memory, restart", total=2)
                results["spill"] = shrink(service)
                progress.update(task, completed=1)
                service.stop()
                service.start()
                progress.update(task, completed=2)
                others = {**scale, "questions": [1, 9, 11, 12], "endpoint": service.endpoint}
                results["C"] = run_worker(progress, "C", "judge", others)
                profiles = [one for one in scale["profiles"] if one in REMOTE_PROFILES]
                asked = {**others, "questions": [2, 4, 6, 10], "profiles": profiles}
                results["D"] = run_worker(progress, "D", "attend", asked)
        finally:
            service.stop()
    return results


def main() -> int:
    """Runs the demo, prints its report and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--quick", action="store_true", help="a shorter document, fewer profiles")
    options = parser.parse_args()
    # Ends the service and its Redis too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=max(144, Console().width))
    start_s = time.monotonic()
    scale = QUICK if options.quick else FULL
    results = run(console, options.output, scale)
    print_report(console, results)
    spill = results["spill"]
    console.print(
        f"memory shrunk to {SHRUNK_BYTES >> 20} MiB: {spill['blocks_before']} blocks became "
        f"{spill['blocks_after']}, {spill['spilled_blocks']} spilled to Redis "
        f"({spill['spilled_bytes'] / 2**20:.1f} MiB); the service restarted"
    )
    console.print(attended_line(results))
    fine, line = verdict(results)
    results |= {"verdict": line, "seconds": round(time.monotonic() - start_s, 1)}
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_quality(results, options.output / "quality.png")
    console.print(f"[bold {'green' if fine else 'red'}]{line}[/]")
    console.print(f"{results['seconds']} s; files in {options.output}: results.json, quality.png, "
                  "service.log")  # fmt: skip
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
