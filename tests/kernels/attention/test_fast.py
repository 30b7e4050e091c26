import ctypes
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.attention.fast import _BLOCKS, _WIDE, FastDecode, PreparedDecode
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from tests.kernels.attention.reference import store

SMS = 132
MACROS = {
    "HEAD_DIM": 128, "V_HEAD_DIM": 128, "RADIUS_BITS": 4, "ANGLE_BITS": 4, "ARCS": 0,
    "ROTARY": 128, "INTERLEAVED": 0, "PAGE_GROUPS": 1, "QUERY": 0, "SOFT_CAP": 0,
    "COLUMN_TILES": 1, "SPREAD": 2, "WARPS": 16, "SLOTS": 2, "SLOT_TILES": 1,
}  # fmt: skip


def codec_of(profile: str, dim: int = 128, v_dim: int = 128, tokens: int = 128) -> Codec:
    shape = BlockShape(tokens, 8, dim, v_dim, "half", dim)
    return Codec(Profile.parse(profile), shape, torch.float16)


@pytest.mark.parametrize(
    "profile",
    [
        "k=pair:r4t4:minmax,v=int4",
        "k=pair:r4t4,v=int4",
        "k=pair:r3t3,v=int4",
        "k=pair:r4t4:arc2,v=int4",
        "k=pair:r2t4:arc2,v=int4",
    ],
)
def test_covers_pair_keys_and_int4_values(profile: str) -> None:
    assert FastDecode.covers(codec_of(profile), AttentionOptions(soft_cap=30.0, scale=0.1))
    assert FastDecode.covers(codec_of(profile, 64, 64), AttentionOptions())
    assert FastDecode.covers(codec_of(profile, tokens=256), AttentionOptions())


@pytest.mark.parametrize(
    ("profile", "dim", "v_dim", "tokens", "window"),
    [
        ("exact", 128, 128, 128, 0),
        ("k=pair:r3t4,v=int4", 128, 128, 128, 0),
        ("k=pair:r2t6,v=int4", 128, 128, 128, 0),
        ("k=pair:r4t4:g64,v=int4", 128, 128, 128, 0),
        ("k=pair:tiers8,v=int4", 128, 128, 128, 0),
        ("k=pair:r4t4,v=int2", 128, 128, 128, 0),
        ("k=pair:r4t4,v=int4:g32", 128, 128, 128, 0),
        ("k=pair:r4t4,v=int4", 96, 128, 128, 0),
        ("k=pair:r4t4,v=int4", 128, 80, 128, 0),
        ("k=pair:r4t4,v=int4", 128, 128, 128, 64),
    ],
)
def test_leaves_the_rest_to_other_forms(
    profile: str, dim: int, v_dim: int, tokens: int, window: int
) -> None:
    codec = codec_of(profile, dim, v_dim, tokens)
    assert not FastDecode.covers(codec, AttentionOptions(window=window))


@pytest.mark.parametrize(
    ("groups", "parts", "splits"),
    [(256, 64, 2), (512, 128, 1), (256, 8, 16), (32, 64, 2), (64, 256, 1), (1, 1, 1)],
)
def test_even_sequences_fill_whole_waves(groups: int, parts: int, splits: int) -> None:
    plan = FastDecode._even_plan(groups, parts, SMS, _BLOCKS[0])
    assert plan.splits == splits
    assert plan.blocks == parts * splits


@pytest.mark.parametrize("block", [*_BLOCKS, _WIDE])
def test_blocks_that_wait_for_each_other_run_at_once(block: Any) -> None:
    fast = FastDecode(codec_of("k=pair:r4t4,v=int4"), 32, AttentionOptions())
    for parts in (1, 2, 3, 8, 100, 133):
        for groups in (1, 500, 100000):
            assert FastDecode._even_plan(groups, parts, SMS, block).splits <= SMS
    for sequences in (1, 2, 60, 70, 133, 500):
        # All others have a block a part.
        budget = fast._dealt_blocks(sequences, 1, SMS) // 8
        assert budget - (sequences - 1) <= SMS


@pytest.mark.parametrize("sequences", [1, 3, 16, 40, 500])
def test_dealt_blocks_suffice_for_every_part(sequences: int) -> None:
    fast = FastDecode(codec_of("k=pair:r4t4,v=int4"), 32, AttentionOptions())
    for column_tiles in (1, 4):
        blocks = fast._dealt_blocks(sequences, column_tiles, SMS)
        assert blocks % (8 * column_tiles) == 0
        assert blocks >= sequences * 8 * column_tiles


def test_the_workspace_holds_every_plan() -> None:
    fast = FastDecode(codec_of("k=pair:r4t4,v=int4"), 32, AttentionOptions())
    for sequences in (1, 2, 7, 30, 200):
        for max_rows in (1, 2, 3, 16, 40):
            # Room for the launch's own rows is enough, and so is room for more rows.
            for room_rows in (max_rows, max_rows + 1, 4 * max_rows, sequences * max_rows):
                room = fast.workspace_bytes(sequences, max(room_rows, max_rows), SMS)
                column_tiles, block = fast._columns(max_rows)
                blocks = room // fast._partial_bytes(block)
                parts = sequences * 8 * column_tiles
                assert blocks >= fast._dealt_blocks(sequences, column_tiles, SMS)
                for groups in (1, 5, 64, 4096):
                    assert blocks >= FastDecode._even_plan(groups, parts, SMS, block).blocks


