"""Times candidates of how the GPU codec's kernels are launched, for the constants in kernels/gpu.

    python benchmarks/codec_sweep.py [--kernels PATTERN] [--jobs N] [--output FILE]

Compiles every candidate in N processes into Triton's cache, then times them one after the other and
prints the best of each kernel, as microseconds and as the ratio that benchmarks/codec.py prints:
bytes in and out of that side once, over time, to the copy rate. Launches are replayed from CUDA
graphs: the host takes longer to prepare some of them than the device takes to run them.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Their siblings, whatever the working directory: `python benchmarks/codec_sweep.py`.
sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import copy_rate, graphed, median_us

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.codec import Codec
from polarcache.kernels.gpu import fused
from polarcache.kernels.gpu.fused import FusedPlan
from polarcache.kernels.gpu.launch import Plan
from polarcache.kernels.layout import PackedLayout

SHAPE = BlockShape(128, 8, 128, 128, "half", 128)
NUM_SLICES = 2048
COMPILED_SLICES = 16  # Triton specializes on multiples of 16 alone
ROW_BYTES = 256
FUSED = ("k=pair:r4t4,v=int4", "k=pair:r3t3,v=int2", "k=pair:r4t4:arc2,v=int4")
SINGLES = (
    ("k=recursive,v=recursive", "key"),
    ("k=recursive,v=recursive", "value"),
    ("k=recursive:deep,v=recursive:deep", "key"),
    ("k=recursive:deep,v=recursive:deep", "value"),
    ("k=polar:b8,v=polar:b8", "key"),
    ("k=polar:b8,v=polar:b8", "value"),
    ("k=polar:b6,v=polar:b6", "key"),
    ("k=polar:b6,v=polar:b6", "value"),
    ("k=pair:tiers6,v=exact", "key"),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to launch one kernel.

    Attributes:
        profile: text of the profile.
        side: `key`, `value` or `fused`.
        encode: whether it encodes.
        launch: rows, warps, stages, registers, programs; of `fused`, steps,
            registers, pairs of a warp.
    """

    profile: str
    side: str
    encode: bool
    launch: tuple[int, ...]

    @property
    def kernel(self) -> str:
        """Names what candidates compete for."""
        return f"{'encode' if self.encode else 'decode'} {self.side} {self.profile}"


def candidates() -> Iterator[Candidate]:
    """Yields all candidates."""
    for profile, encode in itertools.product(FUSED, (True, False)):
        pairs = (1024, 2048) if encode else (1024,)
        for launch in itertools.product((2, 4, 8), (0, 80, 96, 112, 128), pairs):
            yield Candidate(profile, "fused", encode, launch)
    for (profile, side), encode in itertools.product(SINGLES, (True, False)):
        centred = encode and "k=recursive," not in profile
        whole = side == "key" and (centred or "tiers" in profile)
        for rows, warps in ((128, 4), (128, 8)) if whole else ((64, 4), (128, 4), (128, 8)):
            for stages, registers in itertools.product((1, 2), (0, 128)):
                for programs in (1, 2, 3, 4):
                    launch = (rows, warps, stages, registers, programs)
                    yield Candidate(profile, side, encode, launch)


def run(candidate: Candidate, keys: Tensor, values: Tensor, packed: Tensor) -> None:
    """Launches a candidate once on all slices of `packed`."""
    profile, slices = Profile.parse(candidate.profile), packed.shape[0]
    layout = Codec(profile, SHAPE, torch.float16).layout
    packed = packed_slices(packed, layout)
    flags = torch.zeros((2, slices), dtype=torch.int32, device="cuda")
    if candidate.side == "fused":
        steps, _, pairs = candidate.launch
        plan = FusedPlan.of(profile, SHAPE, layout, steps, pairs)
        _run_fused(candidate, plan, keys, values, packed, flags)
        return
    singles = Plan.of(profile, SHAPE, layout)
    assert singles is not None
    (side,) = (single for single in singles.singles if single.side == candidate.side)
    rows, warps, stages, registers, programs = candidate.launch
    launch = side.encoder if candidate.encode else side.decoder
    items = SHAPE.tokens * SHAPE.kv_heads // rows
    constants = {**launch.constants, "ROWS": rows, "ITEMS": items, "STAGES": stages}
    launch = replace(
        launch, constants=constants, num_warps=warps, programs=programs, registers=registers
    )
    x = keys if candidate.side == "key" else values
    if candidate.encode:
        replace(side, encoder=launch).encode(x, None, None, packed, flags[0])
    else:
        replace(side, decoder=launch).decode(packed, None, x)


