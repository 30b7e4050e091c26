from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from polarcache.client import KvLayout
from polarcache.client.transformers import kv_layout, namespace_spec, weights_digest
from polarcache.proto.errors import InvalidRequestError, UnsupportedError


def tiny(**changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {
        "vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **parameters}}


def test_the_layout_is_the_model_s() -> None:
    spec = namespace_spec(tiny(), name="m", profile="k=pair:r4t4,v=int4")
    assert spec.layout == KvLayout(
        num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32", rope_pairing="half"
    )
    assert (spec.model, spec.profile) == ("m", "k=pair:r4t4,v=int4")
    assert namespace_spec(tiny()).model == "llama"
    assert kv_layout(tiny().half(), block_tokens=64).dtype == "float16"
    assert kv_layout(tiny(), dtype="bfloat16").dtype == "bfloat16"
    assert kv_layout(tiny(head_dim=32)).head_dim == 32
    partial = tiny(head_dim=32, **rope(partial_rotary_factor=0.5))
    assert kv_layout(partial).rotary_dim == 16


def test_the_digest_tells_weights_and_rope_apart() -> None:
    digest = weights_digest(tiny())
    assert len(digest) == 32
    assert weights_digest(tiny()) == digest
    assert namespace_spec(tiny()).revision == digest
    other = tiny()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    assert weights_digest(other) != digest
    assert weights_digest(tiny(**rope(rope_theta=20000.0))) != digest
    assert namespace_spec(tiny(), revision="r1").revision == "r1"


def test_what_cannot_be_shared_is_refused() -> None:
    scaled = tiny(**rope(rope_type="dynamic", factor=2.0))
    with pytest.raises(UnsupportedError, match="dynamic"):
        namespace_spec(scaled)
    unknown = tiny()
    unknown.config.model_type = "other"
    with pytest.raises(UnsupportedError, match="rope_pairing"):
        kv_layout(unknown)
    assert kv_layout(unknown, rope_pairing="interleaved").rope_pairing == "interleaved"
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny().config)
    with pytest.raises(InvalidRequestError, match="revision"):
        namespace_spec(empty)
    assert namespace_spec(empty, revision="r1").layout.num_layers == 2
