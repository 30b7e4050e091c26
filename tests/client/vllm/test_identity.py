from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity, engine_identity
from polarcache.proto.errors import InvalidRequestError, UnsupportedError


def named(fakes: SimpleNamespace, path: Path, *options: Any, **changes: Any) -> EngineIdentity:
    path.mkdir(exist_ok=True)
    config = options[0] if options else ConnectorConfig()
    return engine_identity(*fakes.engine_configs(path, **changes), config)


def test_an_engine_is_named_by_its_model_and_geometry(
    fakes: SimpleNamespace, tmp_path: Path
) -> None:
    one = named(fakes, tmp_path / "qwen", num_layers=12)
    assert one.layout.num_layers == 12
    assert one.layout.block_tokens == 128
    assert one.blocks_per_key == 8
    assert (one.layout.num_kv_heads, one.layout.head_dim, one.layout.rotary_dim) == (2, 64, 64)
    assert [name.split(".")[2] for name in one.layer_names] == [str(i) for i in range(12)]
    assert one.specs[0].model == "qwen"
    assert len(one.specs[0].revision) == 32


def test_folders_with_the_same_weights_share(fakes: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert named(fakes, tmp_path / "a" / "m") == named(fakes, tmp_path / "b" / "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": b"w" * 199_999 + b"v"},
        {"hash": "sha256_cbor"},
        {"num_layers": 4},
        {"text": {"rope_parameters": {"rope_theta": 1e6}}},
        {"parallel": {"tensor_parallel_size": 2}},
    ],
    ids=["weights", "hash", "layers", "rope", "tp"],
)
def test_whatever_changes_the_bytes_changes_the_namespace(
    fakes: SimpleNamespace, tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = named(fakes, tmp_path / "m").specs[0].namespace_id(2)
    other = named(fakes, tmp_path / "m", **changes).specs[0].namespace_id(2)
    assert base != other


def test_the_hash_seed_is_part_of_the_name(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    base = named(fakes, tmp_path / "m")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert named(fakes, tmp_path / "m") != base


def test_a_random_hash_seed_is_refused(
    fakes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(InvalidRequestError, match="random seed in every process"):
        named(fakes, tmp_path, hash="xxhash")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    named(fakes, tmp_path, hash="xxhash")


def test_each_tensor_parallel_rank_has_its_namespace(
    fakes: SimpleNamespace, tmp_path: Path
) -> None:
    one = named(fakes, tmp_path, parallel={"tensor_parallel_size": 4})
    assert [(spec.tp_rank, spec.tp_size) for spec in one.specs] == [(i, 4) for i in range(4)]
    assert len({spec.namespace_id(2) for spec in one.specs}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size 1 only, got 2"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size 1"),
    ],
)
def test_parallelism_that_splits_blocks_is_refused(
    fakes: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        named(fakes, tmp_path, **changes)


def test_caches_that_are_no_keys_and_values_are_refused(
    fakes: SimpleNamespace, tmp_path: Path
) -> None:
    full = fakes.FullAttentionSpec
    with pytest.raises(UnsupportedError, match="multi-head latent attention"):
        named(fakes, tmp_path, specs=[fakes.MLAAttentionSpec()])
    with pytest.raises(UnsupportedError, match="--disable-hybrid-kv-cache-manager"):
        named(fakes, tmp_path, specs=[full(), full()])
    with pytest.raises(UnsupportedError, match="let the store quantize"):
        named(fakes, tmp_path, specs=[full(dtype=torch.float8_e4m3fn)])


def test_stored_blocks_are_whole_engine_blocks(fakes: SimpleNamespace, tmp_path: Path) -> None:
    one = named(fakes, tmp_path, ConnectorConfig(block_tokens=64))
    assert one.blocks_per_key == 4
    with pytest.raises(InvalidRequestError, match="multiple of the engine's block of 16"):
        named(fakes, tmp_path, ConnectorConfig(block_tokens=40))
    odd = named(fakes, tmp_path, specs=[fakes.FullAttentionSpec(block_size=96)])
    assert (odd.layout.block_tokens, odd.blocks_per_key) == (96, 1)


def test_rope_follows_the_model(fakes: SimpleNamespace, tmp_path: Path) -> None:
    partial = {"rope_parameters": {"partial_rotary_factor": 0.5}, "model_type": "glm4"}
    layout = named(fakes, tmp_path, text=partial).layout
    assert (layout.rotary_dim, layout.rope_pairing) == (32, "interleaved")
    assert named(fakes, tmp_path, text={"rope_parameters": None}).layout.rotary_dim == 0
    options = ConnectorConfig(rotary_dim=16, rope_pairing="interleaved")
    chosen = named(fakes, tmp_path, options).layout
    assert (chosen.rotary_dim, chosen.rope_pairing) == (16, "interleaved")
