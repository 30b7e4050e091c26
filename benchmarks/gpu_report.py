"""What the GPU benchmarks share: times, the copy rate of the device, and how figures are kept."""

import json
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench


def median_us(run: Callable[[], object], warmup_ms: int, rep_ms: int) -> float:
    """Returns the median time of a call by Triton's do_bench, microseconds."""
    return float(do_bench(run, warmup=warmup_ms, rep=rep_ms, return_mode="median")) * 1e3


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """Returns what replays the launches of a call from a CUDA graph, without the host's time."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_rate(source: Tensor, warmup_ms: int, rep_ms: int) -> float:
    """Returns bytes read and written per microsecond by copies of `source` on its device."""
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(lambda: target.copy_(source), warmup_ms, rep_ms)


def write(
    kind: str,
    heading: str,
    lines: Sequence[str],
    rows: Sequence[dict[str, Any]],
    rate: float,
    output: Path,
) -> None:
    """Prints a table and writes it, with the raw figures, as KIND-<gpu>-<date>.md and .json.

    Args:
        kind: what the files are named after.
        heading: of the table; the GPU, the date and the commit follow it.
        lines: Markdown below the heading.
        rows: raw figures.
        rate: `copy_rate` of the run.
        output: folder of the files.
    """
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    today = datetime.now(UTC).date().isoformat()
    title = f"{torch.cuda.get_device_name()}, {today}, commit {commit or 'unknown'}"
    table = "\n".join([f"# {heading}: {title}", "", *lines]) + "\n"
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    name = f"{kind}-{gpu}-{today}"
    (output / f"{name}.md").write_text(table)
    figures = {"gpu": title, "copy_bytes_per_us": rate, "rows": list(rows)}
    (output / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
