from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from polarcache.kernels import BlockShape, Profile  # noqa: E402
from polarcache.kernels.attention import flash  # noqa: E402
from polarcache.kernels.attention.options import AttentionOptions  # noqa: E402
from polarcache.kernels.attention.portable import PortableAttention  # noqa: E402
from polarcache.kernels.codec import Codec  # noqa: E402

HALF = BlockShape(128, 8, 128, 128, "half", 128)
OPTIONS = AttentionOptions(soft_cap=30.0, window=4096, sink_tokens=4)
CASES = [
    ("k=pair:r4t4,v=int4", HALF, torch.float16, "fp16", AttentionOptions(), 16),
    ("k=pair:r3t3:g32,v=int2", HALF, torch.bfloat16, "bf16", OPTIONS, 64),
    ("k=pair:arc2,v=exact", BlockShape(128, 2, 96, 80, "half", 32), torch.bfloat16, "fp32",
     OPTIONS, 32),
    ("k=polar,v=polar", HALF, torch.float16, "bf16", AttentionOptions(), 16),
    ("k=polar:r2t4,v=polar:r2t3", BlockShape(128, 2, 80, 96, "half", 32), torch.float16, "fp16",
     AttentionOptions(), 32),
    ("k=recursive:deep,v=recursive", HALF, torch.float16, "fp32", AttentionOptions(), 16),
    ("k=pair:tiers6,v=recursive:kmeans", HALF, torch.float16, "fp16", AttentionOptions(), 16),
    ("exact", BlockShape(16, 2, 80, 256, "interleaved", 80), torch.bfloat16, "fp16", OPTIONS, 16),
    ("exact", BlockShape(24, 2, 64, 64, "half", 64), torch.float32, "fp32", OPTIONS, 16),
]  # fmt: skip
WORDS = {
    "q_ptr": None, "raw_q_ptr": None, "memory_ptr": "*u8", "mix_ptr": "*fp16", "out_ptr": "*fp32",
    "lse_ptr": "*fp32", "part_ptr": "*fp32", "part_lse_ptr": "*fp32", "scale": "fp32",
    "soft_cap": "fp32",
}  # fmt: skip


def compiled(
    kernel: Any, constants: dict[str, Any], query: str, capability: int, warps: int = 4
) -> Any:
    """Compiles as a launch with aligned tensors would."""
    signature = {}
    for name in kernel.arg_names:
        kind = WORDS.get(name, "*i32" if name.endswith("_ptr") else "i32") or f"*{query}"
        signature[name] = "constexpr" if name in constants else kind
    source = ASTSource(kernel, signature, constants)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
@pytest.mark.parametrize(
    ("text", "shape", "dtype", "query", "options", "rows"), CASES, ids=[c[0] for c in CASES]
)
def test_kernels_compile_without_a_gpu(
    text: str, shape: BlockShape, dtype: torch.dtype, query: str, options: AttentionOptions,
    rows: int, capability: int,
) -> None:  # fmt: skip
    codec = Codec(Profile.parse(text), shape, dtype)
    plan = PortableAttention.of(codec, 4 * shape.kv_heads, options, 132)
    query_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[query]
    constants = plan.constants_of(query_dtype, rows) | {"SPLIT": rows == 16}
    if not options.window:
        constants["positions_ptr"] = None
    for side, name in (("k=", "key_table_ptr"), ("v=", "value_table_ptr")):
        if f"{side}polar" not in text and f"{side}recursive" not in text:
            constants[name] = None
    if "k=polar" not in text:
        constants["mix_ptr"] = None
    if "k=recursive:deep" not in text:
        constants["raw_q_ptr"] = None
    kernel = compiled(flash.attend_kernel, constants, query, capability, plan.warps(rows))
    assert kernel.asm["cubin"]
    merge = {name: constants[name] for name in ("HEADS", "DV", "SHARE", "BM", "WIDE_V")}
    assert compiled(
        flash.merge_kernel, merge | {"SPLITS": 128, "CHUNK": 32}, query, capability
    ).asm["cubin"]
