import dataclasses
from typing import Any

import pytest

from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.keys import chain_keys
from polarcache.proto.layout import KvLayout, NamespaceSpec

LAYOUT = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128)
SPEC = NamespaceSpec(model="llama", layout=LAYOUT, profile="exact")


def test_byte_sizes_of_an_8b_model() -> None:
    assert LAYOUT.raw_key_bytes == 128 * 8 * 128 * 2
    assert LAYOUT.raw_slice_bytes * LAYOUT.num_layers == 16 << 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("num_kv_heads", 2000),
        ("head_dim", 72),
        ("v_head_dim", 8),
        ("dtype", "int8"),
        ("block_tokens", 100),
        ("rope_pairing", "none"),
        ("rotary_dim", 130),
        ("rotary_dim", 3),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        dataclasses.replace(LAYOUT, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", ""), ("salt", "s" * 257), ("tp_rank", 1), ("pp_size", 0)],
)
def test_an_identity_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field.split("_")[0]):
        dataclasses.replace(SPEC, **{field: value})


def test_messages_round_trip() -> None:
    spec = dataclasses.replace(
        SPEC,
        layout=KvLayout(2, 4, 96, 64, "bfloat16", 64, "interleaved", 32),
        revision="r1", lora="l", tenant="t", salt="s", tp_rank=1, tp_size=2, pp_size=3, pp_rank=2,
    )  # fmt: skip
    assert NamespaceSpec.from_proto(spec.to_proto()) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"model": "llamb"},
        {"revision": "x"},
        {"lora": "x"},
        {"tenant": "x"},
        {"salt": "x"},
        {"tp_size": 2},
        {"pp_size": 2},
        {"profile": "k=exact,v=int4"},
        {"layout": dataclasses.replace(LAYOUT, dtype="bfloat16")},
        {"layout": dataclasses.replace(LAYOUT, block_tokens=64)},
        {"layout": dataclasses.replace(LAYOUT, rope_pairing="interleaved")},
        {"layout": dataclasses.replace(LAYOUT, rotary_dim=64)},
    ],
)
def test_every_difference_gives_another_namespace(change: dict[str, Any]) -> None:
    assert dataclasses.replace(SPEC, **change).namespace_id(1) != SPEC.namespace_id(1)


def test_another_packed_layout_gives_another_namespace() -> None:
    assert SPEC.namespace_id(1) != SPEC.namespace_id(2)
    assert len(SPEC.namespace_id(1)) == 16


def test_the_calibration_s_digest_is_part_of_the_namespace_and_its_text_is_not() -> None:
    with_text = dataclasses.replace(SPEC, calibration="{}")
    assert with_text.namespace_id(1, "d1") == SPEC.namespace_id(1, "d1")
    assert SPEC.namespace_id(1, "d1") != SPEC.namespace_id(1, "d2")
    assert NamespaceSpec.from_proto(with_text.to_proto()) == with_text
    with pytest.raises(InvalidRequestError, match="calibration"):
        dataclasses.replace(SPEC, calibration="x" * (1 << 21))


def test_keys_chain_and_leave_the_tail_out() -> None:
    keys = chain_keys(list(range(100)), 32)
    assert len(keys) == 3
    assert chain_keys(list(range(64)), 32) == keys[:2]
    other = [1, *range(1, 100)]
    assert not set(chain_keys(other, 32)) & set(keys)
    assert chain_keys([], 32) == []


def test_a_negative_token_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="token ids"):
        chain_keys([-1] * 32, 32)
