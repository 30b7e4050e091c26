"""The CUDA kernels, compiled for this CPU: every index, swizzle and merge without a GPU."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.attention import fast
from polarcache.kernels.attention.fast import FastDecode
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from tests.kernels.attention.reference import attend, store

EMULATED = Path(__file__).parent / "emulated"
SOURCES = Path(fast.__file__).parent / "cuda"
COMPILER = shutil.which("g++")
# What g++ has since version 12, on x86-64.
NEEDED = "#include <barrier>\n_Float16 number;"
MINMAX, ARCS, SMALL = (f"k=pair:{key},v=int4" for key in ("r4t4:minmax", "r4t4:arc2", "r3t3"))
CASES = [
    (MINMAX, "wide.cu", 128, [2500, 130], [16, 3], torch.float16, 2, 0.0, 1.0),
    (ARCS, "wide.cu", 256, [1000, 1], [16, 5], torch.bfloat16, 1, 3.0, 1.0),
    (SMALL, "wide.cu", 128, [1700], [21], torch.float32, 3, 0.0, 20.0),
    (MINMAX, "decode.cu", 128, [2500, 0, 90], [1, 1, 1], torch.float32, 2, 0.0, 1.0),
    (ARCS, "decode.cu", 128, [700, 2200], [2, 1], torch.float16, 0, 0.0, 1.0),
]


def compiled(source: str, macros: dict[str, int], folder: Path) -> Path:
    """Compiles a kernel of the package for the CPU."""
    for path in (*SOURCES.glob("*.cu*"), *EMULATED.iterdir()):
        shutil.copy(path, folder)
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    command = [
        str(COMPILER), "-std=c++20", "-O1", "-w", "-pthread", f'-DKERNEL="{source}"', *defines,
        "main.cpp", "-o", "main",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True)
    return folder / "main"


@pytest.fixture(scope="module", autouse=True)
def _is_able() -> None:
    command = [str(COMPILER), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if COMPILER is None or subprocess.run(command, input=NEEDED, text=True, check=False).returncode:
        pytest.skip("no g++ that has _Float16")


@pytest.mark.parametrize(
    ("text", "source", "tokens", "lengths", "rows", "dtype", "splits", "cap", "factor"), CASES
)
def test_a_kernel_does_what_float64_does(
    text: str, source: str, tokens: int, lengths: list[int], rows: list[int], dtype: torch.dtype,
    splits: int, cap: float, factor: float, tmp_path: Path,
) -> None:  # fmt: skip
    heads, kv_heads = 4, 1
    codec = Codec(Profile.parse(text), BlockShape(tokens, 1, 128, 128, "half", 128), torch.float16)
    options = AttentionOptions(soft_cap=cap)
    form = FastDecode(codec, heads, options)
    column_tiles, block = form._columns(max(rows))
    assert block.source == source
    main = compiled(source, form._macros(block, dtype), tmp_path)
    stored = store(codec, lengths, rows)
    query = (torch.randn(sum(rows), heads, 128) * factor).to(dtype)
    batch = stored.batch
    parts = len(lengths) * kv_heads * column_tiles
    blocks = parts * splits or form._dealt_blocks(len(lengths), column_tiles, 4)
    files = {
        "query": query.view(torch.int16) if dtype == torch.bfloat16 else query,
        "memory": batch.memory, "page_table": batch.page_table, "lengths": batch.lengths,
        "query_starts": batch.query_starts,
        "out": torch.full((*query.shape[:2], 128), torch.nan),
        "lse": torch.full(query.shape[:2], torch.nan),
        "partial": torch.full((blocks * form._partial_bytes(block),), 0xFF, dtype=torch.uint8),
    }  # fmt: skip
    for name, tensor in files.items():
        tensor.numpy().tofile(tmp_path / name)
    fields = [batch.slice_offset + offset for offset in form._fields]
    numbers = (
        blocks, len(lengths), batch.page_table.shape[1], heads, kv_heads, column_tiles, splits,
        *form._scales, *fields,
    )  # fmt: skip
    subprocess.run([main, *map(str, numbers)], cwd=tmp_path, check=True, timeout=60)
    out, lse = (
        torch.from_numpy(np.fromfile(tmp_path / name, np.float32)).view(files[name].shape).double()
        for name in ("out", "lse")
    )
    expected, expected_lse = attend(query, stored, options)
    seen = torch.isfinite(expected_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    # A peaked head hangs on two tokens, so that few heads scatter.
    assert (out - expected).norm() <= (2e-3 if factor == 1 else 1e-2) * expected.norm()
    assert (lse - expected_lse)[seen].abs().max() <= (1e-3 if factor == 1 else 1e-1)