def _run_fused(
    candidate: Candidate,
    plan: FusedPlan | None,
    keys: Tensor,
    values: Tensor,
    packed: Tensor,
    flags: Tensor,
) -> None:
    assert plan is not None
    grid = (packed.shape[0] * (plan.constants["KEY_PARTS"] + plan.constants["VALUE_PARTS"]),)
    options: dict[str, Any] = dict(plan.constants) | {"num_warps": plan.num_warps}
    if candidate.launch[1]:
        options["maxnreg"] = candidate.launch[1]
    strides = (*fused.row_strides(keys), *fused.row_strides(values))
    if candidate.encode:
        fused.encode_kernel[grid](
            keys, values, None, packed, flags, len(packed), *strides, packed.stride(0), **options
        )
    else:
        fused.decode_kernel[grid](
            packed, keys, values, None, len(packed), packed.stride(0), *strides, **options
        )


def packed_slices(room: Tensor, layout: PackedLayout) -> Tensor:
    """Returns the packed slices that lie in `room`, uint8 [slices, slice_bytes]."""
    return room.view(-1)[: len(room) * layout.slice_bytes].view(len(room), -1)


def tensors(slices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns keys, values and room for packed slices."""
    torch.manual_seed(1)
    size = (slices, SHAPE.tokens, SHAPE.kv_heads, SHAPE.head_dim)
    keys, values = (torch.randn(size, device="cuda", dtype=torch.float16) for _ in "kv")
    room = SHAPE.tokens * SHAPE.kv_heads * 2 * ROW_BYTES
    return keys, values, torch.zeros((slices, room), dtype=torch.uint8, device="cuda")


def compile_one(candidate: Candidate) -> str:
    """Compiles in a process of its own; returns what is wrong with a candidate, or nothing."""
    try:
        run(candidate, *tensors(COMPILED_SLICES))
        torch.cuda.synchronize()
    except Exception as error:  # a candidate may ask for too much of anything
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def main() -> None:
    """Compiles, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", default="")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--output", type=Path, default=Path("codec-sweep.json"))
    arguments = parser.parse_args()
    chosen = [one for one in candidates() if re.search(arguments.kernels, one.kernel)]
    # The number of programs is no part of what is compiled.
    compiled = {(one.kernel, one.launch[:4]): one for one in chosen}
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        texts = pool.map(compile_one, compiled.values(), chunksize=1)
    errors = dict(zip(compiled, texts, strict=True))
    keys, values, packed = tensors(NUM_SLICES)
    rate = copy_rate(keys, 10, 40)
    rows, coded = [], ""
    for candidate in chosen:
        error = errors[candidate.kernel, candidate.launch[:4]]
        row = {"kernel": candidate.kernel, "launch": candidate.launch, "error": error}
        if not error:
            codec = Codec(Profile.parse(candidate.profile), SHAPE, torch.float16)
            if coded != candidate.profile:  # decoders read what was encoded
                codec.encode(keys, values, packed_slices(packed, codec.layout))
                coded = candidate.profile
            sides = ("key", "value") if candidate.side == "fused" else (candidate.side,)
            sizes = (f.num_bytes for f in codec.layout.fields if f.name.split("_")[0] in sides)
            moved = NUM_SLICES * sum(sizes) + len(sides) * keys.nbytes
            us = median_us(graphed(partial(run, candidate, keys, values, packed)), 2, 8)
            row |= {"us": us, "ratio": moved / us / rate}
        rows.append(row)
        arguments.output.write_text(json.dumps(rows))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = [row for row in rows if row["kernel"] == kernel]
        timed = sorted((row for row in of_kernel if "us" in row), key=lambda row: row["us"])
        print(kernel, f"({len(of_kernel) - len(timed)} failed)")
        for row in timed[:4]:
            print(f"    {row['us']:6.0f} us {row['ratio']:.2f} {row['launch']}")


if __name__ == "__main__":
    main()
