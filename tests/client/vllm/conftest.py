"""Stand-ins for vLLM's objects, with the fields and methods that the connector uses of them.

`test_contract.py` checks these names against the real classes where vLLM is installed.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polarcache.client.vllm.cache import EngineCache
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity, engine_identity
from polarcache.client.vllm.layouts import KeyThenValue
from tests.client.vllm.scheduler_fakes import Engine

ENGINE_BLOCK_TOKENS = 16
NUM_ENGINE_BLOCKS = 128


@dataclass
class FullAttentionSpec:
    """vLLM's class of this name: it is known by its name."""

    block_size: int = ENGINE_BLOCK_TOKENS
    num_kv_heads: int = 2
    head_size: int = 64
    head_size_v: int = 64
    dtype: torch.dtype = torch.float16
    kv_quant_mode: Any = field(default_factory=lambda: SimpleNamespace(name="NONE"))
    tokens_per_state: int = 1
    num_head_slots: int | None = None


@dataclass
class MLAAttentionSpec(FullAttentionSpec):
    """Likewise."""


class FakeRequest:
    """A request as the scheduler sees it."""

    def __init__(self, name: str, token_ids: Sequence[int]) -> None:
        self.request_id = name
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.num_computed_tokens = 0
        self.skip_reading_prefix_cache = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def block_hashes(self) -> list[bytes]:
        hashes, parent = [], b""
        for start in range(0, self.num_tokens - ENGINE_BLOCK_TOKENS + 1, ENGINE_BLOCK_TOKENS):
            tokens = self.token_ids[start : start + ENGINE_BLOCK_TOKENS]
            parent = hashlib.sha256(parent + repr(tokens).encode()).digest()
            hashes.append(parent)
        return hashes


class FakePool:
    """vLLM's block pool: it counts references."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [SimpleNamespace(block_id=i, ref_cnt=0) for i in range(num_blocks)]

    def touch(self, blocks: Iterable[Any]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Any]) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    @property
    def held(self) -> set[int]:
        assert all(block.ref_cnt >= 0 for block in self.blocks)
        return {block.block_id for block in self.blocks if block.ref_cnt}


def scheduled(
    num_tokens: dict[str, int], block_ids: dict[str, list[int]] | None = None
) -> SimpleNamespace:
    """A scheduler's output: tokens of this step and all blocks, by request."""
    blocks = block_ids or {}
    return SimpleNamespace(
        num_scheduled_tokens=num_tokens,
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (blocks[name],)),
    )


def engine_configs(tmp_path: Path, **changes: Any) -> tuple[Any, Any]:
    """vLLM's `VllmConfig` and `KVCacheConfig` of a small model."""
    num_layers = changes.get("num_layers", 3)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(num_layers)]
    text = {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e4}}
    text |= changes.get("text", {})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(changes.get("weights", b"w" * 200_000))
    model = SimpleNamespace(
        model=str(tmp_path),
        served_model_name=[changes.get("served", str(tmp_path))],
        revision=None,
        hf_config=SimpleNamespace(_commit_hash=None),
        hf_text_config=SimpleNamespace(**text, to_dict=lambda: dict(text)),
        quantization=None,
        use_mla=False,
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    for name, value in changes.get("parallel", {}).items():
        setattr(parallel, name, value)
    cache = SimpleNamespace(prefix_caching_hash_algo=changes.get("hash", "sha256"))
    specs = changes.get("specs", [FullAttentionSpec()])
    vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel, cache_config=cache)
    kv_cache_config = SimpleNamespace(
        num_blocks=NUM_ENGINE_BLOCKS,
        # Tenth layers sort after ninth ones, whatever order the engine has them in.
        kv_cache_tensors=[SimpleNamespace(layers=list(reversed(names)))],
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=spec, layer_names=[*names, "shares.its.cache"])
            for spec in specs
        ],
    )
    return vllm_config, kv_cache_config


@pytest.fixture
def fakes() -> SimpleNamespace:
    """The stand-ins, for tests that cannot import this file."""
    return SimpleNamespace(
        Request=FakeRequest,
        Pool=FakePool,
        FullAttentionSpec=FullAttentionSpec,
        MLAAttentionSpec=MLAAttentionSpec,
        scheduled=scheduled,
        engine_configs=engine_configs,
        num_blocks=NUM_ENGINE_BLOCKS,
    )


@pytest.fixture
def identity(tmp_path: Path) -> EngineIdentity:
    """A small engine with blocks of 16 tokens; stored blocks have 128."""
    config = ConnectorConfig(model=f"vllm-{tmp_path.name}-{id(tmp_path)}")
    return engine_identity(*engine_configs(tmp_path), config)


def random_cache(identity: EngineIdentity, seed: int) -> tuple[list[torch.Tensor], EngineCache]:
    """An engine's cache tensors [B, H, N, 2D], memory in [B, N, H, 2D] order as on some GPUs."""
    layout = identity.layout
    generator = torch.Generator().manual_seed(seed)
    layers = [
        torch.randn(
            NUM_ENGINE_BLOCKS,
            identity.engine_block_tokens,
            layout.num_kv_heads,
            layout.head_dim + layout.v_head_dim,
            generator=generator,
        )
        .half()
        .transpose(1, 2)
        for _ in range(layout.num_layers)
    ]
    return layers, EngineCache(layers, KeyThenValue(layout.head_dim))


@pytest.fixture(scope="session")
def make_cache() -> Any:
    return random_cache


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on, for a service that comes later."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def engine(identity: EngineIdentity, fakes: SimpleNamespace) -> Iterator[Engine]:
    one = Engine(identity, fakes)
    yield one
    one.lookups.close()


@pytest.fixture
def prompt(fakes: SimpleNamespace) -> Any:
    """1,000 tokens: 7 whole stored blocks of 128, 62 whole engine blocks."""
    return fakes.Request("r", range(1000))
