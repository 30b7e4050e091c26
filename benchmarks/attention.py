"""Measures attention over packed pages against fp16 attention and published packed kernels.

    python benchmarks/attention.py [--output DIRECTORY] [--json] [--cases N ...] [--quick]

First every variant is checked against float64. Then each row is timed twice: as calls in one CUDA
graph that go through several copies of the data, so that none lies in the second-level cache, and
by Triton's do_bench, which flushes that cache and counts the launch. The floor is the time of a
device-to-device copy of as many bytes, read and written. Variants whose library is missing are
left out, with a word.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

# Their siblings, whatever the working directory: `python benchmarks/attention.py`.
sys.path.insert(0, str(Path(__file__).parent))

from attention_variants import (
    HEAD_DIM,
    QUERY_HEADS,
    Case,
    Ready,
    baseline,
    flashinfer,
    polarcache,
    sdpa,
)
from gpu_report import copy_rate, median_us, write

CASES = (
    Case(8, 32768),
    Case(16, 65536),
    Case(1, 32768),
    Case(8, 4096),
    Case(32, 8192),
    Case(1, 32768, sessions=16),
)
PROFILES = (
    "k=pair:r4t4:minmax,v=int4",
    "k=pair:r4t4,v=int4",
    "k=pair:r4t4:arc2,v=int4",
    "k=pair:r3t3,v=int4",
)
# Hundreds of heads: a peaked one hangs on two tokens, so that few heads scatter.
CHECKED = (Case(12, 1024), Case(1, 768, sessions=16))
LARGEST_ERROR = 2e-3
LARGEST_PEAKED_ERROR = 5e-3
# Copies of the data together exceed any second-level cache.
ROTATED_BYTES = 400 << 20
MOST_COPIES = 12
REPLAYS = 15
COPIED_BYTES = 1 << 30
BENCH_MS = (10, 50)  # of warming up and of measuring

Make = Callable[..., Ready]


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one variant and case.

    Attributes:
        case: shapes.
        variant: what attended.
        graph_us: median time of a call in a CUDA graph.
        do_bench_us: median time by do_bench.
        to_sdpa: SDPA's graph time over this one's; 0 where not measured.
        to_flashinfer: FlashInfer fp16's likewise.
        to_flashinfer_fp8: FlashInfer fp8's likewise.
        num_bytes: bytes of keys and values read.
        floor: share of the copy rate, by graph time.
    """

    case: str
    variant: str
    graph_us: float
    do_bench_us: float
    to_sdpa: float
    to_flashinfer: float
    to_flashinfer_fp8: float
    num_bytes: int
    floor: float


