import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from polarcache.kernels import BlockShape, Profile  # noqa: E402
from polarcache.kernels.codec import Codec  # noqa: E402
from polarcache.kernels.gpu import sides  # noqa: E402
from polarcache.kernels.gpu.launch import Plan  # noqa: E402

HALF = BlockShape(128, 8, 128, 128, "half", 128)
CASES = [
    ("k=pair:r4t4,v=int4", HALF, "fp16"),
    ("k=pair:r3t3:minmax:g32,v=int2", HALF, "bf16"),
    ("k=pair:r2t3:g64,v=int4:g16", BlockShape(128, 2, 80, 96, "interleaved", 80), "fp16"),
    ("k=pair:r3t4:arc2,v=int4", HALF, "fp16"),
    ("k=recursive,v=polar:b8", HALF, "fp16"),
    ("k=pair:tiers8,v=int4", HALF, "fp16"),
    ("k=polar:b6,v=recursive:deep", BlockShape(64, 2, 64, 64, "half", 48), "bf16"),
    ("k=recursive:deep,v=polar:b4", BlockShape(64, 2, 32, 96, "half", 32), "fp32"),
]
POINTERS = {
    "out_ptr": "*u8",
    "packed_ptr": "*u8",
    "flags_ptr": "*i32",
    "matrix_ptr": "*fp16",
    "cosines_ptr": "*fp32",
    "radii_ptr": "*fp32",
    "counts_ptr": "*i32",
    "table_ptr": "*i32",
    "pairs_ptr": "*i64",
}


def launches(plan: Plan) -> Iterator[tuple[Any, Mapping[str, Any], int]]:
    if plan.fused is not None:
        for kernel in (sides.encode_kernel, sides.decode_kernel):
            yield kernel, plan.fused.constants, plan.fused.num_warps
    for side in plan.singles:
        for launch in (side.encoder, side.decoder):
            yield launch.kernel, launch.constants, launch.num_warps


def compiled(
    kernel: Any, constants: Mapping[str, Any], num_warps: int, dtype: str, capability: int
) -> Any:
    """Compiles as a launch with aligned tensors, no slots and no energies of queries would."""
    pointers = POINTERS
    if "packed_ptr" in kernel.arg_names:
        pointers = POINTERS | {"out_ptr": f"*{dtype}"}
    signature, attributes = {}, {}
    constants = dict(constants) | {"slots_ptr": None, "query_ptr": None}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        number = "i32" if name == "num_slices" else "i64"
        signature[name] = pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else number)
        attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {n: constants[n] for n in kernel.arg_names if n in constants}, attributes
    )
    target, config = GPUTarget("cuda", capability, 32), triton.runtime.driver
    # Kernels ask the device in use what it can do.
    in_use = config._active
    config.set_active(SimpleNamespace(get_current_target=lambda: target))
    try:
        return triton.compile(source, target=target, options={"num_warps": num_warps})
    finally:
        config.set_active(in_use)


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
@pytest.mark.parametrize(("text", "shape", "dtype"), CASES, ids=[case[0] for case in CASES])
def test_kernels_compile_without_a_gpu(
    text: str, shape: BlockShape, dtype: str, capability: int
) -> None:
    codec = Codec(Profile.parse(text), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    assert set(plan.sides) == {"key", "value"}
    for kernel, constants, num_warps in launches(plan):
        assert compiled(kernel, constants, num_warps, dtype, capability).asm["cubin"]


def numbers_of(constant: object) -> Iterator[object]:
    if isinstance(constant, tuple | list):
        for item in constant:
            yield from numbers_of(item)
    else:
        yield constant


@pytest.mark.parametrize(("text", "shape", "dtype"), CASES, ids=[case[0] for case in CASES])
def test_constants_hold_no_text_in_tuples(text: str, shape: BlockShape, dtype: str) -> None:
    # Triton 3.6 cannot pass such a text on to another function; newer versions do.
    codec = Codec(Profile.parse(text), shape, torch.float16)
    plan = Plan.of(codec.profile, shape, codec.layout)
    assert plan is not None
    for _, constants, _ in launches(plan):
        tuples = [constant for constant in constants.values() if isinstance(constant, tuple)]
        assert not [item for item in numbers_of(tuples) if isinstance(item, str)]


def test_kernels_read_no_global_nan() -> None:
    # Triton 3.6 compares the globals of a kernel at each launch, and NaN never equals itself.
    for package in ("gpu", "attention"):
        folder = importlib.import_module(f"polarcache.kernels.{package}")
        for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, triton.language.constexpr):
                    assert value.value == value.value, f"{module.name}.{name}"