def test_many_sequences_that_decode_need_little_workspace() -> None:
    fast = FastDecode(codec_of("k=pair:r4t4,v=int4"), 32, AttentionOptions())
    assert fast.workspace_bytes(200, 1, SMS) < 32 << 20


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from polarcache.kernels.attention.cuda import compiler

    return compiler


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ARCS": 1, "RADIUS_BITS": 2, "PAGE_GROUPS": 2},
        {"ARCS": 1, "SPREAD": 1},
        {"RADIUS_BITS": 3, "ANGLE_BITS": 3, "SOFT_CAP": 1, "QUERY": 1, "INTERLEAVED": 1},
        {"HEAD_DIM": 64, "V_HEAD_DIM": 64, "ROTARY": 32, "SLOT_TILES": 2},
        {"COLUMN_TILES": 2, "SPREAD": 1, "WARPS": 8, "SLOTS": 4, "QUERY": 2},
    ],
)
def test_compiles_for_hopper_without_a_gpu(compiler: ModuleType, changes: dict[str, int]) -> None:
    binary = compiler.compile_source("decode.cu", MACROS | changes, "sm_90a")
    assert binary.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    "changes", [{"QUERY": 2}, {"ARCS": 1, "SOFT_CAP": 1}, {"RADIUS_BITS": 3, "ANGLE_BITS": 3}]
)
def test_the_wide_form_compiles_without_a_gpu(
    compiler: ModuleType, changes: dict[str, int]
) -> None:
    wide = {"COLUMN_TILES": _WIDE.tiles, "SPREAD": 1, "WARPS": _WIDE.warps, "SLOTS": _WIDE.slots}
    binary = compiler.compile_source("wide.cu", MACROS | wide | changes, "sm_90a")
    assert binary.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("rows", "dim", "wide"), [(4, 128, 0), (5, 128, 1), (16, 128, 1), (16, 64, 0)]
)
def test_many_columns_take_the_wide_form(rows: int, dim: int, wide: int) -> None:
    fast = FastDecode(codec_of("k=pair:r4t4,v=int4", dim), 32, AttentionOptions())
    assert (fast._columns(rows)[1] is _WIDE) == bool(wide)


def test_a_bound_launch_hands_the_driver_what_its_values_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cuda.bindings")
    from polarcache.kernels.attention.cuda import module

    seen: list[tuple[Any, ...]] = []

    def launch(*arguments: Any) -> tuple[Any]:
        config, function, addresses, extra = arguments
        grid = [function, config.gridDimX, config.blockDimX, config.sharedMemBytes]
        pointers = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
        read = [
            ctypes.cast(pointers[i], ctypes.POINTER(kind)).contents.value or 0
            for i, kind in enumerate(module._TYPES)
        ]
        seen.append((grid, int(config.hStream), extra, read))
        return (module.driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(module.driver, "cuLaunchKernelEx", launch)
    numbers = list(range(1, len(module._TYPES) + 1))
    bound = module.Kernel("function", 512, 4096).bind(7, tuple(numbers))
    prepared = PreparedDecode(bound, [10, 20, 30, 40, 50])
    for slice_offset, stream in ((0, 1), (1000, 2)):
        prepared(slice_offset, stream)
        grid, told_stream, extra, read = seen[-1]
        assert grid == ["function", 7, 512, 4096]
        assert (told_stream, extra) == (stream, 0)
        assert read[:8] == numbers[:8]
        assert read[8:13] == [slice_offset + offset for offset in (10, 20, 30, 40, 50)]
        assert read[13:-1] == numbers[13:-1]
    # Every launch has a mark of its own.
    assert seen[0][3][-1] != seen[1][3][-1]


def test_what_does_not_compile_says_why(compiler: ModuleType) -> None:
    with pytest.raises(compiler.CompileError, match="radius must become fp16"):
        compiler.compile_source("decode.cu", MACROS | {"ANGLE_BITS": 6}, "sm_90")


def test_processes_that_compile_at_once_share_one_whole_file(
    compiler: ModuleType, tmp_path: Path
) -> None:
    program = (
        "from polarcache.kernels.attention.cuda.compiler import compile_source\n"
        f"assert compile_source('decode.cu', {MACROS}, 'sm_90').startswith(b'\\x7fELF')"
    )
    both = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    files = list((tmp_path / "polarcache" / "kernels").iterdir())
    assert [file.suffix for file in files] == [".cubin"]
    # Read back, not compiled again: what is on disk is what comes.
    files[0].write_bytes(b"kept")
    assert compiler.compile_source("decode.cu", MACROS, "sm_90") == b"kept"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    compiler: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.compile_source("decode.cu", MACROS, "sm_90").startswith(b"\x7fELF")


def test_without_the_compiler_the_portable_form_serves_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from polarcache.kernels.attention import prefix

    attention = prefix.PrefixAttention(codec_of("k=pair:r4t4,v=int4"), 32)
    prefix._warn_of_slow_form.cache_clear()
    stored = store(attention.codec, [128], [1])
    query = torch.zeros(1, 32, 128)
    out, lse = torch.empty(1, 32, 128), torch.empty(1, 32)

    def prepare(*_: object) -> None:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(FastDecode, "prepare", prepare)
    with pytest.warns(RuntimeWarning, match=r"portable kernels serve.*cuda-bindings"):
        assert attention._prepared(query, stored.batch, out, lse, None) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention._prepared(query, stored.batch, out, lse, None) is None
        again = prefix.PrefixAttention(attention.codec, 32)
        assert again._prepared(query, stored.batch, out, lse, None) is None
