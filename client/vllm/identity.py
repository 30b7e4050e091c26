"""From the engine's configuration to the namespaces its ranks share blocks in.

Everything that changes the bytes of a block, or what an engine's block hash means, goes into the
namespace: engines that differ in any of it miss each other and never collide.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.weights import weights_fingerprint
from polarcache.proto.errors import InvalidRequestError, UnsupportedError
from polarcache.proto.layout import DTYPE_BYTES, KvLayout, NamespaceSpec, RopePairing

__all__ = ["EngineIdentity", "engine_identity"]

_log = logging.getLogger(__name__)
_PREFERRED_BLOCK_TOKENS = 128
# What vLLM's cryptographic hashes start from when PYTHONHASHSEED is not set.
_DEFAULT_HASH_SEED = "vllm-none-hash"
_CRYPTOGRAPHIC_HASHES = ("sha256", "sha256_cbor")
# Text models of vLLM whose RoPE turns neighbouring channels (is_neox_style=False).
_INTERLEAVED_MODELS = frozenset(
    {"cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj"}
)
# Not of the weights or the arithmetic: where the files lie and what wrote them.
_FOREIGN_CONFIG = ("_name_or_path", "_commit_hash", "transformers_version", "architectures")


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """One engine as the store sees it.

    Attributes:
        specs: The namespace of each tensor-parallel rank.
        layer_names: The engine's names of the layers, in order of depth.
        engine_block_tokens: Tokens of one of the engine's blocks.
        blocks_per_key: Engine blocks in one stored block; it has the key of the last of them.
    """

    specs: tuple[NamespaceSpec, ...]
    layer_names: tuple[str, ...]
    engine_block_tokens: int
    blocks_per_key: int

    @property
    def layout(self) -> KvLayout:
        """Shape of a stored block."""
        return self.specs[0].layout


def engine_identity(
    vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig
) -> EngineIdentity:
    """Names an engine.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        kv_cache_config: vLLM's `KVCacheConfig`.
        config: The connector's options.

    Raises:
        UnsupportedError: This kind of model or parallelism cannot be stored yet.
        InvalidRequestError: An option is wrong, or block hashes start from a random seed.
    """
    _check_parallelism(vllm_config.parallel_config)
    spec = _attention_spec(vllm_config, kv_cache_config)
    layer_names = _layer_names(kv_cache_config)
    text_config = vllm_config.model_config.hf_text_config
    blocks_per_key = _blocks_per_key(spec.block_size, config.block_tokens)
    layout = KvLayout(
        num_layers=len(layer_names),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        v_head_dim=spec.head_size_v,
        dtype=str(spec.dtype).removeprefix("torch."),
        block_tokens=spec.block_size * blocks_per_key,
        rope_pairing=_rope_pairing(text_config, config),
        rotary_dim=_rotary_dim(text_config, spec.head_size, config),
    )
    facts = {
        "engine": "vllm",
        "hash": _hash_facts(vllm_config.cache_config.prefix_caching_hash_algo),
        "engine_block_tokens": spec.block_size,
        "layers": layer_names,
        "layout": asdict(layout),
        "quantization": str(getattr(vllm_config.model_config, "quantization", None)),
        "model": _model_facts(text_config),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    specs = tuple(
        NamespaceSpec(
            model=_model_name(vllm_config.model_config, config),
            layout=layout,
            profile=config.profile,
            revision=_revision(vllm_config.model_config, config),
            tenant=config.tenant,
            salt=f"{config.salt}/vllm:{digest[:32]}",
            tp_rank=rank,
            tp_size=tp_size,
            calibration=config.calibration(),
        )
        for rank in range(tp_size)
    )
    return EngineIdentity(specs, layer_names, spec.block_size, blocks_per_key)


def _check_parallelism(parallel: Any) -> None:
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel, name, 1)) != 1:
            raise UnsupportedError(f"the connector works with {name} 1 only, got {size}")


def _attention_spec(vllm_config: Any, kv_cache_config: Any) -> Any:
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if getattr(vllm_config.model_config, "use_mla", False) or any("MLA" in kind for kind in kinds):
        raise UnsupportedError(
            "this model uses multi-head latent attention (MLA), whose cache holds latents instead "
            "of keys and values; PolarCache does not store them yet"
        )
    if kinds != ["FullAttentionSpec"]:
        raise UnsupportedError(
            f"the connector stores models with one group of full attention layers; this engine "
            f"has {kinds}. With sliding window layers start it with "
            "--disable-hybrid-kv-cache-manager"
        )
    spec = groups[0].kv_cache_spec
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES or getattr(spec.kv_quant_mode, "name", "NONE") != "NONE":
        raise UnsupportedError(
            f"the engine's cache holds {dtype} ({spec.kv_quant_mode}); expected one of "
            f"{list(DTYPE_BYTES)}: start it with --kv-cache-dtype auto and let the store quantize"
        )
    if spec.tokens_per_state != 1 or spec.num_head_slots not in (None, spec.num_kv_heads):
        raise UnsupportedError("the engine's cache packs several tokens or heads into one slot")
    return spec


def _layer_names(kv_cache_config: Any) -> tuple[str, ...]:
    """Layers that own a cache (others may share theirs), by depth."""
    owners = {name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    names = owners & set(kv_cache_config.kv_cache_groups[0].layer_names)
    return tuple(sorted(names, key=_by_numbers))


def _by_numbers(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _blocks_per_key(engine_block_tokens: int, block_tokens: int) -> int:
    if block_tokens == 0:
        fits = _PREFERRED_BLOCK_TOKENS % engine_block_tokens == 0
        block_tokens = _PREFERRED_BLOCK_TOKENS if fits else engine_block_tokens
    if block_tokens % engine_block_tokens:
        raise InvalidRequestError(
            f"polarcache.block_tokens must be a multiple of the engine's block of "
            f"{engine_block_tokens} tokens, got {block_tokens}"
        )
    return block_tokens // engine_block_tokens


def _rope_pairing(text_config: Any, config: ConnectorConfig) -> RopePairing:
    if config.rope_pairing != "auto":
        return config.rope_pairing
    model_type = getattr(text_config, "model_type", "")
    return "interleaved" if model_type in _INTERLEAVED_MODELS else "half"


def _rotary_dim(text_config: Any, head_dim: int, config: ConnectorConfig) -> int:
    if config.rotary_dim != -1:
        return config.rotary_dim
    if isinstance(rotary_dim := getattr(text_config, "rotary_dim", None), int):
        return rotary_dim
    rope: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    if not rope:
        return 0
    # Nested by layer type: the share that RoPE turns is the same in the models we know.
    first = next(iter(rope.values()))
    options = first if isinstance(first, dict) else rope
    share = options.get("partial_rotary_factor", getattr(text_config, "partial_rotary_factor", 1.0))
    return int(head_dim * float(share)) // 2 * 2


def _hash_facts(algorithm: str) -> list[str]:
    """What the engine's block hashes depend on besides tokens.

    Raises:
        InvalidRequestError: They start from a random seed, so no two engines share any.
    """
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None and algorithm not in _CRYPTOGRAPHIC_HASHES:
        raise InvalidRequestError(
            f"--prefix-caching-hash-algo {algorithm} starts from a random seed in every process, "
            "so nothing stored would ever be found: use sha256 or sha256_cbor, or set "
            "PYTHONHASHSEED to the same number for all engines"
        )
    return [algorithm, _DEFAULT_HASH_SEED if seed is None else seed]


def _model_facts(text_config: Any) -> dict[str, Any]:
    facts = text_config.to_dict()
    return {key: value for key, value in facts.items() if key not in _FOREIGN_CONFIG}


def _model_name(model_config: Any, config: ConnectorConfig) -> str:
    served = model_config.served_model_name
    name = config.model or (served[0] if isinstance(served, list) else served) or model_config.model
    # Other machines keep the same model in other folders; the weights are in the revision.
    return os.path.basename(name.rstrip("/")) if os.path.isdir(name) else name


def _revision(model_config: Any, config: ConnectorConfig) -> str:
    if config.revision:
        return config.revision
    commit = getattr(model_config.hf_config, "_commit_hash", None) or model_config.revision or ""
    fingerprint = weights_fingerprint(model_config.model, commit)
    if not fingerprint:
        _log.warning(
            "the weights of %s have no known revision: set polarcache.revision, or other weights "
            "of this name will be taken for these",
            model_config.model,
        )
    return fingerprint