def main() -> None:
    """Checks, measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines too")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--quick", action="store_true", help="one profile, no FlashInfer")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    variants = _variants(quick=arguments.quick)
    for name, make in variants.items():
        _check(name, make)
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    rate = copy_rate(source, *BENCH_MS)
    del source
    rows: list[Row] = []
    for index in arguments.cases:
        measured: dict[str, Row] = {}
        for name, make in variants.items():
            row = _measure(CASES[index], name, make, rate, measured)
            measured[name] = row
            rows.append(row)
            print(json.dumps(asdict(row)) if arguments.json else row, flush=True)
            torch.cuda.empty_cache()
    _write(rows, rate, arguments.output)


def _variants(*, quick: bool) -> dict[str, Make]:
    """Returns what can run here, by name: those that others are compared with come first."""
    variants: dict[str, Make] = {"SDPA fp16": sdpa}
    if not quick and importlib.util.find_spec("flashinfer") is not None:
        variants["FlashInfer fp16"] = partial(flashinfer, dtype=torch.float16)
        variants["FlashInfer fp8"] = partial(flashinfer, dtype=torch.float8_e4m3fn)
    else:
        print("FlashInfer is left out: not installed, or --quick")
    variants["look-up (PolarQuant)"] = partial(baseline, lookup=True)
    variants["dequantizing (KIVI)"] = partial(baseline, lookup=False)
    for profile in PROFILES[1:2] if quick else PROFILES:
        variants[f"portable {profile}"] = partial(polarcache, profile=profile, portable=True)
        variants[profile] = partial(polarcache, profile=profile, portable=False)
    return variants


def _check(name: str, make: Make) -> None:
    """Compares one variant with float64: fresh inputs, poisoned outputs, peaked queries too."""
    for case in CHECKED:
        ready = make(case, check=True)
        query = torch.randn(case.rows, QUERY_HEADS, HEAD_DIM, device="cuda").half()
        for factor, largest in ((1, LARGEST_ERROR), (20, LARGEST_PEAKED_ERROR)):
            out = torch.full(query.shape, torch.nan, device="cuda")
            got = ready.attend(query * factor, out).double()
            expected = _reference(query * factor, ready, case)
            error = float((got - expected).norm() / expected.norm())
            if not error <= largest:
                raise AssertionError(f"{name}, {case}, queries x{factor}: error {error:.2e}")
            print(f"checked {name}, {case}, queries x{factor}: {error:.1e}", flush=True)


def _reference(query: Tensor, ready: Ready, case: Case) -> Tensor:
    """Returns attention in float64, fp64 [rows, Hq, D]."""
    if ready.keys is None or ready.values is None:
        raise ValueError("expected decoded keys and values to compare with")
    keys, values = (x.double() for x in (ready.keys, ready.values))
    share = QUERY_HEADS // keys.shape[2]
    sessions = query.view(case.sequences, case.sessions, QUERY_HEADS, HEAD_DIM).double()
    out = []
    for q, k, v in zip(sessions, keys, values, strict=True):
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        weights = torch.softmax(torch.einsum("rhd,lhd->rhl", q, k) * HEAD_DIM**-0.5, -1)
        out.append(torch.einsum("rhl,lhd->rhd", weights, v))
    return torch.cat(out)


def _measure(case: Case, name: str, make: Make, rate: float, measured: dict[str, Row]) -> Row:
    first = make(case, check=False)
    copies = max(2, min(MOST_COPIES, ROTATED_BYTES // first.num_bytes + 1))
    ready = [first, *(make(case, check=False) for _ in range(copies - 1))]
    query = torch.randn(case.rows, QUERY_HEADS, HEAD_DIM, device="cuda").half()
    out = torch.empty(query.shape, device="cuda")
    graph_us = _graph_us([partial(one.attend, query, out) for one in ready])
    do_bench_us = median_us(partial(first.attend, query, out), *BENCH_MS)
    ratios = []
    for other in ("SDPA fp16", "FlashInfer fp16", "FlashInfer fp8"):
        ratios.append(measured[other].graph_us / graph_us if other in measured else 0.0)
    floor = first.num_bytes / rate / graph_us
    return Row(str(case), name, graph_us, do_bench_us, *ratios, first.num_bytes, floor)


def _graph_us(calls: list[Callable[[], object]]) -> float:
    """Returns the median time of one of the calls, which a graph makes one after the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return median(times)


def _write(rows: list[Row], rate: float, output: Path) -> None:
    lines = [
        f"torch {torch.__version__}; Hq 32, Hkv 8, D 128, one query row a session; "
        f"device-to-device copy {rate / 1e3:.0f} GB/s. Ratios by graph time; floor: share of the "
        "copy rate.",
        "",
        "| case | variant | graph us | do_bench us | x SDPA | x FlashInfer fp16 | x fp8 | MB | "
        "floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = " | ".join(
            f"{ratio:.2f}" if ratio else "-"
            for ratio in (row.to_sdpa, row.to_flashinfer, row.to_flashinfer_fp8)
        )
        lines.append(
            f"| {row.case} | {row.variant} | {row.graph_us:.1f} | {row.do_bench_us:.1f} | {ratios} "
            f"| {row.num_bytes / 1e6:.0f} | {row.floor:.2f} |"
        )
    figures = [asdict(row) for row in rows]
    write("attention", "Attention over packed pages", lines, figures, rate, output)


if __name__ == "__main__":
    main()
