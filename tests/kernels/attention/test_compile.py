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
SMALL = BlockShape(64, 2, 64, 64, "half", 64)
CASES = [
    ("k=pair:r4t4,v=int4", HALF, torch.float16, "fp16", AttentionOptions(), 16),
    ("k=pair:r3t3:g32,v=int2", SMALL, torch.bfloat16, "bf16", OPTIONS, 64),
    ("k=pair:arc2:g64,v=exact", BlockShape(64, 2, 96, 80, "half", 32), torch.bfloat16, "fp32",
     OPTIONS, 32),
    ("exact", BlockShape(16, 2, 80, 256, "interleaved", 80), torch.bfloat16, "fp16", OPTIONS, 16),
    ("exact", BlockShape(24, 2, 64, 64, "half", 64), torch.float32, "fp32", OPTIONS, 16),
    ("k=polar,v=polar", SMALL, torch.float16, "bf16", AttentionOptions(), 32),
    ("k=recursive:deep,v=recursive", SMALL, torch.float16, "fp16", AttentionOptions(), 16),
    ("k=pair:tiers6:g64,v=recursive:kmeans", SMALL, torch.float16, "fp16", AttentionOptions(), 16),
]  # fmt: skip
# What differs between them is how Triton multiplies, which these two show.
BOTH = ("k=pair:r3t3:g32,v=int2", "exact")
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


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "query", "options", "rows"), CASES, ids=[c[0] for c in CASES]
)
def test_kernels_compile_without_a_gpu(
    text: str, shape: BlockShape, dtype: torch.dtype, query: str, options: AttentionOptions,
    rows: int,
) -> None:  # fmt: skip
    codec = Codec(Profile.parse(text), shape, dtype)
    plan = PortableAttention.of(codec, 4 * shape.kv_heads, options, 132)
    query_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[query]
    if "k=recursive" in text:
        # These are rotated before the kernel, in fp32.
        query, query_dtype = "fp32", torch.float32
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
    for capability in (80, 90) if text in BOTH else (90,):
        kernel = compiled(flash.attend_kernel, constants, query, capability, plan.warps(rows))
        assert kernel.asm["cubin"]


@pytest.mark.parametrize("capability", [80, 90], ids=["sm80", "sm90"])
def test_the_merge_compiles_without_a_gpu(capability: int) -> None:
    constants = {
        "HEADS": 8, "DV": 96, "SHARE": 4, "BM": 16, "WIDE_V": 128, "SPLITS": 128, "CHUNK": 32,
    }  # fmt: skip
    assert compiled(flash.merge_kernel, constants, "fp16", capability).asm["cubin"]
