"""Measures the GPU codec: speed against the device's own copies, and codes against plain torch.

    python benchmarks/codec.py [--output DIRECTORY]

Prints one table and writes it, with the raw figures, as codec-<gpu>-<date>.md and .json. Rates
count each input and output byte once; the copy rate counts bytes read and bytes written.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

# Their siblings, whatever the working directory: `python benchmarks/codec.py`.
sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import copy_rate, median_us, write

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.bits import unpack_field
from polarcache.kernels.codec import Codec

SHAPE = BlockShape(128, 8, 128, 128, "half", 128)
NUM_SLICES = 2048  # x 128 tokens x 8 heads: 2 million token-heads
NUM_LAYERS = 32
CHECKED_SLICES = 16
GRAPH_CALLS = 20
BENCH_MS = (20, 100)  # of warming up and of measuring
PROFILES = (
    "k=pair:r4t4:minmax,v=int4",
    "k=pair:r4t4,v=int4",
    "k=pair:r3t3,v=int4",
    "k=pair:r3t3,v=int2",
    "k=pair:r4t4,v=exact",
    "k=exact,v=int4",
    "k=pair:r4t4:arc2,v=int4",
    "k=pair:tiers6,v=polar:b6",
    "k=polar:b8,v=polar:b8",
    "k=polar:b6,v=polar:b6",
    "k=recursive,v=recursive",
    "k=recursive:log8,v=recursive:log8",
    "k=recursive:deep,v=recursive:deep",
    "exact",
)


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one profile.

    Attributes:
        profile: canonical profile text.
        encode_us: median time to encode NUM_SLICES slices.
        encode_ratio: bytes read and written over time, over the copy rate.
        decode_us: median time to decode them.
        decode_ratio: likewise.
        graph_us: time to encode one block of NUM_LAYERS layers in a CUDA graph; 0 without kernels.
        codes_differ: share of codes that differ from plain torch on the CPU.
        parameters_differ: share of parameters that do.
    """

    profile: str
    encode_us: float
    encode_ratio: float
    decode_us: float
    decode_ratio: float
    graph_us: float
    codes_differ: float
    parameters_differ: float


def main() -> None:
    """Runs every profile and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    output = parser.parse_args().output
    torch.manual_seed(1)
    size = (NUM_SLICES, SHAPE.tokens, SHAPE.kv_heads, SHAPE.head_dim)
    keys, values = _keys(size), torch.randn(size, device="cuda", dtype=torch.float16)
    rate = copy_rate(keys, *BENCH_MS)
    rows = [_measure(profile, keys, values, rate) for profile in PROFILES]
    _write(rows, rate, output)


def _keys(size: tuple[int, ...]) -> Tensor:
    """Returns keys whose pairs draw anything from rings to narrow clusters."""
    mean = 4 * torch.randn(size[2:], device="cuda")
    spread = torch.rand(size[2:], device="cuda")
    keys = torch.randn(size, device="cuda", dtype=torch.float16)
    return keys.mul_(spread.half()).add_(mean.half())


def _time_us(run: Callable[[], object]) -> float:
    return median_us(run, *BENCH_MS)


def _measure(text: str, keys: Tensor, values: Tensor, rate: float) -> Row:
    codec = Codec(Profile.parse(text), SHAPE, torch.float16)
    packed = torch.empty((NUM_SLICES, codec.layout.slice_bytes), dtype=torch.uint8, device="cuda")
    refused = torch.zeros((2, NUM_SLICES), dtype=torch.int32, device="cuda")
    codes, parameters = _differences(codec, keys, values)
    num_bytes = keys.nbytes + values.nbytes + packed.nbytes
    encode_us = _time_us(lambda: codec.encode_unchecked(keys, values, packed, refused))
    keys_out, values_out = torch.empty_like(keys), torch.empty_like(values)
    decode_us = _time_us(lambda: codec.decode(packed, keys_out, values_out))
    row = Row(
        profile=text,
        encode_us=encode_us,
        encode_ratio=num_bytes / encode_us / rate,
        decode_us=decode_us,
        decode_ratio=num_bytes / decode_us / rate,
        graph_us=_graph_us(codec, keys, values),
        codes_differ=codes,
        parameters_differ=parameters,
    )
    print(row, flush=True)
    return row


def _differences(codec: Codec, keys: Tensor, values: Tensor) -> tuple[float, float]:
    """Returns the shares of codes and of parameters that differ from the CPU's."""
    keys, values = keys[:CHECKED_SLICES], values[:CHECKED_SLICES]
    size = (CHECKED_SLICES, codec.layout.slice_bytes)
    expected = torch.full(size, 0xA5, dtype=torch.uint8)
    codec.encode(keys.cpu(), values.cpu(), expected)
    got = torch.full(size, 0x5A, dtype=torch.uint8, device="cuda")
    codec.encode(keys, values, got)
    differ = {"code": [0, 0], "float16": [0, 0], "element": [0, 0]}
    for field in codec.layout.fields:
        wrong = unpack_field(field, got.cpu()) != unpack_field(field, expected)
        differ[field.dtype][0] += int(wrong.sum())
        differ[field.dtype][1] += wrong.numel()
    if differ["element"][0]:
        raise AssertionError("exact elements differ")
    codes, parameters = (differ[kind][0] / max(1, differ[kind][1]) for kind in ("code", "float16"))
    return codes, parameters


def _graph_us(codec: Codec, keys: Tensor, values: Tensor) -> float:
    """Returns the time of one block of all layers, one call of a CUDA graph of many."""
    packed = torch.empty(
        (GRAPH_CALLS, NUM_LAYERS, codec.layout.slice_bytes), dtype=torch.uint8, device="cuda"
    )
    refused = torch.zeros((2, NUM_LAYERS), dtype=torch.int32, device="cuda")

    def encode_all() -> None:
        for call in range(GRAPH_CALLS):
            part = slice(call * NUM_LAYERS, (call + 1) * NUM_LAYERS)
            codec.encode_unchecked(keys[part], values[part], packed[call], refused)

    encode_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode_all()
    return _time_us(graph.replay) / GRAPH_CALLS


def _write(rows: list[Row], rate: float, output: Path) -> None:
    lines = [
        f"torch {torch.__version__}; fp16, T 128, Hkv 8, D 128, {NUM_SLICES} slices; device-to-"
        f"device copy {rate / 1e3:.0f} GB/s. Ratios: bytes in and out over time, to that rate.",
        f"Graph: one block of {NUM_LAYERS} layers. Differing: against plain torch on the CPU.",
        "",
        "| profile | encode us | ratio | decode us | ratio | graph us | codes differ | "
        "parameters differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.profile} | {row.encode_us:.0f} | {row.encode_ratio:.2f} | {row.decode_us:.0f} | "
        f"{row.decode_ratio:.2f} | {row.graph_us:.1f} | {row.codes_differ:.2e} | "
        f"{row.parameters_differ:.2e} |"
        for row in rows
    ]
    write("codec", "GPU codec", lines, [asdict(row) for row in rows], rate, output)


if __name__ == "__main__":
    main()
